// Sizes, dtypes and attributes in; workspace, instruction set and algorithm out.
#include "cpu/plan.h"

#include <algorithm>

#include "core/validate.h"
#include "cpu/workspace.h"

namespace daco {
namespace cpu {

Status check_weights(const char* op, DType weight) {
  if (weight != DType::kF8E4M3) return {};
  return make_status(
      Code::kUnsupported,
      "%s: weights: fp8_e4m3 has kernels on CUDA only; on the CPU quantise to int8 or use fp32, "
      "fp16 or bf16",
      op);
}

int clamp_threads(int threads) { return std::min(std::max(threads, 1), static_cast<int>(kMaxThreads)); }

Status check_supported(const SteerSae& op) {
  return op.coder == SaeCoder::kNone ? Status{} : check_weights("SteerSae", op.weight);
}

Status check_supported(const SteerPursuit& op) { return check_weights("SteerPursuit", op.weight); }

size_t workspace_bytes(const SteerSae& op, int threads) {
  return op.rows == 0 ? 0 : Workspace(sizes_of(op, threads), nullptr).bytes();
}

size_t workspace_bytes(const SteerPursuit& op, int threads) {
  if (op.rows == 0) return 0;
  // Enough with and without a Gram matrix: hosts plan before they have pointers.
  return std::max(Workspace(sizes_of(op, threads, true), nullptr).bytes(),
                  Workspace(sizes_of(op, threads, false), nullptr).bytes());
}

Status plan(const SteerSae& op, int threads, Plan* plan, Isa isa) {
  Status status = validate_shape(op);
  if (status.ok()) status = check_supported(op);
  if (status.ok()) status = resolve(isa, &plan->isa);
  if (!status.ok()) return status;
  plan->threads = clamp_threads(threads);
  plan->workspace_bytes = workspace_bytes(op, plan->threads);
  switch (op.coder) {
    case SaeCoder::kTopK:
      plan->variant = "encode, exact top-k, edit";
      plan->reason = "every latent competes for the k places";
      break;
    case SaeCoder::kRelu:
    case SaeCoder::kJumpRelu:
      plan->variant = "encode watched latents, edit";
      plan->reason = "latents are independent, so those that no policy edits or reports are left out";
      break;
    case SaeCoder::kNone:
      plan->variant = "add the shift";
      plan->reason = "coder none has no code";
      break;
  }
  return status;
}

Status plan(const SteerPursuit& op, int threads, Plan* plan, Isa isa) {
  Status status = validate_shape(op);
  if (status.ok()) status = check_supported(op);
  if (status.ok()) status = resolve(isa, &plan->isa);
  if (!status.ok()) return status;
  plan->threads = clamp_threads(threads);
  plan->workspace_bytes = workspace_bytes(op, plan->threads);
  if (op.coder == PursuitCoder::kElasticNet) {
    plan->variant = op.gram == nullptr ? "working set by residuals" : "working set by Gram rows";
    plan->reason = op.gram == nullptr ? "without a Gram matrix each round reads the analysis matrix again"
                                      : "the Gram matrix replaces all but one read of the analysis matrix";
  } else if (op.gram == nullptr) {
    plan->variant = "pursuit by residuals";
    plan->reason = "without a Gram matrix each step reads the analysis matrix again";
  } else if (op.gram_dtype == DType::kF32) {
    plan->variant = "Batch-OMP";
    plan->reason = "the Gram matrix replaces all but one read of the analysis matrix";
  } else {
    plan->variant = "Batch-OMP, coefficients from dot products";
    plan->reason = "an fp16 Gram matrix chooses atoms but is too coarse for their coefficients";
  }
  return status;
}

}  // namespace cpu
}  // namespace daco
