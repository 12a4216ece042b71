// Sums and prefix sums in an order fixed by the launch's shape, so that equal calls give equal bits.
#pragma once

#include <cstdint>

namespace daco::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Sum over the block, the same in every thread. `slots` holds one double a warp; the barrier at the start
// lets it be used again at once.
__device__ __forceinline__ double block_sum(double x, double* slots) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += slots[w];
  return total;
}

// Sum of x over the threads before this one; *total is that over all. `slots` holds one int a warp.
__device__ __forceinline__ int32_t block_prefix(int32_t x, int32_t* slots, int32_t* total) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t inclusive = x;
#pragma unroll
  for (unsigned step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  __syncthreads();
  if (lane == 31) slots[warp] = inclusive;
  __syncthreads();
  int32_t before = 0, all = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) {
    if (w < warp) before += slots[w];
    all += slots[w];
  }
  *total = all;
  return before + inclusive - x;
}

}  // namespace daco::cuda
