// Vectors of sixteen floats: AVX-512 F, BW, VL and DQ. See vec_scalar.h for the interface.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu/kernels.h"

#define DACO_INLINE inline __attribute__((always_inline))

namespace daco {
namespace cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kAtomTile = 4;
constexpr int kRowTile = 4;
constexpr int kLoneRowAtoms = 8;

struct V {
  __m512 v;
};
struct Sum {
  __m512d low, high;
};

DACO_INLINE V zero() { return {_mm512_setzero_ps()}; }
DACO_INLINE V all(float x) { return {_mm512_set1_ps(x)}; }

DACO_INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
DACO_INLINE V half_to_float(__m256i h) { return {_mm512_cvtph_ps(h)}; }
DACO_INLINE V bfloat_to_float(__m256i b) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16))};
}
DACO_INLINE V load(const Half* p) {
  return half_to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
DACO_INLINE V load(const Bfloat* p) {
  return bfloat_to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
DACO_INLINE V int8_to_float(__m128i q) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q))}; }
DACO_INLINE V load(const int8_t* p) {
  return int8_to_float(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

DACO_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
// The first n < kLanes elements, zeros behind them; masked lanes are not touched in memory.
DACO_INLINE V load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
DACO_INLINE V load_first(const Half* p, int64_t n) {
  return half_to_float(_mm256_maskz_loadu_epi16(first(n), p));
}
DACO_INLINE V load_first(const Bfloat* p, int64_t n) {
  return bfloat_to_float(_mm256_maskz_loadu_epi16(first(n), p));
}
DACO_INLINE V load_first(const int8_t* p, int64_t n) {
  return int8_to_float(_mm_maskz_loadu_epi8(first(n), p));
}

DACO_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v.v); }
DACO_INLINE void store_first(float* p, V v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v.v); }
DACO_INLINE void store(Half* p, V v) {
  const __m512 limit = _mm512_set1_ps(65504.f);
  const __m512 size = _mm512_abs_ps(v.v);
  const __mmask16 over = _mm512_cmp_ps_mask(size, limit, _CMP_GT_OQ);
  const __m512 capped = _mm512_or_ps(_mm512_and_ps(_mm512_set1_ps(-0.f), v.v), limit);
  const __m512 x = _mm512_mask_blend_ps(over, v.v, capped);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
DACO_INLINE void store(Bfloat* p, V v) {
  const __m512i b = _mm512_castps_si512(v.v);
  const __m512i size = _mm512_and_si512(b, _mm512_set1_epi32(0x7fffffff));
  const __mmask16 is_nan = _mm512_cmpgt_epi32_mask(size, _mm512_set1_epi32(0x7f800000));
  const __mmask16 is_over = _mm512_cmpgt_epi32_mask(size, _mm512_set1_epi32(0x7f7f0000));
  const __m512i high = _mm512_srli_epi32(b, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  __m512i out = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd)), 16);
  const __m512i largest =
      _mm512_or_si512(_mm512_and_si512(high, _mm512_set1_epi32(0x8000)), _mm512_set1_epi32(0x7f7f));
  out = _mm512_mask_blend_epi32(is_over, out, largest);
  out = _mm512_mask_blend_epi32(is_nan, out, _mm512_or_si512(high, _mm512_set1_epi32(0x40)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}

DACO_INLINE V fused(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
DACO_INLINE V times(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
DACO_INLINE V minus(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
DACO_INLINE V magnitude(V v) { return {_mm512_abs_ps(v.v)}; }
DACO_INLINE float total(V v) { return _mm512_reduce_add_ps(v.v); }

DACO_INLINE V larger(V a, V b) {
  return {_mm512_max_ps(a.v, b.v)};
}  // the second operand where either is NaN
DACO_INLINE float largest(V v) { return _mm512_reduce_max_ps(v.v); }
DACO_INLINE uint32_t where_above(V a, V b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
DACO_INLINE uint32_t where_equal(V a, V b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }

DACO_INLINE Sum no_sum() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
DACO_INLINE Sum add_squares(Sum s, V v) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v.v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v.v, 1));
  return {_mm512_fmadd_pd(low, low, s.low), _mm512_fmadd_pd(high, high, s.high)};
}
DACO_INLINE double total(Sum s) { return _mm512_reduce_add_pd(_mm512_add_pd(s.low, s.high)); }

}  // namespace
}  // namespace cpu
}  // namespace daco
