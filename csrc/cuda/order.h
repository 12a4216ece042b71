// The order of codes, and the digits by which a threshold is found: the same on the device and in its tests.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DACO_BOTH __host__ __device__ __forceinline__
#else
#define DACO_BOTH inline
#endif

namespace daco::cuda {

// A pre-activation as a key of the same order: 0 for everything that relu stops, and for NaN.
DACO_BOTH uint32_t key_of(uint32_t bits) { return bits > 0x7f800000u ? 0u : bits; }

// Whether a comes before b: the larger first, ties to the lower index.
template <class T>
DACO_BOTH bool before(T a, int32_t index_a, T b, int32_t index_b) {
  return a > b || (a == b && index_a < index_b);
}

// Keys are split into three digits, leading first. Positive floats crowd into few exponents, so the first
// digit takes some of the mantissa too.
constexpr int kDigits = 3;
constexpr int kBins = 2048;
DACO_BOTH int digit_shift(int d) { return d == 0 ? 21 : d == 1 ? 10 : 0; }
DACO_BOTH uint32_t digit_of(uint32_t key, int d) {
  return (key >> digit_shift(d)) & (d == 2 ? 1023u : 2047u);
}
// Whether the digits before number d are those of `prefix`, which holds them in place and zeros below.
DACO_BOTH bool has_prefix(uint32_t key, uint32_t prefix, int d) {
  return d == 0 || key >> digit_shift(d - 1) == prefix >> digit_shift(d - 1);
}

// The number of neighbouring lanes whose largest key is taken together, so that a block of 1024 threads makes
// at least k groups; 0 when it cannot. The least of the groups' maxima is then reached by at least k keys.
DACO_BOTH int lanes_per_group(int64_t k) {
  int lanes = 32;
  while (lanes > 0 && 1024 / lanes < k) lanes /= 2;
  return lanes;
}

}  // namespace daco::cuda
