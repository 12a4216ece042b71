// The least-squares fit of a pursuit, G[S, S] c = t, as one thread's share of the work: the kernels give each
// lane an entry, a test on the CPU loops over the lanes.
//
// What is kept is the inverse of G[S, S] in fp64, bordered by a row and a column as an atom joins. Unlike a
// triangular factor that needs no chain of dependent substitutions, so a step takes two short products
// instead of two passes over the support one entry at a time. The pivot test below keeps the bordering
// stable: no atom joins whose Schur complement is under 1e-4 of its own entry.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DACO_FIT __host__ __device__ __forceinline__
#else
#define DACO_FIT inline
#endif

namespace daco::cuda {

// Pursuit stops when the largest correlation is at most this fraction of the row's norm.
constexpr double kSmallestCorrelation = 1e-5;
// An atom whose Schur complement is below this fraction of its own Gram entry is refused.
constexpr double kSmallestPivot = 1e-4;

// Rows of the inverse are k + 1 apart, so that lanes that read down a column use different banks.
DACO_FIT constexpr int inverse_stride(int k) { return k + 1; }
DACO_FIT constexpr int inverse_entries(int k) { return k * inverse_stride(k); }

// Entry i of inverse * x. Four sums run at a time: one alone would wait for its own latency.
DACO_FIT double inverse_times(const double* inverse, int stride, int n, int i, const double* x) {
  double sum[4] = {0, 0, 0, 0};
  const double* row = inverse + i * stride;
  int j = 0;
  for (; j + 4 <= n; j += 4) {
    for (int q = 0; q < 4; ++q) sum[q] += row[j + q] * x[j + q];
  }
  for (; j < n; ++j) sum[0] += row[j] * x[j];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Entry i of x * inverse.
DACO_FIT double times_inverse(const double* inverse, int stride, int n, int i, const double* x) {
  double sum[4] = {0, 0, 0, 0};
  int j = 0;
  for (; j + 4 <= n; j += 4) {
    for (int q = 0; q < 4; ++q) sum[q] += x[j + q] * inverse[(j + q) * stride + i];
  }
  for (; j < n; ++j) sum[0] += x[j] * inverse[j * stride + i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Borders one entry of the (n + 1) x (n + 1) inverse: u = inverse * column, v = row * inverse, and the
// reciprocal of the pivot. Every entry is written by one call; the calls may run in any order.
DACO_FIT void border_inverse(double* inverse, int stride, int n, int i, int j, const double* u,
                             const double* v, double reciprocal) {
  double* entry = inverse + i * stride + j;
  if (i < n && j < n) {
    *entry += u[i] * v[j] * reciprocal;
  } else if (i < n) {
    *entry = -u[i] * reciprocal;
  } else if (j < n) {
    *entry = -v[j] * reciprocal;
  } else {
    *entry = reciprocal;
  }
}

enum class Verdict : int32_t {
  kTaken = 0,    // the atom joins the support
  kSkipped = 1,  // nearly a combination of those present, or of no length: never looked at again
  kOver = 2,     // its correlation is rounding of the Gram matrix: pursuit ends
};

// pivot = G_jj - row * inverse * column; standing = t_j - row * c in exact entries, its absolute value with
// sign signed. Without a Gram matrix correlations are exact and nothing needs to stand.
DACO_FIT Verdict judge(double pivot, double diagonal, int n, bool has_gram, double standing, double norm) {
  if (!(diagonal > 0)) return Verdict::kSkipped;
  if (n > 0 && !(pivot >= kSmallestPivot * diagonal)) return Verdict::kSkipped;
  if (has_gram && !(standing > kSmallestCorrelation * norm)) return Verdict::kOver;
  return Verdict::kTaken;
}

// The most correlated atom so far. A key orders as the correlation does and is 0 for what can never be
// chosen: NaN, which marks atoms that are barred, and whatever is not positive.
struct Choice {
  uint32_t key;
  uint32_t index;
};
constexpr uint32_t kNoIndex = 0xffffffffu;

DACO_FIT uint32_t key_of(float correlation, bool absolute) {
  const float x = absolute && correlation < 0 ? -correlation : correlation;
  union {
    float f;
    uint32_t u;
  } bits;
  bits.f = x;
  return x > 0 ? bits.u : 0;
}

DACO_FIT float value_of(uint32_t key) {
  union {
    uint32_t u;
    float f;
  } bits;
  bits.u = key;
  return bits.f;
}

// Ties go to the lower index.
DACO_FIT bool beats(const Choice& a, const Choice& b) {
  return a.key > b.key || (a.key == b.key && a.index < b.index);
}

// A code counts if it is above zero, with sign signed if it is not zero.
DACO_FIT bool counts(float code, bool both_signs) { return both_signs ? code != 0 : code > 0; }

}  // namespace daco::cuda
