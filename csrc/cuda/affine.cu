// Affine edits of low rank, one cluster of blocks a row: each block measures its columns, the cluster adds up the
// r measurements, and each block writes its columns. A policy's matrices are small and stay in the L2 cache.
#include "cuda/affine.h"

#include "cuda/finish.cuh"

namespace daco::cuda {
namespace {

constexpr int kRank = 128;  // measurements taken together
constexpr int kWarps = kEditThreads / 32;

struct Call {
  SteerAffine op;
  EditTiling tiling;
};

struct Shared {
  float inner[kRank];
  Exchange<kRank + 4> exchange;
};

__device__ float apply(const SteerAffine& op, float v) {
  if (op.phi == AffinePhi::kRelu) return v > 0.f ? v : 0.f;
  if (op.phi == AffinePhi::kClamp) {
    // As std::min(std::max(v, low), high) on the CPU, NaN included.
    const float raised = v < op.low ? op.low : v;
    return op.high < raised ? op.high : raised;
  }
  return v;
}

template <DType W>
__global__ void __launch_bounds__(kEditThreads, 4) affine(const Call p) {
  extern __shared__ float dynamic[];
  __shared__ Shared s;
  const SteerAffine& op = p.op;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int blocks = p.tiling.blocks;
  float* x = dynamic;                       // [slice]
  float* delta = dynamic + p.tiling.slice;  // [slice]
  const Slice row(op, p.tiling);
  const int32_t slot = op.slots[row.t];
  if (row.settle(op, slot)) return;
  const bool edits = slot >= kFirstPolicy;
  const float* shift = op.shift + slot * op.dim + row.first;
  Look look = row.load(op, edits ? shift : nullptr, x, s.exchange.warp);
  wait_for_previous();
  for (int i = tid; i < row.width; i += kEditThreads) delta[i] = edits ? shift[i] : 0.f;

  const auto size = static_cast<int64_t>(size_of(W));
  const int64_t r = op.atoms;
  const char* a = static_cast<const char*>(op.a) + (slot * r * op.dim + row.first) * size;
  const char* b = static_cast<const char*>(op.b) + (slot * op.dim + row.first) * r * size;
  int turn = 0;
  double norm = 0;
  bool moves = false;
  for (int64_t base = 0; base == 0 || (edits && base < r); base += kRank) {
    const int count = edits ? static_cast<int>(r - base < kRank ? r - base : kRank) : 0;
    double* mine = s.exchange.begin(turn);
    for (int j = warp; j < count; j += kWarps) {
      const char* measured = a + (base + j) * op.dim * size;
      float sum = 0.f;
#pragma unroll 4
      for (int i = lane; i < row.width; i += 32) sum = fmaf(element<W>(measured, i), x[i], sum);
      sum = warp_sum(sum);
      if (lane == 0) mine[j] = sum;
    }
    if (tid == 0) {
      mine[kRank] = look.square;
      mine[kRank + 1] = look.broken;
      mine[kRank + 2] = look.shifts;
    }
    s.exchange.publish();
    if (base == 0) {
      norm = sqrt(s.exchange.total(turn, kRank, blocks));
      look.broken = s.exchange.total(turn, kRank + 1, blocks) != 0;
      look.shifts = s.exchange.total(turn, kRank + 2, blocks) != 0;
    }
    if (look.broken || !edits) break;
    float inner = 0.f;
    if (tid < count) {
      inner = apply(op, static_cast<float>(s.exchange.total(turn, tid, blocks)) +
                            op.a_bias[slot * r + base + tid]);
      s.inner[tid] = inner;
    }
    moves |= __syncthreads_or(inner != 0.f) != 0;
    for (int i = tid; i < row.width; i += kEditThreads) {
      const char* added = b + (i * r + base) * size;
      float sum = delta[i];
#pragma unroll 4
      for (int j = 0; j < count; ++j) sum = fmaf(element<W>(added, j), s.inner[j], sum);
      delta[i] = sum;
    }
    __syncthreads();  // the measurements have been used
    ++turn;
  }

  double moved = 0;
  if (look.broken || !edits || !(moves || look.shifts)) {
    row.copy(op);
  } else {
    double square = 0;
    for (int i = tid; i < row.width; i += kEditThreads) {
      square = fma(static_cast<double>(delta[i]), static_cast<double>(delta[i]), square);
    }
    const float* limits = op.limits + static_cast<int64_t>(slot) * kLimits;
    moved = finish_row(op, row, blocks, x, delta, square, norm, limits, s.exchange, turn);
  }
  if (row.rank == 0) report_doses(op, row.t, look.broken, norm, 0, moved);
  cluster_barrier();  // a block's shared memory must outlive its partners' reads
}

}  // namespace

Status launch_affine(const SteerAffine& op, const Device& device, Stream stream) {
  Call call;
  call.op = op;
  call.tiling = edit_tiling(op.rows, op.dim, device);
  Launch how;
  how.what = "affine";
  how.grid = dim3(static_cast<unsigned>(op.rows * call.tiling.blocks));
  how.threads = kEditThreads;
  how.shared = static_cast<size_t>(2 * call.tiling.slice) * sizeof(float);
  how.cluster = call.tiling.blocks;
  switch (op.weight) {
    case DType::kF32: return launch(how, device, stream, affine<DType::kF32>, call);
    case DType::kF16: return launch(how, device, stream, affine<DType::kF16>, call);
    default: return launch(how, device, stream, affine<DType::kBF16>, call);
  }
}

}  // namespace daco::cuda
