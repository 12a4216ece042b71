// Vectors of four floats in the compiler's own terms: SSE2 on x86-64, NEON on Arm, plain code elsewhere.
// The interface that kernels.inl is written against; vec_avx2.h and vec_avx512.h have the same.
//
// Everything is in an unnamed namespace and always inline: a function with external linkage that was
// compiled for a newer instruction set could be the copy that the linker keeps for all callers.
#pragma once

#include <cstring>

#include "cpu/kernels.h"

#define DACO_INLINE inline __attribute__((always_inline))

namespace daco {
namespace cpu {
namespace {

constexpr int kLanes = 4;
constexpr int kAtomTile = 4;  // atoms and rows of one register block of dots()
constexpr int kRowTile = 2;
constexpr int kLoneRowAtoms = 4;  // atoms a register block when there is one row

typedef float V __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));

struct Sum {  // sums in fp64
  double lane[kLanes];
};

DACO_INLINE V zero() { return V{0.f, 0.f, 0.f, 0.f}; }
DACO_INLINE V all(float x) { return V{x, x, x, x}; }

DACO_INLINE V from_bits(Bits b) {
  V v;
  std::memcpy(&v, &b, sizeof(v));
  return v;
}
DACO_INLINE Bits bits_of(V v) {
  Bits b;
  std::memcpy(&b, &v, sizeof(b));
  return b;
}

DACO_INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
DACO_INLINE V load(const Bfloat* p) {
  return from_bits(Bits{uint32_t{p[0].bits}, uint32_t{p[1].bits}, uint32_t{p[2].bits}, uint32_t{p[3].bits}}
                   << 16);
}
DACO_INLINE V load(const Half* p) {
  const Bits h{uint32_t{p[0].bits}, uint32_t{p[1].bits}, uint32_t{p[2].bits}, uint32_t{p[3].bits}};
  const Bits exponent = h & 0x7c00u;
  const Bits fraction = h & 0x3ffu;
  typedef int32_t Ints __attribute__((vector_size(16)));
  // Subnormals go through an integer conversion, which a host that flushes subnormals cannot break.
  const V tiny = __builtin_convertvector((Ints)fraction, V) * all(5.9604644775390625e-8f);
  const Bits normal = ((h & 0x7fffu) << 13) + (112u << 23);
  const Bits special = (fraction << 13) | 0x7f800000u;
  const Bits is_tiny = (Bits)(exponent == 0u);
  const Bits is_special = (Bits)(exponent == 0x7c00u);
  const Bits magnitude =
      (bits_of(tiny) & is_tiny) | (special & is_special) | (normal & ~(is_tiny | is_special));
  return from_bits(magnitude | ((h & 0x8000u) << 16));
}

DACO_INLINE V load(const int8_t* p) {
  return V{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
           static_cast<float>(p[3])};
}

// The first n < kLanes elements, zeros behind them.
template <class T>
DACO_INLINE V load_first(const T* p, int64_t n) {
  T padded[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}

DACO_INLINE void store(float* p, V v) { std::memcpy(p, &v, sizeof(v)); }
DACO_INLINE void store_first(float* p, V v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

DACO_INLINE uint16_t narrow_half(float x) {
  uint32_t b;
  std::memcpy(&b, &x, sizeof(b));
  const uint32_t sign = (b >> 16) & 0x8000u;
  b &= 0x7fffffffu;
  if (b > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (b >= 0x477fe000u) return static_cast<uint16_t>(sign | 0x7bffu);
  if (b < 0x38800000u) {  // subnormal in fp16: units of 2^-24
    if (b < 0x33000000u) return static_cast<uint16_t>(sign);
    const uint32_t shift = 126u - (b >> 23);
    const uint32_t mantissa = (b & 0x7fffffu) | 0x800000u;
    const uint32_t half = 1u << (shift - 1);
    const uint32_t kept = mantissa >> shift;
    const uint32_t rest = mantissa & ((1u << shift) - 1);
    return static_cast<uint16_t>(sign | (kept + (rest > half || (rest == half && (kept & 1u)))));
  }
  return static_cast<uint16_t>(sign | ((b - (112u << 23) + 0xfffu + ((b >> 13) & 1u)) >> 13));
}
DACO_INLINE void store(Half* p, V v) {
  for (int i = 0; i < kLanes; ++i) p[i].bits = narrow_half(v[i]);
}
DACO_INLINE void store(Bfloat* p, V v) {
  const Bits b = bits_of(v);
  const Bits magnitude = b & 0x7fffffffu;
  const Bits is_nan = (Bits)(magnitude > 0x7f800000u);
  const Bits is_over = (Bits)(magnitude > 0x7f7f0000u) & ~is_nan;
  const Bits rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const Bits largest = ((b >> 16) & 0x8000u) | 0x7f7fu;
  const Bits quiet = (b >> 16) | 0x40u;
  const Bits out = (quiet & is_nan) | (largest & is_over) | (rounded & ~(is_nan | is_over));
  for (int i = 0; i < kLanes; ++i) p[i].bits = static_cast<uint16_t>(out[i]);
}

DACO_INLINE V fused(V a, V b, V c) { return a * b + c; }
DACO_INLINE V times(V a, V b) { return a * b; }
DACO_INLINE V minus(V a, V b) { return a - b; }
DACO_INLINE V magnitude(V v) { return from_bits(bits_of(v) & 0x7fffffffu); }
DACO_INLINE float total(V v) { return (v[0] + v[1]) + (v[2] + v[3]); }

// The larger of a and b; b where a is NaN.
DACO_INLINE V larger(V a, V b) {
  const Bits first = (Bits)(a > b);
  return from_bits((bits_of(a) & first) | (bits_of(b) & ~first));
}
DACO_INLINE float largest(V v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}
DACO_INLINE uint32_t mask_of(Bits b) { return (b[0] & 1u) | (b[1] & 2u) | (b[2] & 4u) | (b[3] & 8u); }
DACO_INLINE uint32_t where_above(V a, V b) { return mask_of((Bits)(a > b)); }
DACO_INLINE uint32_t where_equal(V a, V b) { return mask_of((Bits)(a == b)); }

DACO_INLINE Sum no_sum() { return Sum{{0, 0, 0, 0}}; }
DACO_INLINE Sum add_squares(Sum sum, V v) {
  for (int i = 0; i < kLanes; ++i) sum.lane[i] += static_cast<double>(v[i]) * static_cast<double>(v[i]);
  return sum;
}
DACO_INLINE double total(Sum s) { return (s.lane[0] + s.lane[1]) + (s.lane[2] + s.lane[3]); }

}  // namespace
}  // namespace cpu
}  // namespace daco
