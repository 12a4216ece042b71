// CUDA's own names for what simt_host.h schedules, so that kernels written with them compile as plain C++:
// every .cu file of the SAE path is built with this header before its first line.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include "simt_host.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static  // only kernels whose blocks run one after the other use it
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__

namespace daco::cuda {

inline dim3 gridDim, blockDim;

inline void __syncthreads() { block_sync(); }

inline int __syncthreads_or(int x) {
  static std::vector<int> any;
  const auto block = static_cast<size_t>(simt::machine.now->block);
  block_sync();
  any.resize(static_cast<size_t>(simt::machine.blocks));
  any[block] = 0;
  block_sync();
  if (x) any[block] = 1;
  block_sync();
  return any[block];
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return from_lane_xor(x, mask);
}
template <class T>
T __shfl_up_sync(unsigned, T x, unsigned step) {
  const int lane = simt::lane(), from = lane - static_cast<int>(step);
  return from_lane(x, from < 0 ? lane : from);
}
inline unsigned __ballot_sync(unsigned, bool x) { return warp_ballot(x); }
inline uint32_t __reduce_min_sync(unsigned, uint32_t x) { return warp_min(x); }
inline int __popc(uint32_t x) { return count_bits(x); }
inline int atomicAdd(int* p, int x) {
  const int before = *p;
  *p += x;
  return before;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<uint32_t>(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return out;
}
using std::max;
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline void cudaGridDependencySynchronize() {}

// Copies land when their group is waited for, so a read that comes too early sees what was there before.
struct Pending {
  void* to;
  const void* from;
  int bytes;
  int group;
};
struct Copies {
  std::vector<Pending> pending;
  int groups = 0;
};
inline Copies& copies() {
  static std::vector<Copies> all;
  const auto thread = static_cast<size_t>(simt::machine.now->thread);
  if (all.size() <= thread) all.resize(thread + 1024);
  return all[thread];
}
inline void copy_async(void* to, const void* from, int bytes) {
  Copies& c = copies();
  c.pending.push_back({to, from, bytes, c.groups});
}
inline void commit() { ++copies().groups; }
template <int kLeft>
void wait_groups() {
  Copies& c = copies();
  auto kept = c.pending.begin();
  for (const Pending& p : c.pending) {
    if (p.group >= c.groups - kLeft) {
      *kept++ = p;
    } else {
      std::memset(p.to, 0, 16);
      if (p.bytes > 0) std::memcpy(p.to, p.from, static_cast<size_t>(p.bytes));
    }
  }
  c.pending.erase(kept, c.pending.end());
}

// The product of the tensor cores by definition, in fp32.
template <bool kBf16>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const auto all = [](uint32_t low, uint32_t high) {
    return simt::exchange(static_cast<uint64_t>(high) << 32 | low, [](auto&& of) {
      std::vector<uint64_t> x(32);
      for (int i = 0; i < 32; ++i) x[static_cast<size_t>(i)] = of(i);
      return x;
    });
  };
  const auto upper = all(a0, a2), lower = all(a1, a3), right = all(b0, b1);
  const auto value = [](uint64_t words, int k) {
    const auto bits = static_cast<uint16_t>(words >> (k >= 8 ? 32 : 0) >> (k % 2 ? 16 : 0));
    return kBf16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
  };
  const int group = simt::lane() / 4, quad = simt::lane() % 4;
  for (int e = 0; e < 4; ++e) {
    const auto& left = e < 2 ? upper : lower;
    for (int k = 0; k < 16; ++k) {
      const int lane = k % 8 / 2;
      c[e] += value(left[static_cast<size_t>(group * 4 + lane)], k) *
              value(right[static_cast<size_t>((2 * quad + e % 2) * 4 + lane)], k);
    }
  }
}

namespace simt {

inline unsigned seed = 1;  // of the order in which threads run

template <class Body>
void launch(dim3 grid, int cluster, int threads, size_t shared, Body&& body) {
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  for (unsigned y = 0; y < grid.y; ++y) {
    blockIdx.y = y;
    launch(static_cast<int64_t>(grid.x), cluster, threads, shared, ++seed, std::function<void()>(body));
  }
}

}  // namespace simt
}  // namespace daco::cuda
