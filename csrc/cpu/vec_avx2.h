// Vectors of eight floats: AVX2 with FMA and F16C. See vec_scalar.h for the interface.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu/kernels.h"

#define DACO_INLINE inline __attribute__((always_inline))

namespace daco {
namespace cpu {
namespace {

constexpr int kLanes = 8;
constexpr int kAtomTile = 4;
constexpr int kRowTile = 2;
constexpr int kLoneRowAtoms = 8;

struct V {
  __m256 v;
};
struct Sum {
  __m256d low, high;
};

DACO_INLINE V zero() { return {_mm256_setzero_ps()}; }
DACO_INLINE V all(float x) { return {_mm256_set1_ps(x)}; }

DACO_INLINE V load(const float* p) { return {_mm256_loadu_ps(p)}; }
DACO_INLINE V load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
DACO_INLINE V load(const Bfloat* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}

DACO_INLINE V load(const int8_t* p) {
  const __m128i q = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q))};
}

// The first n < kLanes elements, zeros behind them; nothing beyond them is touched.
template <class T>
DACO_INLINE V load_first(const T* p, int64_t n) {
  T padded[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}

DACO_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v.v); }
DACO_INLINE void store(Half* p, V v) {
  const __m256 limit = _mm256_set1_ps(65504.f);
  const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.f), v.v);
  const __m256 over = _mm256_cmp_ps(size, limit, _CMP_GT_OQ);
  const __m256 capped = _mm256_or_ps(_mm256_and_ps(_mm256_set1_ps(-0.f), v.v), limit);
  const __m256 x = _mm256_blendv_ps(v.v, capped, over);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
DACO_INLINE void store(Bfloat* p, V v) {
  const __m256i b = _mm256_castps_si256(v.v);
  const __m256i size = _mm256_and_si256(b, _mm256_set1_epi32(0x7fffffff));
  const __m256i is_nan = _mm256_cmpgt_epi32(size, _mm256_set1_epi32(0x7f800000));
  const __m256i is_over = _mm256_cmpgt_epi32(size, _mm256_set1_epi32(0x7f7f0000));
  const __m256i high = _mm256_srli_epi32(b, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  __m256i out = _mm256_srli_epi32(_mm256_add_epi32(b, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd)), 16);
  const __m256i largest =
      _mm256_or_si256(_mm256_and_si256(high, _mm256_set1_epi32(0x8000)), _mm256_set1_epi32(0x7f7f));
  out = _mm256_blendv_epi8(out, largest, is_over);
  out = _mm256_blendv_epi8(out, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(out, out), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
DACO_INLINE void store_first(float* p, V v, int64_t n) {
  float padded[kLanes];
  store(padded, v);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

DACO_INLINE V fused(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
DACO_INLINE V times(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
DACO_INLINE V minus(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
DACO_INLINE V magnitude(V v) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), v.v)}; }
DACO_INLINE float total(V v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v.v), _mm256_extractf128_ps(v.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

DACO_INLINE V larger(V a, V b) {
  return {_mm256_max_ps(a.v, b.v)};
}  // the second operand where either is NaN
DACO_INLINE float largest(V v) {
  float lane[kLanes];
  store(lane, v);
  float best = lane[0];
  for (int i = 1; i < kLanes; ++i) best = lane[i] > best ? lane[i] : best;
  return best;
}
DACO_INLINE uint32_t where_above(V a, V b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)));
}
DACO_INLINE uint32_t where_equal(V a, V b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)));
}

DACO_INLINE Sum no_sum() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
DACO_INLINE Sum add_squares(Sum s, V v) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v.v));
  const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v.v, 1));
  return {_mm256_fmadd_pd(low, low, s.low), _mm256_fmadd_pd(high, high, s.high)};
}
DACO_INLINE double total(Sum s) {
  double lane[4];
  _mm256_storeu_pd(lane, _mm256_add_pd(s.low, s.high));
  return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

}  // namespace
}  // namespace cpu
}  // namespace daco
