// SteerSae and SteerAffine on a GPU: what is launched, in which order, on which rows.
#include "core/validate.h"
#include "cuda/affine.h"
#include "cuda/encode.h"
#include "cuda/gemm.h"
#include "cuda/sae_plan.h"
#include "cuda/select.h"

namespace daco::cuda {
namespace {

constexpr char kSae[] = "SteerSae";
constexpr char kAffine[] = "SteerAffine";

Status check_width(const char* name, const Rows& op, const Device& device) {
  // One row is the most that the widest cluster has to hold, and more rows never need more.
  if (edit_fits(edit_tiling(op.rows, op.dim, device), device)) return {};
  return make_status(Code::kUnsupported,
                     "%s: z: a row of d=%lld does not fit into the shared memory of this device", name,
                     static_cast<long long>(op.dim));
}

Status check_workspace(const char* name, const Plan& plan, size_t needed, const void* workspace) {
  if (plan.workspace_bytes < needed) {
    return make_status(Code::kWorkspace,
                       "%s: workspace: this call needs %zu bytes, its plan has %zu; plan again", name, needed,
                       plan.workspace_bytes);
  }
  if (needed > 0 && (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % 256 != 0)) {
    return make_status(Code::kWorkspace, "%s: workspace: expected %zu bytes aligned to 256, got the pointer %p",
                       name, needed, workspace);
  }
  return {};
}

Encode encode_of(const SteerSae& op, const SaeLayout& layout, float* y) {
  Encode e;
  e.z = op.z;
  e.z_stride = op.z_stride;
  e.activation = op.activation;
  e.slots = op.slots;
  e.policies = op.policies;
  e.rows = op.rows;
  e.dim = op.dim;
  e.weights = op.enc;
  e.weight = op.weight;
  e.scales = op.scales;
  e.bias = op.enc_bias;
  e.atoms = op.atoms;
  e.y = y;
  e.y_stride = layout.y_stride;
  e.watched = layout.path == SaePath::kWatched;
  e.gain = op.gain;
  e.boost = op.boost;
  e.undesirable = op.undesirable;
  e.threshold = op.coder == SaeCoder::kJumpRelu ? op.threshold : nullptr;
  return e;
}

// The library's product lacks the bias; *bias is then what selection has to add.
Status encode(const SteerSae& op, const SaeLayout& layout, const SaeBuffers& buffers, const Device& device,
              Stream stream, const float** bias) {
  *bias = nullptr;
  if (layout.path == SaePath::kLibrary && op.rows >= kLibraryRows) {
    Product p;
    p.x = op.z;
    p.x_stride = op.z_stride;
    p.x_type = op.activation;
    p.w = op.enc;
    p.w_type = op.weight;
    p.rows = op.rows;
    p.m = op.atoms;
    p.d = op.dim;
    p.out = buffers.y;
    if (library_product(p, device.index, buffers.scratch, stream)) {
      *bias = op.enc_bias;
      return {};
    }
  }
  const Encode call = encode_of(op, layout, buffers.y);
  const bool aligned =
      reinterpret_cast<uintptr_t>(op.z) % 16 == 0 && reinterpret_cast<uintptr_t>(op.enc) % 16 == 0;
  const int64_t stride = op.rows > 1 ? op.z_stride : 8;
  if (!call.watched && aligned && mma_takes(op.activation, op.weight, op.dim, stride)) {
    const MmaTiling tiling = mma_tiling(op.rows, op.atoms, op.weight, device);
    if (tiling.rows > 0) return launch_encode_mma(call, tiling, device, stream);
  }
  return launch_encode_dot(call, dot_tiling(op.rows, op.dim, op.atoms, op.weight, call.watched, device), device,
                           stream);
}

}  // namespace

Status plan(const SteerSae& op, const Device& device, Plan* plan) {
  Status status = validate_shape(op);
  if (status.ok()) status = check_width(kSae, op, device);
  if (!status.ok()) return status;
  *plan = Plan{};
  plan->device = device;
  // Opened now, because a launch may be part of a capture.
  const bool many = op.coder == SaeCoder::kTopK && op.rows >= kLibraryRows;
  const SaeLayout layout = lay_out(op, device, many && device.index >= 0 && library_ready(device.index));
  plan->workspace_bytes = carve(op, layout, nullptr).bytes;
  switch (layout.path) {
    case SaePath::kEdit:
      plan->variant = "add the shift";
      plan->reason = "coder none has no code";
      break;
    case SaePath::kTensor:
      plan->variant = "encode on the tensor cores, exact top-k, edit";
      plan->reason = "16-bit rows and weights of at most 16 bits stream through shared memory once";
      break;
    case SaePath::kVector:
      plan->variant = "encode in fp32 arithmetic, exact top-k, edit";
      plan->reason = "these types, or this width, have no exact products on the tensor cores";
      break;
    case SaePath::kLibrary:
      plan->variant = "encode by the matrix library, exact top-k, edit";
      plan->reason = "many rows are bound by arithmetic";
      break;
    case SaePath::kWatched:
      plan->variant = "encode watched latents, edit";
      plan->reason = "latents are independent, so those that no policy edits or reports are left out";
      break;
  }
  return status;
}

Status plan(const SteerAffine& op, const Device& device, Plan* plan) {
  Status status = validate_shape(op);
  if (status.ok()) status = check_width(kAffine, op, device);
  if (!status.ok()) return status;
  *plan = Plan{};
  plan->device = device;
  plan->variant = "two products a row";
  plan->reason = "an affine edit has no code";
  return status;
}

Status steer(const SteerSae& op, const Plan& plan, void* workspace, Stream stream) {
  Status status = validate(op);
  if (status.ok()) status = check_width(kSae, op, plan.device);
  if (!status.ok() || op.rows == 0) return status;
  const bool many = op.coder == SaeCoder::kTopK && op.rows >= kLibraryRows;
  const SaeLayout layout =
      lay_out(op, plan.device, many && plan.device.index >= 0 && library_ready(plan.device.index));
  const SaeBuffers buffers = carve(op, layout, workspace);
  status = check_workspace(kSae, plan, buffers.bytes, workspace);
  if (!status.ok()) return status;
  if (layout.path == SaePath::kEdit) return launch_edit(op, op.dec, Codes{}, plan.device, stream);
  for (int64_t first = 0; first < op.rows && status.ok(); first += layout.window) {
    const SteerSae part = part_of_call(op, first, std::min(layout.window, op.rows - first));
    const Codes codes = carve_codes(buffers.codes, part.rows, layout.capacity, op.k_out);
    Select select;
    select.y = buffers.y;
    select.y_stride = layout.y_stride;
    select.rows = part.rows;
    select.atoms = op.atoms;
    select.k = op.coder == SaeCoder::kTopK ? op.k : 0;
    select.slots = part.slots;
    select.policies = op.policies;
    select.codes = codes;
    status = encode(part, layout, buffers, plan.device, stream, &select.bias);
    if (status.ok()) status = launch_select(select, plan.device, stream);
    if (status.ok()) status = launch_edit(part, op.dec, codes, plan.device, stream);
  }
  return status;
}

Status steer(const SteerAffine& op, const Plan& plan, void*, Stream stream) {
  Status status = validate(op);
  if (status.ok()) status = check_width(kAffine, op, plan.device);
  if (!status.ok() || op.rows == 0) return status;
  return launch_affine(op, plan.device, stream);
}

}  // namespace daco::cuda
