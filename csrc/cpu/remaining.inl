// Correlations that a code leaves, and the largest of them: a step of Batch-OMP. Part of kernels.inl.

namespace daco {
namespace cpu {
namespace {

// kSpan vectors of x minus all n rows, held in registers from the first row to the last.
template <int kSpan, class T>
DACO_INLINE void subtract_rows(const float* x, const T* const* row, const float* factor, int64_t n,
                               int64_t at, V* sum) {
#pragma GCC unroll 8
  for (int s = 0; s < kSpan; ++s) sum[s] = load(x + at + s * kLanes);
  for (int64_t j = 0; j < n; ++j) {
    const V f = all(factor[j]);
    const T* p = row[j] + at;
#pragma GCC unroll 8
    for (int s = 0; s < kSpan; ++s) sum[s] = fused(f, load(p + s * kLanes), sum[s]);
  }
}

template <bool absolute, class T>
Peak remaining_of(const float* start, const T* g, int64_t m, const int32_t* index, const float* factor,
                  int64_t n, float* out) {
  constexpr int kSpan = 8;
  constexpr int64_t kStep = kSpan * kLanes;
  const float lowest = -__builtin_inff();
  const T* row[kMaxPursuit];
  for (int64_t j = 0; j < n; ++j) row[j] = g + index[j] * m;
  // Only the row that was chosen last comes from memory, the others are still in a cache.
  const T* newest = row[n - 1];
  V best = all(lowest);
  int64_t i = 0;
  for (; i + kStep <= m; i += kStep) {
    for (int64_t c = 0; c < kStep; c += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(newest + i + kPrefetchedSteps * kStep + c);
    }
    V sum[kSpan];
    subtract_rows<kSpan>(start, row, factor, n, i, sum);
#pragma GCC unroll 8
    for (int s = 0; s < kSpan; ++s) {
      store(out + i + s * kLanes, sum[s]);
      best = larger(absolute ? magnitude(sum[s]) : sum[s], best);
    }
  }
  for (; i + kLanes <= m; i += kLanes) {
    V sum;
    subtract_rows<1>(start, row, factor, n, i, &sum);
    store(out + i, sum);
    best = larger(absolute ? magnitude(sum) : sum, best);
  }
  if (i < m) {
    // The lanes behind the end would count as zeros, so the rest is looked at one by one.
    V sum = load_first(start + i, m - i);
    for (int64_t j = 0; j < n; ++j) sum = fused(all(factor[j]), load_first(row[j] + i, m - i), sum);
    store_first(out + i, sum, m - i);
  }
  float value = largest(best);
  for (; i < m; ++i) {
    const float v = absolute ? __builtin_fabsf(out[i]) : out[i];
    value = v > value ? v : value;
  }
  return first_of<absolute>(out, m, value);
}

template <class T>
Peak remaining(const float* start, const void* g, int64_t m, const int32_t* index, const float* factor,
               int64_t n, float* out, bool absolute) {
  const T* gram = static_cast<const T*>(g);
  return absolute ? remaining_of<true>(start, gram, m, index, factor, n, out)
                  : remaining_of<false>(start, gram, m, index, factor, n, out);
}

}  // namespace
}  // namespace cpu
}  // namespace daco
