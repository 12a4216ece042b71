// The kernels, written once against the vectors of vec_*.h. Include one of those first and define
// DACO_KERNELS as the name of the table to fill.
//
// Only code that is inlined may be used here (no standard library templates): see vec_scalar.h.

namespace daco {
namespace cpu {
namespace {

template <class T>
void widen(const void* x, float* y, int64_t n) {
  const T* p = static_cast<const T*>(x);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(p + i));
  if (i < n) store_first(y + i, load_first(p + i, n - i), n - i);
}

}  // namespace
}  // namespace cpu
}  // namespace daco

#include "cpu/dots.inl"

namespace daco {
namespace cpu {
namespace {

template <class T>
void accumulate(float* y, const void* w, int64_t d, const int32_t* index, const float* coefficient,
                int64_t n) {
  const T* base = static_cast<const T*>(w);
  int64_t i = 0;
  // Four rows a pass: y is read and written once for them, and four streams keep the memory busy.
  for (; i + 4 <= n; i += 4) {
    const T* row[4];
    V factor[4];
    for (int j = 0; j < 4; ++j) {
      row[j] = base + index[i + j] * d;
      factor[j] = all(coefficient[i + j]);
    }
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes) {
      V sum = load(y + c);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum = fused(factor[j], load(row[j] + c), sum);
      store(y + c, sum);
    }
    if (c < d) {
      V sum = load_first(y + c, d - c);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum = fused(factor[j], load_first(row[j] + c, d - c), sum);
      store_first(y + c, sum, d - c);
    }
  }
  for (; i < n; ++i) {
    const T* row = base + index[i] * d;
    const V factor = all(coefficient[i]);
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes) store(y + c, fused(factor, load(row + c), load(y + c)));
    if (c < d) store_first(y + c, fused(factor, load_first(row + c, d - c), load_first(y + c, d - c)), d - c);
  }
}

template <class T>
double sum_squares(const void* x, int64_t n) {
  const T* p = static_cast<const T*>(x);
  Sum sum = no_sum();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = add_squares(sum, load(p + i));
  if (i < n) sum = add_squares(sum, load_first(p + i, n - i));
  return total(sum);
}

double sum_squared_differences(const float* x, const float* y, int64_t n) {
  Sum sum = no_sum();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = add_squares(sum, minus(load(x + i), load(y + i)));
  if (i < n) sum = add_squares(sum, minus(load_first(x + i, n - i), load_first(y + i, n - i)));
  return total(sum);
}

template <class T>
void narrow(const float* x, void* y, int64_t n) {
  T* p = static_cast<T*>(y);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(p + i, load(x + i));
  if (i < n) {
    T padded[kLanes];
    store(padded, load_first(x + i, n - i));
    for (int64_t j = 0; i + j < n; ++j) p[i + j] = padded[j];
  }
}

template <>
void narrow<float>(const float* x, void* y, int64_t n) {
  float* p = static_cast<float*>(y);
  for (int64_t i = 0; i < n; ++i) {
    const float v = x[i];
    p[i] = v > 3.402823466e38f ? 3.402823466e38f : v < -3.402823466e38f ? -3.402823466e38f : v;
  }
}

template <class B>
bool all_bits_below(const void* x, int64_t n, B sign, B infinity) {
  const unsigned char* p = static_cast<const unsigned char*>(x);
  B worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    B b;
    std::memcpy(&b, p + i * static_cast<int64_t>(sizeof(B)), sizeof(B));
    b = static_cast<B>(b & static_cast<B>(~sign));
    worst = worst > b ? worst : b;
  }
  return worst < infinity;
}
bool all_below(const float* x, int64_t n, uint32_t limit) {
  return all_bits_below<uint32_t>(x, n, 0x80000000u, limit);
}
bool finite_fp32(const void* x, int64_t n) { return all_below(static_cast<const float*>(x), n, 0x7f800000u); }
bool finite_fp16(const void* x, int64_t n) { return all_bits_below<uint16_t>(x, n, 0x8000u, 0x7c00u); }
bool finite_bf16(const void* x, int64_t n) { return all_bits_below<uint16_t>(x, n, 0x8000u, 0x7f80u); }

void add_scaled(const float* x, const float* y, float factor, float* out, int64_t n) {
  const V scale = all(factor);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, fused(scale, load(y + i), load(x + i)));
  if (i < n) store_first(out + i, fused(scale, load_first(y + i, n - i), load_first(x + i, n - i)), n - i);
}

void scale(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// The first entry that is (in absolute value) `value`.
template <bool absolute>
Peak first_of(const float* x, int64_t n, float value) {
  const V wanted = all(value);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const uint32_t hit = where_equal(absolute ? magnitude(load(x + i)) : load(x + i), wanted);
    if (hit != 0) return {i + __builtin_ctz(hit), value};
  }
  for (; i < n; ++i) {
    if ((absolute ? __builtin_fabsf(x[i]) : x[i]) == value) return {i, value};
  }
  return {-1, value};
}

template <bool absolute>
Peak find_peak(const float* x, int64_t n) {
  const float lowest = -__builtin_inff();
  V best = all(lowest);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) best = larger(absolute ? magnitude(load(x + i)) : load(x + i), best);
  float value = largest(best);
  for (; i < n; ++i) {
    const float v = absolute ? __builtin_fabsf(x[i]) : x[i];
    value = v > value ? v : value;
  }
  return first_of<absolute>(x, n, value);
}

Peak peak(const float* x, int64_t n, bool absolute) {
  return absolute ? find_peak<true>(x, n) : find_peak<false>(x, n);
}

int64_t collect_above(const float* x, int64_t n, float level, int32_t first, int32_t* index, float* value) {
  const V limit = all(level);
  int64_t found = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    uint32_t hits = where_above(load(x + i), limit);
    for (; hits != 0; hits &= hits - 1) {
      const int64_t at = i + __builtin_ctz(hits);
      index[found] = first + static_cast<int32_t>(at);
      value[found++] = x[at];
    }
  }
  for (; i < n; ++i) {
    if (x[i] > level) {
      index[found] = first + static_cast<int32_t>(i);
      value[found++] = x[i];
    }
  }
  return found;
}

// Plain loops: the compiler makes vectors of them for the instruction set of the file.
void add_doubles(double* __restrict y, const double* __restrict x, double factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

void add_widened(double* __restrict y, const float* __restrict x, double factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * static_cast<double>(x[i]);
}

double dot_doubles(const double* x, const double* y, int64_t n) {
  constexpr int64_t kSums = 16;
  double sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t j = 0; j < kSums; ++j) sum[j] += x[i + j] * y[i + j];
  }
  for (int64_t j = 0; i < n; ++i, ++j) sum[j] += x[i] * y[i];
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) sum[j] += sum[j + half];
  }
  return sum[0];
}

void mark_watched(const float* gain, const float* boost, const uint8_t* undesirable, uint8_t* seen,
                  int64_t n) {
  if (gain != nullptr) {
    for (int64_t i = 0; i < n; ++i) seen[i] = static_cast<uint8_t>(seen[i] | (gain[i] != 1.f));
  }
  if (boost != nullptr) {
    for (int64_t i = 0; i < n; ++i) seen[i] = static_cast<uint8_t>(seen[i] | (boost[i] != 0.f));
  }
  if (undesirable != nullptr) {
    for (int64_t i = 0; i < n; ++i) seen[i] = static_cast<uint8_t>(seen[i] | (undesirable[i] != 0));
  }
}

}  // namespace
}  // namespace cpu
}  // namespace daco

#include "cpu/remaining.inl"

namespace daco {
namespace cpu {

const Kernels DACO_KERNELS = {
    {{dots<float>, accumulate<float>, sum_squares<float>, widen<float>, narrow<float>, finite_fp32},
     {dots<Half>, accumulate<Half>, sum_squares<Half>, widen<Half>, narrow<Half>, finite_fp16},
     {dots<Bfloat>, accumulate<Bfloat>, sum_squares<Bfloat>, widen<Bfloat>, narrow<Bfloat>, finite_bf16},
     {dots<int8_t>, accumulate<int8_t>, sum_squares<int8_t>, widen<int8_t>, nullptr, nullptr}},
    sum_squared_differences,
    add_scaled,
    scale,
    peak,
    all_below,
    collect_above,
    mark_watched,
    {remaining<float>, remaining<Half>},
    add_doubles,
    add_widened,
    dot_doubles,
};

}  // namespace cpu
}  // namespace daco
