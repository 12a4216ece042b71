// The edit: a cluster of blocks a row, each with a slice of the columns. Codes come in batches. For a batch the
// blocks read their slice of the atoms that matter, take partial norms, agree on whole ones, and add what
// passes the deadband. Then they agree on |delta|, |z'| and |z' - z| as far as the policy asks for them.
// Sums of squares are taken in fp64 because rows and atoms may reach 1e38, whose squares fp32 cannot hold.
#include <cmath>

#include "cuda/cluster.cuh"
#include "cuda/codes.cuh"
#include "cuda/element.cuh"
#include "cuda/finish.cuh"
#include "cuda/launch.cuh"
#include "cuda/order.h"
#include "cuda/support.cuh"
#include "cuda/tiling.h"

namespace daco::cuda {
namespace {

constexpr int kWarps = kEditThreads / 32;
constexpr int kBatch = 128;  // codes weighed together
constexpr int kAhead = 4;    // atoms that a thread reads before it uses the first

struct Call {
  Rows op;
  const void* atoms = nullptr;
  Codes codes;
  EditTiling tiling;
  bool vectors = false;  // 8 columns of every atom can be read as whole words
  bool overlap = false;  // an earlier kernel of the call made the codes
};

// What is left of a batch: the codes whose atoms must be read.
struct Batch {
  int32_t atom[kBatch];
  int32_t place[kBatch];  // in the row's code list
  float code[kBatch];
  float amount[kBatch];  // of the atom in the edit, scale included
  uint8_t undesirable[kBatch];
  int32_t warp_count[kBatch / 32];
  int32_t count;
};

struct Shared {
  Batch batch;
  double square[kBatch][kWarps];  // partial sums of squares, one column a warp
  Exchange<kBatch + 4> exchange;
};

// Eight columns of an atom; beyond the row's end 0.
template <DType W>
__device__ __forceinline__ void load_atom(const char* atom, int64_t i, int64_t d, bool vectors,
                                          float (&x)[kEditVector]) {
  if (!vectors || i + kEditVector > d) {
#pragma unroll
    for (int e = 0; e < kEditVector; ++e) x[e] = i + e < d ? element<W>(atom, i + e) : 0.f;
  } else if constexpr (W == DType::kF32) {
    const float4 a = __ldg(reinterpret_cast<const float4*>(atom) + i / 4);
    const float4 b = __ldg(reinterpret_cast<const float4*>(atom) + i / 4 + 1);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  } else if constexpr (size_of(W) == 2) {
    decode<W>(__ldg(reinterpret_cast<const uint4*>(atom) + i / 8), x);
  } else {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(atom) + i / 8);
    float both[kPiece<W>];
    decode<W>(make_uint4(v.x, v.y, 0, 0), both);
#pragma unroll
    for (int e = 0; e < kEditVector; ++e) x[e] = both[e];
  }
}

// Picks from the batch at `base` the codes whose atom must be read, in order: because of its strength, or
// because it is edited.
__device__ void gather(const Call& p, int64_t t, int32_t slot, int32_t base, int32_t codes, Batch& batch) {
  const Rows& op = p.op;
  const int tid = static_cast<int>(threadIdx.x);
  bool wanted = false, undesirable = false;
  float code = 0, amount = 0;
  int32_t atom = 0;
  if (tid < kBatch && base + tid < codes) {
    const int64_t at = t * p.codes.capacity + base + tid;
    atom = p.codes.index[at];
    code = p.codes.value[at];
    // Lists of rows that are not finite may hold anything: their atoms are never used, but they are read.
    if (code != 0.f && atom >= 0 && atom < op.atoms) {
      const int64_t entry = slot * op.atoms + atom;
      undesirable = op.undesirable[entry] != 0;
      if (slot >= kFirstPolicy) {
        amount = (op.gain[entry] - 1.f) * code + (op.boost != nullptr ? op.boost[entry] : 0.f);
        if (op.scales != nullptr) amount *= op.scales[op.atoms + atom];
      }
      wanted = undesirable || amount != 0.f || op.k_out > 0;
    }
    if (op.k_out > 0 && !wanted) p.codes.strength[at] = -1.f;
  }
  const unsigned votes = __ballot_sync(kAllLanes, wanted);
  const int warp = tid / 32, lane = tid % 32;
  __syncthreads();  // the batch before has been used
  if (tid < kBatch && lane == 0) batch.warp_count[warp] = __popc(votes);
  __syncthreads();
  int place = __popc(votes & ((1u << lane) - 1)), count = 0;
#pragma unroll
  for (int w = 0; w < kBatch / 32; ++w) {
    if (w < warp) place += batch.warp_count[w];
    count += batch.warp_count[w];
  }
  if (wanted) {
    batch.atom[place] = atom;
    batch.place[place] = base + tid;
    batch.code[place] = code;
    batch.amount[place] = amount;
    batch.undesirable[place] = undesirable;
  }
  if (tid == 0) batch.count = count;
  __syncthreads();
}

// Reads this block's slice of the batch's atoms. kSquares: partial sums of squares. kAdd: delta += amount * atom;
// each group of lanes adds its own atoms, into its own copy of the slice.
template <DType W, bool kSquares, bool kAdd>
__device__ void read_atoms(const Call& p, int64_t first, Shared& s, float* parts) {
  const Rows& op = p.op;
  const EditTiling& tiling = p.tiling;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int groups = kEditThreads / tiling.lanes, group = tid / tiling.lanes;
  const int count = s.batch.count;
  const int64_t vectors = tiling.slice / kEditVector;
  const int64_t row_bytes = op.dim * static_cast<int64_t>(size_of(W));
  float* part = parts + group * tiling.slice;
  // The loop runs in whole warps, for the sums over a warp.
  for (int64_t v0 = tid % tiling.lanes - lane; v0 < vectors; v0 += tiling.lanes) {
    const int64_t column = (v0 + lane) * kEditVector;
    const bool inside = v0 + lane < vectors;
    float sum[kEditVector] = {};
    for (int j0 = group; j0 < count; j0 += kAhead * groups) {
      float x[kAhead][kEditVector];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int j = j0 + a * groups;
        if (inside && j < count && (kSquares || s.batch.amount[j] != 0.f)) {
          load_atom<W>(static_cast<const char*>(p.atoms) + s.batch.atom[j] * row_bytes, first + column, op.dim,
                       p.vectors, x[a]);
        } else {
#pragma unroll
          for (int e = 0; e < kEditVector; ++e) x[a][e] = 0.f;
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int j = j0 + a * groups;
        if (kSquares) {
          const double square = warp_sum(sum_squares(x[a]));
          if (lane == 0 && j < count) s.square[j][warp] += square;
        }
        if (kAdd && j < count) {
          const float amount = s.batch.amount[j];
#pragma unroll
          for (int e = 0; e < kEditVector; ++e) sum[e] = fmaf(amount, x[a][e], sum[e]);
        }
      }
    }
    if (kAdd && inside) {
#pragma unroll
      for (int e = 0; e < kEditVector; ++e) part[column + e] += sum[e];
    }
  }
}

template <DType W>
__global__ void __launch_bounds__(kEditThreads, 2) edit(const Call p) {
  extern __shared__ float dynamic[];
  __shared__ Shared s;
  const Rows& op = p.op;
  const EditTiling& tiling = p.tiling;
  const int tid = static_cast<int>(threadIdx.x), blocks = tiling.blocks;
  float* x = dynamic;                     // [slice] this row of z
  float* parts = dynamic + tiling.slice;  // [groups, slice] delta, one part a group of lanes
  const Slice row(op, tiling);
  const int64_t t = row.t, first = row.first;
  const int rank = row.rank;
  const int32_t slot = op.slots[t];
  // The whole cluster leaves here or nobody.
  if (row.settle(op, slot)) return;

  // Up to the wait only operands of the call are read, nothing that an earlier kernel wrote.
  const float* limits = op.limits + static_cast<int64_t>(slot) * kLimits;
  const float* shift = op.shift + slot * op.dim + first;
  const bool edits = slot >= kFirstPolicy;
  const double theta = limits[kDeadband];
  const bool gates = !(theta <= 0);
  const int groups = kEditThreads / tiling.lanes;
  for (int64_t i = tid; i < groups * tiling.slice; i += kEditThreads) parts[i] = 0.f;
  const Look look = row.load(op, edits ? shift : nullptr, x, s.exchange.warp);
  double square = look.square;
  bool broken = look.broken, shifts = look.shifts;
  wait_for_previous();
  let_next_start();
  int32_t codes = p.codes.count != nullptr ? p.codes.count[t] : 0;
  if (codes > p.codes.capacity) codes = static_cast<int32_t>(p.codes.capacity);

  int turn = 0;
  double norm = 0, removed = 0;
  bool changes = false;
  int32_t base = 0;
  do {
    gather(p, t, slot, base, codes, s.batch);
    const int count = s.batch.count;
    for (int i = tid; i < count * kWarps; i += kEditThreads) s.square[i / kWarps][i % kWarps] = 0;
    __syncthreads();
    if (edits && !gates) {
      read_atoms<W, true, true>(p, first, s, parts);
    } else {
      read_atoms<W, true, false>(p, first, s, parts);
    }
    __syncthreads();
    double* mine = s.exchange.begin(turn);
    if (tid < count) {
      double sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += s.square[tid][w];
      mine[tid] = sum;
    }
    if (tid == 0) {
      mine[kBatch] = square;
      mine[kBatch + 1] = broken;
      mine[kBatch + 2] = shifts;
    }
    s.exchange.publish();
    if (base == 0) {
      norm = sqrt(s.exchange.total(turn, kBatch, blocks));
      broken = s.exchange.total(turn, kBatch + 1, blocks) != 0;
      shifts = s.exchange.total(turn, kBatch + 2, blocks) != 0;
      if (broken) break;
    }
    double removes = 0;
    bool moves = false;
    if (tid < count) {
      const double scale = op.scales != nullptr ? fabsf(op.scales[op.atoms + s.batch.atom[tid]]) : 1.f;
      const double strength =
          fabs(static_cast<double>(s.batch.code[tid])) * scale * sqrt(s.exchange.total(turn, tid, blocks));
      if (s.batch.undesirable[tid]) removes = strength;
      if (gates && !(strength > theta)) s.batch.amount[tid] = 0.f;
      moves = s.batch.amount[tid] != 0.f;
      if (rank == 0 && op.k_out > 0) {
        p.codes.strength[t * p.codes.capacity + s.batch.place[tid]] = static_cast<float>(strength);
      }
    }
    removed += block_sum(removes, s.exchange.warp);
    changes |= __syncthreads_or(moves) != 0;
    if (edits && gates) read_atoms<W, false, true>(p, first, s, parts);
    ++turn;
    base += kBatch;
  } while (base < codes);

  double moved = 0;
  if (broken || !edits || !(changes || shifts)) {
    row.copy(op);
  } else {
    __syncthreads();
    float* delta = parts;
    square = 0;
    for (int i = tid; i < row.width; i += kEditThreads) {
      float v = shift[i];
      for (int g = 0; g < groups; ++g) v += parts[g * tiling.slice + i];
      delta[i] = v;
      square = fma(static_cast<double>(v), static_cast<double>(v), square);
    }
    moved = finish_row(op, row, blocks, x, delta, square, norm, limits, s.exchange, turn);
  }
  if (rank == 0) {
    report_doses(op, t, broken, norm, removed, moved);
    if (!broken) report_support(op, p.codes, t, codes);
  }
  cluster_barrier();  // a block's shared memory must outlive its partners' reads
}

}  // namespace

Status launch_edit(const Rows& op, const void* atoms, const Codes& codes, const Device& device,
                   Stream stream) {
  if (op.rows == 0) return {};
  Call call;
  call.op = op;
  call.atoms = atoms;
  call.codes = codes;
  call.tiling = edit_tiling(op.rows, op.dim, device);
  const auto row_bytes = op.dim * static_cast<int64_t>(size_of(op.weight));
  const size_t word = std::min<size_t>(16, kEditVector * size_of(op.weight));
  call.vectors = reinterpret_cast<uintptr_t>(atoms) % word == 0 && row_bytes % static_cast<int64_t>(word) == 0;
  Launch how;
  how.what = "edit";
  how.grid = dim3(static_cast<unsigned>(op.rows * call.tiling.blocks));
  how.threads = kEditThreads;
  how.shared = call.tiling.shared;
  how.cluster = call.tiling.blocks;
  how.overlap = codes.count != nullptr;
  switch (op.weight) {
    case DType::kF32: return launch(how, device, stream, edit<DType::kF32>, call);
    case DType::kF16: return launch(how, device, stream, edit<DType::kF16>, call);
    case DType::kBF16: return launch(how, device, stream, edit<DType::kBF16>, call);
    case DType::kI8: return launch(how, device, stream, edit<DType::kI8>, call);
    case DType::kF8E4M3: return launch(how, device, stream, edit<DType::kF8E4M3>, call);
  }
  return make_status(Code::kUnsupported, "edit: unknown weight type %d", static_cast<int>(op.weight));
}

}  // namespace daco::cuda
