// Elements in memory and their values in registers: 16-byte pieces of weight rows, single activations, and
// rounding that saturates as the CPU kernels' does.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/dtype.h"

namespace daco::cuda {

constexpr float kLargestF32 = 3.402823466e38f;

// Elements of a 16-byte piece.
template <DType W>
constexpr int kPiece = 16 / static_cast<int>(size_of(W));

// e4m3 moved into the exponent and mantissa of fp16 lacks 2^8: the one multiplication also makes fp8's
// subnormals right. Takes two codes in the upper halves of 16-bit lanes.
__host__ __device__ inline uint32_t e4m3_to_scaled_half2(uint32_t upper) {
  return ((upper & 0x7f007f00u) >> 1) | (upper & 0x80008000u);
}

__device__ __forceinline__ float2 half2_bits(uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

__device__ __forceinline__ float2 e4m3_pair(uint32_t upper) {
  const float2 x = half2_bits(e4m3_to_scaled_half2(upper));
  return make_float2(x.x * 256.f, x.y * 256.f);
}

// Two elements of a 32-bit word.
template <DType W>
__device__ __forceinline__ float2 pair(uint32_t bits) {
  if constexpr (W == DType::kBF16) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  } else {
    return half2_bits(bits);
  }
}

// The values of one piece, scales left out.
template <DType W>
__device__ __forceinline__ void decode(const uint4& raw, float (&x)[kPiece<W>]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t w = words[i];
    if constexpr (W == DType::kF32) {
      x[i] = __uint_as_float(w);
    } else if constexpr (W == DType::kI8) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // 2^23 + (q + 128) is exact: its low mantissa bits are the byte.
        const uint32_t byte = ((w ^ 0x80808080u) >> (8 * j)) & 0xffu;
        x[4 * i + j] = __uint_as_float(0x4b000000u | byte) - 8388736.f;
      }
    } else if constexpr (W == DType::kF8E4M3) {
      const float2 low = e4m3_pair(__byte_perm(w, 0, 0x1404));   // bytes 0 and 1
      const float2 high = e4m3_pair(__byte_perm(w, 0, 0x3424));  // bytes 2 and 3
      x[4 * i] = low.x;
      x[4 * i + 1] = low.y;
      x[4 * i + 2] = high.x;
      x[4 * i + 3] = high.y;
    } else {
      const float2 two = pair<W>(w);
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
}

template <DType W>
__device__ __forceinline__ float element(const void* row, int64_t i) {
  if constexpr (W == DType::kF32) {
    return static_cast<const float*>(row)[i];
  } else if constexpr (W == DType::kF16) {
    return __half2float(static_cast<const __half*>(row)[i]);
  } else if constexpr (W == DType::kBF16) {
    return __bfloat162float(static_cast<const __nv_bfloat16*>(row)[i]);
  } else if constexpr (W == DType::kI8) {
    return static_cast<float>(static_cast<const int8_t*>(row)[i]);
  } else {
    return e4m3_pair(static_cast<uint32_t>(static_cast<const uint8_t*>(row)[i]) << 8).x;
  }
}


// Weights are read once: they should not push rows and pre-activations out of the L1 cache.
__device__ __forceinline__ uint4 load_streaming(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// Single activations; the dtype is the same for a whole launch, so the branch costs no divergence.
__device__ __forceinline__ float load_activation(const void* row, int64_t i, DType type) {
  if (type == DType::kBF16) return __bfloat162float(static_cast<const __nv_bfloat16*>(row)[i]);
  if (type == DType::kF16) return __half2float(static_cast<const __half*>(row)[i]);
  return static_cast<const float*>(row)[i];
}

// Round to nearest even; what would leave the type's range becomes its largest value; NaN stays NaN.
__device__ __forceinline__ void store_activation(void* row, int64_t i, DType type, float v) {
  if (type == DType::kBF16) {
    const float top = __uint_as_float(0x7f7f0000u);
    static_cast<__nv_bfloat16*>(row)[i] = __float2bfloat16_rn(fabsf(v) > top ? copysignf(top, v) : v);
  } else if (type == DType::kF16) {
    static_cast<__half*>(row)[i] = __float2half_rn(fabsf(v) >= 65504.f ? copysignf(65504.f, v) : v);
  } else {
    static_cast<float*>(row)[i] = fabsf(v) > kLargestF32 ? copysignf(kLargestF32, v) : v;
  }
}

__device__ __forceinline__ void store_nan(void* row, int64_t i, DType type) {
  if (type == DType::kF32) {
    static_cast<uint32_t*>(row)[i] = 0x7fc00000u;
  } else {
    static_cast<uint16_t*>(row)[i] = type == DType::kF16 ? 0x7e00u : 0x7fc0u;
  }
}

__device__ __forceinline__ const char* row_of(const void* base, int64_t t, int64_t stride, DType type) {
  return static_cast<const char*>(base) + t * stride * static_cast<int64_t>(size_of(type));
}

__device__ __forceinline__ bool coded_slot(int32_t slot, int64_t policies) {
  return slot >= 1 && slot < policies;
}

// Squares of a few fp32 values. The cheap sum is good to its last bits unless it left fp32's comfortable
// range, where single squares would overflow or vanish.
template <int N>
__device__ __forceinline__ double sum_squares(const float (&x)[N]) {
  float quick = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) quick = fmaf(x[i], x[i], quick);
  if (quick > 1e-24f && quick < 1e36f) return quick;
  double exact = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) exact = fma(static_cast<double>(x[i]), static_cast<double>(x[i]), exact);
  return exact;
}

}  // namespace daco::cuda
