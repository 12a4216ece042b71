// The kernels, written once against the vectors of vec_*.h. Include one of those first and define
// DACO_KERNELS as the name of the table to fill.
//
// Only code that is inlined may be used here (no standard library templates): see vec_scalar.h.

namespace daco {
namespace cpu {
namespace {

constexpr int64_t kStripe = 16;  // atoms that all rows visit while they stay in the second-level cache

// Dot products of A atoms with R rows: each loaded vector of weights serves R rows. One accumulator a
// pair, so that the order of a sum does not depend on A and R.
template <int A, int R, class T>
DACO_INLINE void dot_block(const T* const* w, const float* const* x, int64_t d, float (*out)[R]) {
  V sum[A][R];
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[a][r] = zero();
  }
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    V row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = load(x[r] + c);
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      const V weight = load(w[a] + c);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[a][r] = fused(weight, row[r], sum[a][r]);
    }
  }
  if (c < d) {
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      const V weight = load_first(w[a] + c, d - c);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[a][r] = fused(weight, load_first(x[r] + c, d - c), sum[a][r]);
    }
  }
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) out[a][r] = total(sum[a][r]);
  }
}

template <class T>
struct Atoms {
  const T* w;
  const int32_t* index;
  const float* bias;
  int64_t d;

  int64_t at(int64_t i) const { return index != nullptr ? index[i] : i; }
};

template <int A, int R, class T>
__attribute__((noinline)) void dots_of(const Atoms<T>& atoms, int64_t first, const float* const* x,
                                       float* const* y) {
  const T* w[A];
  for (int a = 0; a < A; ++a) w[a] = atoms.w + atoms.at(first + a) * atoms.d;
  float out[A][R];
  dot_block<A, R>(w, x, atoms.d, out);
  for (int a = 0; a < A; ++a) {
    const float bias = atoms.bias != nullptr ? atoms.bias[atoms.at(first + a)] : 0.f;
    for (int r = 0; r < R; ++r) y[r][first + a] = out[a][r] + bias;
  }
}

// Atoms [begin, end) against R rows.
template <int A, int R, class T>
DACO_INLINE void stripe(const Atoms<T>& atoms, int64_t begin, int64_t end, const float* const* x,
                        float* const* y) {
  int64_t i = begin;
  for (; i + A <= end; i += A) dots_of<A, R>(atoms, i, x, y);
  for (; i < end; ++i) dots_of<1, R>(atoms, i, x, y);
}

template <class T>
void dots(const void* w, const int32_t* index, int64_t begin, int64_t end, int64_t d, const float* bias,
          const float* const* x, int64_t rows, float* const* y) {
  const Atoms<T> atoms{static_cast<const T*>(w), index, bias, d};
  if (rows == 1) {
    stripe<kLoneRowAtoms, 1>(atoms, begin, end, x, y);
    return;
  }
  for (int64_t i = begin; i < end; i += kStripe) {
    const int64_t stop = i + kStripe < end ? i + kStripe : end;
    int64_t r = 0;
    for (; r + kRowTile <= rows; r += kRowTile) stripe<kAtomTile, kRowTile>(atoms, i, stop, x + r, y + r);
    if (kRowTile > 2 && r + 2 <= rows) {
      stripe<kAtomTile, 2>(atoms, i, stop, x + r, y + r);
      r += 2;
    }
    if (r < rows) stripe<kLoneRowAtoms, 1>(atoms, i, stop, x + r, y + r);
  }
}

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
void widen(const void* x, float* y, int64_t n) {
  const T* p = static_cast<const T*>(x);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(p + i));
  if (i < n) store_first(y + i, load_first(p + i, n - i), n - i);
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
bool finite_fp32(const void* x, int64_t n) {
  return all_bits_below<uint32_t>(x, n, 0x80000000u, 0x7f800000u);
}
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
  const V wanted = all(value);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const uint32_t hit = where_equal(absolute ? magnitude(load(x + i)) : load(x + i), wanted);
    if (hit != 0) return {i + __builtin_ctz(hit), value};
  }
  for (; i < n; ++i) {
    if ((absolute ? __builtin_fabsf(x[i]) : x[i]) == value) return {i, value};
  }
  return {-1, lowest};
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

const Kernels DACO_KERNELS = {
    {{dots<float>, accumulate<float>, sum_squares<float>, widen<float>, narrow<float>, finite_fp32},
     {dots<Half>, accumulate<Half>, sum_squares<Half>, widen<Half>, narrow<Half>, finite_fp16},
     {dots<Bfloat>, accumulate<Bfloat>, sum_squares<Bfloat>, widen<Bfloat>, narrow<Bfloat>, finite_bf16},
     {dots<int8_t>, accumulate<int8_t>, sum_squares<int8_t>, widen<int8_t>, nullptr, nullptr}},
    sum_squared_differences,
    add_scaled,
    scale,
    peak,
    collect_above,
    mark_watched,
};

}  // namespace cpu
}  // namespace daco
