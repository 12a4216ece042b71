// What every edit of a row begins and ends with: its share of the columns, its norm, rows that need nothing, the
// dose cap, norm keeping, rounding and doses.
#pragma once

#include "core/steer.h"
#include "cuda/cluster.cuh"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/support.cuh"
#include "cuda/tiling.h"

namespace daco::cuda {

constexpr float kNaN = __builtin_nanf("");

// What a block's columns say of the row; the cluster adds these up.
struct Look {
  double square = 0;
  bool broken = false;  // NaN or Inf among them
  bool shifts = false;  // some shift among them is not 0
};

// One row of a launch of `tiling.blocks` blocks a row, and the columns of it that are this block's.
struct Slice {
  int64_t t, first;
  int rank, width;
  const char* z;
  char* out;

  __device__ Slice(const Rows& op, const EditTiling& tiling)
      : t(blockIdx.x / tiling.blocks), rank(static_cast<int>(blockIdx.x % tiling.blocks)) {
    first = rank * tiling.slice < op.dim ? rank * tiling.slice : op.dim;
    width = static_cast<int>(op.dim - first < tiling.slice ? op.dim - first : tiling.slice);
    z = row_of(op.z, t, op.z_stride, op.activation) + first * static_cast<int64_t>(size_of(op.activation));
    out = const_cast<char*>(row_of(op.out, t, op.out_stride, op.activation)) +
          first * static_cast<int64_t>(size_of(op.activation));
  }

  // Bit for bit.
  __device__ void copy(const Rows& op) const {
    if (z == out) return;
    for (int i = threadIdx.x; i < width; i += kEditThreads) {
      if (op.activation == DType::kF32) {
        reinterpret_cast<uint32_t*>(out)[i] = reinterpret_cast<const uint32_t*>(z)[i];
      } else {
        reinterpret_cast<uint16_t*>(out)[i] = reinterpret_cast<const uint16_t*>(z)[i];
      }
    }
  }

  // Finishes a row that is off or has no such slot, and says whether this is one.
  __device__ bool settle(const Rows& op, int32_t slot) const {
    if (coded_slot(slot, op.policies)) return false;
    wait_for_previous();
    if (slot == kSlotOff) {
      copy(op);
    } else {
      for (int i = threadIdx.x; i < width; i += kEditThreads) store_nan(out, i, op.activation);
    }
    if (rank == 0) report_nothing(op, t, slot == kSlotOff ? 0.f : kNaN);
    return true;
  }

  // Brings the columns into x as fp32. `shift` points at the same columns, or is null.
  __device__ Look load(const Rows& op, const float* shift, float* x, double* slots) const {
    Look look;
    for (int i = threadIdx.x; i < width; i += kEditThreads) {
      const float v = load_activation(z, i, op.activation);
      x[i] = v;
      look.broken |= !(fabsf(v) <= kLargestF32);
      look.square = fma(static_cast<double>(v), static_cast<double>(v), look.square);
      if (shift != nullptr) look.shifts |= shift[i] != 0.f;
    }
    look.square = block_sum(look.square, slots);
    look.broken = __syncthreads_or(look.broken);
    look.shifts = __syncthreads_or(look.shifts);
    return look;
  }
};

// A sum over the cluster of one value a thread.
template <class E>
__device__ double cluster_sum(double part, E& exchange, int& turn, int blocks) {
  part = block_sum(part, exchange.warp);
  if (threadIdx.x == 0) exchange.begin(turn)[0] = part;
  exchange.publish();
  return exchange.total(turn++, 0, blocks);
}

// Writes z' = x + delta under the limits and returns |z' - z|. `square` is this thread's share of |delta|^2;
// delta is overwritten. Each thread touches the columns it filled itself: threadIdx.x, + kEditThreads, ...
template <class E>
__device__ double finish_row(const Rows& op, const Slice& row, int blocks, const float* x, float* delta,
                             double square, double norm, const float* limits, E& exchange, int& turn) {
  float share = 1.f;
  if (limits[kMaxDose] > 0) {
    const double length = sqrt(cluster_sum(square, exchange, turn, blocks));
    if (length > 0) share = static_cast<float>(fmin(1.0, limits[kMaxDose] * norm / length));
  }
  square = 0;
  for (int i = threadIdx.x; i < row.width; i += kEditThreads) {
    const float v = fmaf(share, delta[i], x[i]);
    delta[i] = v;
    square = fma(static_cast<double>(v), static_cast<double>(v), square);
  }
  float resize = 1.f;
  if (limits[kKeepNorm] != 0) {
    const double length = sqrt(cluster_sum(square, exchange, turn, blocks));
    if (length > 0) resize = static_cast<float>(norm / length);
  }
  square = 0;
  for (int i = threadIdx.x; i < row.width; i += kEditThreads) {
    const float v = delta[i] * resize;
    store_activation(row.out, i, op.activation, v);
    const double step = static_cast<double>(v) - x[i];
    square = fma(step, step, square);
  }
  return sqrt(cluster_sum(square, exchange, turn, blocks));
}

// Doses of a row with a slot of its own; by one block.
__device__ inline void report_doses(const Rows& op, int64_t t, bool broken, double norm, double removed,
                                    double moved) {
  if (broken) {
    report_nothing(op, t, kNaN);
  } else if (threadIdx.x == 0) {
    op.doses[t * 2] = norm > 0 ? static_cast<float>(removed / norm) : 0.f;
    op.doses[t * 2 + 1] = norm > 0 ? static_cast<float>(moved / norm) : 0.f;
  }
}

}  // namespace daco::cuda
