// The reported support of a row, written by one block.
#pragma once

#include "core/steer.h"
#include "cuda/codes.cuh"
#include "cuda/order.h"
#include "cuda/reduce.cuh"

namespace daco::cuda {

constexpr int32_t kRankedAtOnce = 512;

__device__ inline void report_nothing(const Rows& op, int64_t t, float dose) {
  if (threadIdx.x < 2) op.doses[t * 2 + threadIdx.x] = dose;
  for (int32_t i = threadIdx.x; i < op.k_out; i += blockDim.x) {
    op.support_index[t * op.k_out + i] = -1;
    op.support_value[t * op.k_out + i] = 0.f;
  }
}

// A place in the ranking; -1 marks strengths below every code's.
struct Ranked {
  float strength = -1.f;
  int32_t index = INT32_MAX;
  int32_t place = -1;
};

__device__ inline bool ahead(const Ranked& a, const Ranked& b) {
  return before(a.strength, a.index, b.strength, b.index);
}

// The first of the block's codes in the ranking.
__device__ inline Ranked block_first(Ranked mine, Ranked* slots) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    Ranked other;
    other.strength = __shfl_xor_sync(kAllLanes, mine.strength, step);
    other.index = __shfl_xor_sync(kAllLanes, mine.index, step);
    other.place = __shfl_xor_sync(kAllLanes, mine.place, step);
    if (ahead(other, mine)) mine = other;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = mine;
  __syncthreads();
  Ranked best = slots[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) {
    if (ahead(slots[w], best)) best = slots[w];
  }
  return best;
}

// Ranks the row's codes by strength, ties to the lower index, and writes the first k_out. Strengths, -1 where
// a list's entry is no code, were written by threads of this block.
__device__ inline void report_support(const Rows& op, const Codes& codes, int64_t t, int32_t count) {
  if (op.k_out == 0) return;
  __shared__ float strength[kRankedAtOnce];
  __shared__ int32_t index[kRankedAtOnce];
  __shared__ Ranked slots[32];
  const int64_t row = t * codes.capacity;
  int32_t* out_index = op.support_index + t * op.k_out;
  float* out_value = op.support_value + t * op.k_out;
  __syncthreads();
  int32_t shown = 0;
  if (count <= kRankedAtOnce) {
    int32_t present = 0;
    for (int32_t i = threadIdx.x; i < count; i += blockDim.x) {
      strength[i] = codes.strength[row + i];
      index[i] = codes.index[row + i];
    }
    __syncthreads();
    for (int32_t i = 0; i < count; ++i) present += strength[i] >= 0.f;
    for (int32_t i = threadIdx.x; i < count; i += blockDim.x) {
      if (!(strength[i] >= 0.f)) continue;
      int32_t rank = 0;
      for (int32_t o = 0; o < count; ++o) rank += before(strength[o], index[o], strength[i], index[i]);
      if (rank < op.k_out) {
        out_index[rank] = index[i];
        out_value[rank] = codes.value[row + i];
      }
    }
    shown = present < op.k_out ? present : op.k_out;
  } else {
    // Long lists, of coders without a limit: one place after the other, each the first behind the last.
    Ranked last;
    last.strength = __int_as_float(0x7f800000);
    last.index = -1;
    for (; shown < op.k_out; ++shown) {
      Ranked mine;
      for (int32_t i = threadIdx.x; i < count; i += blockDim.x) {
        Ranked here;
        here.strength = codes.strength[row + i];
        here.index = codes.index[row + i];
        here.place = i;
        if (ahead(last, here) && ahead(here, mine)) mine = here;
      }
      const Ranked next = block_first(mine, slots);
      if (next.place < 0 || !(next.strength >= 0.f)) break;
      if (threadIdx.x == 0) {
        out_index[shown] = next.index;
        out_value[shown] = codes.value[row + next.place];
      }
      last = next;
    }
  }
  for (int32_t i = shown + static_cast<int32_t>(threadIdx.x); i < op.k_out; i += blockDim.x) {
    out_index[i] = -1;
    out_value[i] = 0.f;
  }
}

}  // namespace daco::cuda
