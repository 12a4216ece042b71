// The few things that the pursuit kernels ask of the machine: their place in the grid, collectives of a warp,
// a block and a cluster, and loads. The same kernels are compiled a second time for the CPU, where a
// scheduler of fibers stands in for these (tests/native/simt_host.h), so that their logic is tested without a
// GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "core/dtype.h"

#if defined(__CUDACC__)

#define DACO_DEVICE __device__ __forceinline__
#define DACO_BOTH __host__ __device__ __forceinline__

namespace daco::cuda {

// Blocks of a cluster may read and write each other's shared memory. Before sm_90 a block is alone.
DACO_DEVICE unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return __clusterRelativeBlockRank();
#else
  return 0;
#endif
}

// All threads of all blocks of the cluster; what they wrote before is seen by all after.
DACO_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#else
  __syncthreads();
#endif
}

// The same variable in another block of the cluster.
template <class T>
DACO_DEVICE T* in_block(T* shared, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(shared, rank));
#else
  return shared;
#endif
}

DACO_DEVICE void block_sync() { __syncthreads(); }
DACO_DEVICE void warp_sync() { __syncwarp(); }

template <class T>
DACO_DEVICE T from_lane_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class T>
DACO_DEVICE T from_lane(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
DACO_DEVICE uint32_t warp_max(uint32_t x) { return __reduce_max_sync(0xffffffffu, x); }
DACO_DEVICE uint32_t warp_min(uint32_t x) { return __reduce_min_sync(0xffffffffu, x); }
DACO_DEVICE uint32_t warp_ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
DACO_DEVICE int count_bits(uint32_t x) { return __popc(x); }

// Sixteen bytes into shared memory without passing through registers; the thread that asked may read them
// after async_wait(), others after a barrier that follows it.
DACO_DEVICE void async_copy16(void* shared, const void* global) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
DACO_DEVICE void async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Under programmatic dependent launch a block may be there before the kernel before it is done. Whatever that
// kernel writes is there, and whatever it reads may be written, only after this; every thread passes it.
DACO_DEVICE void after_previous() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
DACO_DEVICE void start_next() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

DACO_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char daco_dynamic_shared[];
  return daco_dynamic_shared;
}

}  // namespace daco::cuda

#else  // the CPU

#include "simt_host.h"

#endif

namespace daco::cuda {

constexpr int kWarp = 32;

DACO_BOTH float to_float(float x) { return x; }
DACO_BOTH float to_float(__half x) { return __half2float(x); }
DACO_BOTH float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
DACO_BOTH float to_float(int8_t x) { return static_cast<float>(x); }
DACO_BOTH float to_float(__nv_fp8_e4m3 x) { return static_cast<float>(x); }

// Sixteen bytes of T, the widest load.
template <class T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  T value[kCount];
};

template <class T>
DACO_DEVICE Pack<T> load_pack(const T* p) {
  union {
    uint4 bits;
    Pack<T> pack;
  } x;
  x.bits = *reinterpret_cast<const uint4*>(p);
  return x.pack;
}

// Sums in an order that the lanes' numbers fix; every lane gets the same bits.
template <class T>
DACO_DEVICE T warp_sum(T x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += from_lane_xor(x, mask);
  return x;
}

// Calls f(const T*) with the pointer in its element type.
template <class F>
DACO_DEVICE void with_type(DType type, const void* p, F&& f) {
  switch (type) {
    case DType::kF32: return f(static_cast<const float*>(p));
    case DType::kF16: return f(static_cast<const __half*>(p));
    case DType::kBF16: return f(static_cast<const __nv_bfloat16*>(p));
    case DType::kI8: return f(static_cast<const int8_t*>(p));
    case DType::kF8E4M3: return f(static_cast<const __nv_fp8_e4m3*>(p));
  }
}

}  // namespace daco::cuda
