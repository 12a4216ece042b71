// SteerPursuit on a GPU: correlations, pursuit, edit, a bounded number of rows at a time.
#include <algorithm>

#include "core/validate.h"
#include "cuda/encode.h"
#include "cuda/gemm.h"
#include "cuda/pursuit_launch.h"

namespace daco::cuda {
namespace {

int64_t atoms_of(const Rows& rows) { return rows.atoms; }

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

Dictionary dictionary_of(const SteerPursuit& op) {
  Dictionary d{};
  d.analysis = op.analysis;
  d.atoms = op.atoms;
  d.scales = op.scales;
  d.weight = op.weight;
  d.dim = op.dim;
  d.size = atoms_of(op);
  // Whole packs of any type, so that a segment's rows begin where a load of 16 bytes may.
  d.segment = ((op.dim + kSegments - 1) / kSegments + 15) / 16 * 16;
  d.vectors = op.dim * static_cast<int64_t>(size_of(op.weight)) % 16 == 0 && aligned(op.analysis) &&
              aligned(op.atoms);
  d.same_matrix = op.analysis == op.atoms;
  return d;
}

// Rows [first, first + count) of a call as a call of their own.
Rows part_of(const Rows& op, int64_t first, int64_t count) {
  const auto size = static_cast<int64_t>(size_of(op.activation));
  Rows part = op;
  part.rows = count;
  part.z = static_cast<const char*>(op.z) + first * op.z_stride * size;
  part.out = static_cast<char*>(op.out) + first * op.out_stride * size;
  part.slots = op.slots + first;
  part.doses = op.doses + first * 2;
  if (op.k_out > 0) {
    part.support_index = op.support_index + first * op.k_out;
    part.support_value = op.support_value + first * op.k_out;
  }
  return part;
}

struct Call {
  const SteerPursuit& op;
  const Device& device;
  const PursuitLayout& layout;
  const PursuitBuffers& buffers;
  Stream stream;
};

// out = E x + b for rows x. `bias` says what is still to be added: the library adds none.
Status correlate(const Call& call, const Rows& part, const void* x, DType type, int64_t x_stride, float* out,
                 const float** bias) {
  const SteerPursuit& op = call.op;
  const int64_t m = atoms_of(op);
  *bias = nullptr;
  if (part.rows > kMmaManyRows && library_serves(type, op.weight)) {
    const Product p{x, x_stride, type, op.analysis, op.weight, part.rows, m, op.dim, out, padded_atoms(m)};
    if (library_product(p, call.device.index, call.buffers.scratch, call.stream)) {
      *bias = op.bias;
      return {};
    }
  }
  Encode encode;
  encode.z = x;
  encode.z_stride = x_stride;
  encode.activation = type;
  encode.slots = part.slots;
  encode.policies = part.policies;
  encode.rows = part.rows;
  encode.dim = op.dim;
  encode.weights = op.analysis;
  encode.weight = op.weight;
  encode.scales = op.scales;
  encode.bias = op.bias;
  encode.atoms = m;
  encode.y = out;
  encode.y_stride = padded_atoms(m);
  // One row is bound by memory on either unit, and the fp32 units start sooner.
  if (part.rows > 1 && mma_takes(type, op.weight, op.dim, x_stride) && aligned(x) && aligned(op.analysis)) {
    const MmaTiling tiling = mma_tiling(part.rows, m, op.weight, call.device);
    if (tiling.rows > 0) return launch_encode_mma(encode, tiling, call.device, call.stream);
  }
  const DotTiling tiling = dot_tiling(part.rows, op.dim, m, op.weight, false, call.device);
  return launch_encode_dot(encode, tiling, call.device, call.stream);
}

// The same for the residuals of a part's rows.
Status correlate_residuals(const Call& call, const Rows& part, float* out, const float** bias) {
  return correlate(call, part, call.buffers.residual, DType::kF32, call.op.dim, out, bias);
}

Status pursue(const Call& call, const Rows& part, const OmpArgs& args) {
  const PursuitLayout& layout = call.layout;
  const SteerPursuit& op = call.op;
  const PursuitBuffers& b = call.buffers;
  if (layout.path == PursuitPath::kResident) {
    ResidentArgs r{};
    r.gram = op.gram;
    r.vectors = atoms_of(op) % kChunk == 0 && aligned(op.gram);
    r.chunks = layout.chunks;
    r.cached = layout.cached;
    return launch_resident(args, r, op.gram_dtype, layout, part.rows, call.device, call.stream);
  }
  SteppedArgs t{};
  t.alpha = b.start;
  t.bias = args.bias;
  t.residual = b.residual;
  t.state = b.state;
  t.state_bytes = layout.state_bytes;
  t.first = true;
  Status status = launch_stepped(args, t, layout, part.rows, call.device, call.stream);
  t.alpha = b.alpha;
  t.first = false;
  for (int32_t step = 1; step < op.k && status.ok(); ++step) {
    status = correlate_residuals(call, part, b.alpha, &t.bias);
    if (status.ok()) status = launch_stepped(args, t, layout, part.rows, call.device, call.stream);
  }
  return status;
}

Status descend(const Call& call, const Rows& part, OmpArgs args) {
  const SteerPursuit& op = call.op;
  const PursuitBuffers& b = call.buffers;
  ElasticArgs t{};
  t.gram = op.gram;
  t.vectors = atoms_of(op) % kChunk == 0 && aligned(op.gram);
  t.diagonal = b.diagonal;
  t.length = b.length;
  t.l1 = op.alpha * op.tau;
  t.l2 = op.alpha * (1.f - op.tau);
  t.dense = b.dense;
  t.alpha = b.alpha;
  t.code = b.code;
  Status status;
  for (int round = 0; round < call.layout.rounds && status.ok(); ++round) {
    t.first = round == 0;
    t.last = round + 1 == call.layout.rounds;
    if (!t.first) {
      status = launch_residual(args, b.dense, b.residual, part.rows, call.device, call.stream);
      if (status.ok()) status = correlate_residuals(call, part, b.start, &args.bias);
    }
    if (status.ok()) {
      status = launch_descent(args, t, op.gram_dtype, call.layout, part.rows, call.device, call.stream);
    }
  }
  return status;
}

Status run(const Call& call) {
  const SteerPursuit& op = call.op;
  const PursuitBuffers& b = call.buffers;
  const Dictionary dictionary = dictionary_of(op);
  const bool elastic = call.layout.path == PursuitPath::kElastic;
  Status status;
  if (elastic) {
    status = launch_description(dictionary, op.gram, op.gram_dtype, b.diagonal, b.length, call.device,
                                call.stream);
  }
  for (int64_t first = 0; first < op.rows && status.ok(); first += call.layout.pass) {
    const int64_t rows = std::min(call.layout.pass, op.rows - first);
    const Rows part = part_of(op, first, rows);
    const Codes codes = carve_codes(b.codes, rows, b.capacity, op.k_out);
    OmpArgs args{};
    args.dictionary = dictionary;
    args.z = part.z;
    args.z_stride = part.z_stride;
    args.activation = part.activation;
    args.slots = part.slots;
    args.policies = static_cast<int32_t>(part.policies);
    args.k = op.k;
    args.tol = op.tol;
    args.both_signs = op.sign == PursuitSign::kSigned;
    args.start = b.start;
    args.stride = padded_atoms(atoms_of(op));
    args.count = codes.count;
    args.index = codes.index;
    args.value = codes.value;
    args.capacity = codes.capacity;
    status = correlate(call, part, part.z, part.activation, part.z_stride, b.start, &args.bias);
    if (status.ok()) status = elastic ? descend(call, part, args) : pursue(call, part, args);
    if (status.ok()) status = launch_edit(part, op.atoms, codes, call.device, call.stream);
  }
  return status;
}

}  // namespace

Status plan(const SteerPursuit& op, const Device& device, Plan* plan) {
  Status status = validate_shape(op);
  if (status.ok()) status = check_supported(op);
  if (!status.ok()) return status;
  *plan = Plan{};
  plan->device = device;
  // Enough with and without a Gram matrix: hosts plan before they have pointers.
  size_t bytes = 0;
  for (const bool has_gram : {true, false}) {
    bytes = std::max(bytes, carve(op, lay_out(op, device, has_gram, asked_cluster()), nullptr).bytes);
  }
  plan->workspace_bytes = op.rows == 0 ? 0 : bytes;
  // Opened now, because a launch may be part of a capture.
  if (device.index >= 0) library_ready(device.index);
  switch (lay_out(op, device, op.gram != nullptr, asked_cluster()).path) {
    case PursuitPath::kResident:
      plan->variant = "Batch-OMP, a cluster a row";
      plan->reason = "the Gram matrix replaces all but one read of the analysis matrix";
      break;
    case PursuitPath::kStepped:
      plan->variant = "pursuit by residuals";
      plan->reason = "without a Gram matrix each step reads the analysis matrix again";
      break;
    case PursuitPath::kElastic:
      plan->variant = "coordinate descent, a block a row";
      plan->reason = "a step reads one row of the Gram matrix";
      break;
  }
  return status;
}

Status steer(const SteerPursuit& op, const Plan& plan, void* workspace, Stream stream) {
  Status status = validate(op);
  if (status.ok()) status = check_supported(op);
  if (!status.ok() || op.rows == 0) return status;
  if (op.coder == PursuitCoder::kElasticNet && op.gram == nullptr) {
    return make_status(Code::kUnsupported,
                       "SteerPursuit: gram: the CUDA kernels need one for elastic_net; build it once with "
                       "build_gram");
  }
  const PursuitLayout layout = lay_out(op, plan.device, op.gram != nullptr, asked_cluster());
  const PursuitBuffers buffers = carve(op, layout, workspace);
  if (plan.workspace_bytes < buffers.bytes) {
    return make_status(Code::kWorkspace,
                       "SteerPursuit: workspace: this call needs %zu bytes, its plan has %zu; plan again",
                       buffers.bytes, plan.workspace_bytes);
  }
  if (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % 256 != 0) {
    return make_status(Code::kWorkspace,
                       "SteerPursuit: workspace: expected %zu bytes aligned to 256, got the pointer %p",
                       buffers.bytes, workspace);
  }
  return run(Call{op, plan.device, layout, buffers, stream});
}

}  // namespace daco::cuda
