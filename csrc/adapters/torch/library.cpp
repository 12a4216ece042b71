// The torch library `daco`: schemas and kernels for CPU and CUDA, on the LibTorch stable ABI, so that one
// binary serves every torch from 2.11 on. Shapes for tracing (fake tensors) live in daco_rt/ops/torch_ops.py.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "adapters/torch/gpu.h"
#include "adapters/torch/tensors.h"

namespace daco::adapters {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using AffineOutputs = std::tuple<Tensor, Tensor>;

Executor torch_threads() {
  Executor e;
  e.threads = static_cast<int>(torch::stable::get_num_threads());
  e.run = [](void*, int64_t tasks, void (*body)(void*, int64_t), void* arg) {
    torch::stable::parallel_for(0, tasks, 1, [body, arg](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) body(arg, t);
    });
  };
  return e;
}

// Plans and runs on the CPU. The workspace is torch's too, so its caching allocator serves it.
template <class Op>
void run_on_cpu(const Op& op, const Place& place) {
  const Executor executor = torch_threads();
  Plan plan;
  check(cpu::plan(op, executor.threads, &plan));
  // One cache line more than asked for: torch's CPU allocator promises 64 bytes only by default.
  constexpr size_t kLine = 64;
  Tensor scratch =
      make({static_cast<int64_t>(plan.workspace_bytes + kLine)}, aoti_torch_dtype_uint8(), place);
  const auto start = reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr());
  void* workspace = reinterpret_cast<void*>((start + kLine - 1) / kLine * kLine);
  check(cpu::steer(op, plan, plan.workspace_bytes == 0 ? nullptr : workspace, executor));
}

// Allocates the outputs and runs.
template <class Op>
Outputs run(Op& op, const Tensor& z) {
  const Place place(z);
  const auto sizes = z.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  Tensor out = make(shape, dtype_of(op.activation), place);
  shape.back() = 2;
  Tensor doses = make(shape, aoti_torch_dtype_float32(), place);
  shape.back() = op.k_out;
  Tensor index = make(shape, aoti_torch_dtype_int32(), place);
  Tensor value = make(shape, aoti_torch_dtype_float32(), place);
  op.out = out.mutable_data_ptr();
  op.doses = static_cast<float*>(doses.mutable_data_ptr());
  if (op.k_out > 0) {
    op.support_index = static_cast<int32_t*>(index.mutable_data_ptr());
    op.support_value = static_cast<float*>(value.mutable_data_ptr());
  }
  if (op.rows > 0) place.gpu ? run_on_gpu(op, place) : run_on_cpu(op, place);
  return {out, doses, index, value};
}

// A kernel that reads another device's pointer would end the process's use of its GPU. Tensors without
// elements stand for absent operands and may lie anywhere.
template <size_t N>
void check_place(const std::array<Tensor, N>& tensors) {
  const Place place(tensors[0]);
  for (size_t i = 1; i < N; ++i) {
    if (tensors[i].numel() > 0 && !(Place(tensors[i]) == place))
      check(
          make_status(Code::kInvalidArgument,
                      "daco: all tensors must be on one device, but operand %d is on another than the first",
                      static_cast<int>(i)));
  }
}

template <class Op, size_t N>
Outputs steer(Op& op, std::array<Tensor, N>& tensors) {
  check_place(tensors);
  const int64_t stride = row_stride(tensors[0]);
  if (stride == 0) tensors[0] = packed(tensors[0]);
  for (size_t i = 1; i < N; ++i) tensors[i] = packed(tensors[i]);
  Operand operands[N];
  for (size_t i = 0; i < N; ++i) operands[i] = describe(tensors[i]);
  check(bind(operands, &op));
  if (stride != 0) op.z_stride = stride;
  return run(op, tensors[0]);
}

Outputs steer_sae(const Tensor& z, const Tensor& slots, const Tensor& enc, const Tensor& enc_bias,
                  const Tensor& dec, const Tensor& threshold, const Tensor& gain, const Tensor& boost,
                  const Tensor& undesirable, const Tensor& shift, const Tensor& limits, const Tensor& scales,
                  StringHandle coder, int64_t k, int64_t k_out) {
  const Text coder_text(coder);
  const char* name = "steer_sae";
  SteerSae op;
  check(parse_attribute(name, coder_text.c_str(), &op.coder));
  check(check_count(name, "k", k, op.coder == SaeCoder::kTopK ? 1 : 0, &op.k));
  check(check_count(name, "k_out", k_out, 0, &op.k_out));
  std::array<Tensor, kSaeInputs> tensors = {z,    slots, enc,         enc_bias, dec,    threshold,
                                            gain, boost, undesirable, shift,    limits, scales};
  return steer(op, tensors);
}

Outputs steer_pursuit(const Tensor& z, const Tensor& slots, const Tensor& analysis, const Tensor& bias,
                      const Tensor& gram, const Tensor& atoms, const Tensor& gain, const Tensor& boost,
                      const Tensor& undesirable, const Tensor& shift, const Tensor& limits,
                      const Tensor& scales, StringHandle coder, int64_t k, StringHandle sign, double tol,
                      double tau, double alpha, int64_t k_out) {
  const Text coder_text(coder), sign_text(sign);
  const char* name = "steer_pursuit";
  SteerPursuit op;
  check(parse_attribute(name, coder_text.c_str(), &op.coder));
  check(parse_attribute(name, sign_text.c_str(), &op.sign));
  check(check_count(name, "k", k, op.coder == PursuitCoder::kOmp ? 1 : 0, &op.k));
  check(check_count(name, "k_out", k_out, 0, &op.k_out));
  op.tol = static_cast<float>(tol);
  op.tau = static_cast<float>(tau);
  op.alpha = static_cast<float>(alpha);
  std::array<Tensor, kPursuitInputs> tensors = {z,    slots, analysis,    bias,  gram,   atoms,
                                                gain, boost, undesirable, shift, limits, scales};
  return steer(op, tensors);
}

AffineOutputs steer_affine(const Tensor& z, const Tensor& slots, const Tensor& a, const Tensor& a_bias,
                           const Tensor& b, const Tensor& shift, const Tensor& limits, StringHandle phi,
                           double low, double high) {
  const Text phi_text(phi);
  SteerAffine op;
  check(parse_attribute("steer_affine", phi_text.c_str(), &op.phi));
  op.low = static_cast<float>(low);
  op.high = static_cast<float>(high);
  std::array<Tensor, kAffineInputs> tensors = {z, slots, a, a_bias, b, shift, limits};
  const Outputs all = steer(op, tensors);
  return {std::get<0>(all), std::get<1>(all)};
}

Tensor build_gram(const Tensor& analysis, const Tensor& atoms, const Tensor& scales, ScalarType dtype) {
  if (dtype != ScalarType::Float && dtype != ScalarType::Half)
    check(make_status(Code::kInvalidArgument, "build_gram: dtype must be float32 or float16, got %s",
                      name_of(dtype)));
  const DType stored = dtype == ScalarType::Float ? DType::kF32 : DType::kF16;
  check_place(std::array<Tensor, 3>{analysis, atoms, scales});
  const Tensor e = packed(analysis), a = packed(atoms), s = packed(scales);
  GramOperands from;
  check(bind_gram(describe(e), describe(a), describe(s), &from));
  const Place place(e);
  Tensor gram = make({from.m, from.m}, dtype_of(stored), place);
  if (place.gpu) {
    build_gram_on_gpu(from, gram.mutable_data_ptr(), stored, place);
  } else {
    check(cpu::build_gram(from.analysis, from.atoms, from.weight, from.scales, from.m, from.d,
                          gram.mutable_data_ptr(), stored, torch_threads()));
  }
  return gram;
}

}  // namespace
}  // namespace daco::adapters

STABLE_TORCH_LIBRARY(daco, m) {
  m.def(
      "steer_sae(Tensor z, Tensor slots, Tensor enc, Tensor enc_bias, Tensor dec, Tensor threshold, "
      "Tensor gain, Tensor boost, Tensor undesirable, Tensor shift, Tensor limits, Tensor scales, *, "
      "str coder, int k, int k_out) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "steer_pursuit(Tensor z, Tensor slots, Tensor analysis, Tensor bias, Tensor gram, Tensor atoms, "
      "Tensor gain, Tensor boost, Tensor undesirable, Tensor shift, Tensor limits, Tensor scales, *, "
      "str coder, int k, str sign, float tol, float tau, float alpha, int k_out) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "steer_affine(Tensor z, Tensor slots, Tensor a, Tensor a_bias, Tensor b, Tensor shift, Tensor limits, "
      "*, "
      "str phi, float low, float high) -> (Tensor, Tensor)");
  m.def("build_gram(Tensor analysis, Tensor atoms, Tensor scales, *, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(daco, CPU, m) {
  m.impl("steer_sae", TORCH_BOX(&daco::adapters::steer_sae));
  m.impl("steer_pursuit", TORCH_BOX(&daco::adapters::steer_pursuit));
  m.impl("steer_affine", TORCH_BOX(&daco::adapters::steer_affine));
  m.impl("build_gram", TORCH_BOX(&daco::adapters::build_gram));
}

#if defined(DACO_RT_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(daco, CUDA, m) {
  m.impl("steer_sae", TORCH_BOX(&daco::adapters::steer_sae));
  m.impl("steer_pursuit", TORCH_BOX(&daco::adapters::steer_pursuit));
  m.impl("steer_affine", TORCH_BOX(&daco::adapters::steer_affine));
  m.impl("build_gram", TORCH_BOX(&daco::adapters::build_gram));
}
#endif
