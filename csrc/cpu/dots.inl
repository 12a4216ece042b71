// Dot products of atoms with rows, the one place where the big matrices are read. Part of kernels.inl.
//
// Every pair of an atom and a row has one vector accumulator that meets the elements in order, and one
// reduction at its end. Tiles, passes and groups only decide when that happens, so the sum of a pair has the
// same bits in every variant. heuristics.h has the sizes and the measurements behind them.

namespace daco {
namespace cpu {
namespace {

// Atoms of a matrix [., d] as a list.
template <class T>
struct Atoms {
  const T* w;
  const int32_t* index;
  const float* bias;
  int64_t d;

  int64_t at(int64_t i) const { return index != nullptr ? index[i] : i; }
  const T* row(int64_t i) const { return w + at(i) * d; }
  float bias_of(int64_t i) const { return bias != nullptr ? bias[at(i)] : 0.f; }
};

// ---- one row: memory decides, every weight is used once

// A atoms, A streams. Where `ahead` is given, the lines that the same streams need A atoms later are asked
// for on the way: a hardware prefetcher follows a stream within a page and starts each row anew.
template <int A, bool kAhead, class T>
DACO_INLINE void lone_row(const T* const* w, const T* const* ahead, const float* x, int64_t d, float* out) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  constexpr int64_t kStep = kLine > kLanes ? kLine : kLanes;
  V sum[A];
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) sum[a] = zero();
  int64_t c = 0;
  for (; c + kStep <= d; c += kStep) {
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      if (kAhead) __builtin_prefetch(ahead[a] + c);
    }
#pragma GCC unroll 8
    for (int64_t s = 0; s < kStep; s += kLanes) {
      const V row = load(x + c + s);
#pragma GCC unroll 8
      for (int a = 0; a < A; ++a) sum[a] = fused(load(w[a] + c + s), row, sum[a]);
    }
  }
  for (; c + kLanes <= d; c += kLanes) {
    const V row = load(x + c);
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) sum[a] = fused(load(w[a] + c), row, sum[a]);
  }
  if (c < d) {
    const V row = load_first(x + c, d - c);
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) sum[a] = fused(load_first(w[a] + c, d - c), row, sum[a]);
  }
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) out[a] = total(sum[a]);
}

template <int A, class T>
__attribute__((noinline)) void dots_of_lone_row(const Atoms<T>& atoms, int64_t begin, int64_t end,
                                                const float* x, float* y) {
  int64_t i = begin;
  for (; i + A <= end; i += A) {
    const T* w[A];
    const T* ahead[A];
    for (int a = 0; a < A; ++a) w[a] = atoms.row(i + a);
    float out[A];
    if (prefetches_rows(sizeof(T)) && i + 2 * A <= end) {
      for (int a = 0; a < A; ++a) ahead[a] = atoms.row(i + A + a);
      lone_row<A, true>(w, ahead, x, atoms.d, out);
    } else {
      lone_row<A, false>(w, w, x, atoms.d, out);
    }
    for (int a = 0; a < A; ++a) y[i + a] = out[a] + atoms.bias_of(i + a);
  }
  for (; i < end; ++i) {
    const T* w = atoms.row(i);
    lone_row<1, false>(&w, &w, x, atoms.d, y + i);
    y[i] += atoms.bias_of(i);
  }
}

// ---- several rows: arithmetic decides

// A group of kGroup atoms goes through all rows in passes over a part of d: that part of the group and of a
// few rows stays in the first-level cache. Between passes the accumulators of all pairs wait in `carry`. A
// atoms and R rows over one pass; pair (a, r) waits at carry[r * kGroup + a]. Where `ahead` is given, the
// group's next pass is asked for on the way.
template <int A, int R, bool kAhead, class T, class U>
__attribute__((noinline)) void tile(const T* const* w, const float* const* x, int64_t first, int64_t n,
                                    bool fresh, V* carry, const U* const* ahead) {
  V sum[A][R];
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[a][r] = fresh ? zero() : carry[r * kGroup + a];
  }
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    V row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = load(x[r] + first + c);
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      if (kAhead) __builtin_prefetch(ahead[a] + c);
      const V weight = load(w[a] + c);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[a][r] = fused(weight, row[r], sum[a][r]);
    }
  }
  if (c < n) {
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      const V weight = load_first(w[a] + c, n - c);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[a][r] = fused(weight, load_first(x[r] + first + c, n - c), sum[a][r]);
    }
  }
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) carry[r * kGroup + a] = sum[a][r];
  }
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// R rows against the atoms of a group.
template <int R, bool kAhead, class T, class U>
DACO_INLINE void tiles(const T* const* w, int64_t atoms, const float* const* x, int64_t first, int64_t n,
                       bool fresh, V* carry, const U* const* ahead) {
  int64_t a = 0;
  for (; a + kTile.atoms <= atoms; a += kTile.atoms) {
    tile<kTile.atoms, R, kAhead>(w + a, x, first, n, fresh, carry + a, ahead + a);
  }
  for (; a < atoms; ++a) tile<1, R, kAhead>(w + a, x, first, n, fresh, carry + a, ahead + a);
}

// All rows against a group over one pass. The first tile asks for the next pass, while the memory is idle.
template <class T, class U>
DACO_INLINE void pass(const T* const* w, int64_t atoms, const float* const* x, int64_t rows, int64_t first,
                      int64_t n, bool fresh, V* carry, const U* const* ahead) {
  for (int64_t r = 0; r < rows;) {
    const int64_t rest = rows - r;
    const auto step = [&](auto tile_rows) {
      constexpr int R = decltype(tile_rows)::value;
      if (r == 0) {
        tiles<R, true>(w, atoms, x, first, n, fresh, carry, ahead);
      } else {
        tiles<R, false>(w, atoms, x + r, first, n, fresh, carry + r * kGroup, ahead);
      }
      r += R;
    };
    if (rest >= kTile.rows) {
      step(Count<kTile.rows>{});
    } else if (rest >= 4) {
      step(Count<4>{});
    } else if (rest >= 2) {
      step(Count<2>{});
    } else {
      step(Count<1>{});
    }
  }
}

static_assert(kGroup == 8, "eight_totals() sums a group");

template <class T>
void dots_of_rows(const Atoms<T>& atoms, int64_t begin, int64_t end, const float* const* x, int64_t rows,
                  float* const* y) {
  alignas(64) V carry[kCarriedRows * kGroup];
  alignas(64) float panel[kGroup * kDepth];
  const int64_t d = atoms.d;
  const int64_t passes = (d + kDepth - 1) / kDepth;
  const int64_t depth = ((d + passes - 1) / passes + 31) / 32 * 32;
  const bool packs = rows >= kPackedRows;
  for (int64_t i = begin; i < end; i += kGroup) {
    const int64_t count = end - i < kGroup ? end - i : kGroup;
    const T* row[kGroup];
    const T* next[kGroup];
    const T* w[kGroup];
    const T* ahead[kGroup];
    const float* packed[kGroup];
    for (int64_t a = 0; a < count; ++a) {
      row[a] = atoms.row(i + a);
      next[a] = i + kGroup + a < end ? atoms.row(i + kGroup + a) : row[a];
      packed[a] = panel + a * kDepth;
    }
    for (int64_t first = 0; first < d; first += depth) {
      const int64_t n = d - first < depth ? d - first : depth;
      for (int64_t a = 0; a < count; ++a) {
        w[a] = row[a] + first;
        ahead[a] = first + depth < d ? w[a] + depth : next[a];
      }
      if (packs) {
        for (int64_t a = 0; a < count; ++a) widen<T>(w[a], panel + a * kDepth, n);
        pass(packed, count, x, rows, first, n, first == 0, carry, ahead);
      } else {
        pass(w, count, x, rows, first, n, first == 0, carry, ahead);
      }
    }
    float bias[kGroup];
    for (int64_t a = 0; a < count; ++a) bias[a] = atoms.bias_of(i + a);
    for (int64_t r = 0; r < rows; ++r) {
      float sum[kGroup];
      if (count == kGroup) {
        eight_totals(carry + r * kGroup, sum);
      } else {
        for (int64_t a = 0; a < count; ++a) sum[a] = total(carry[r * kGroup + a]);
      }
      for (int64_t a = 0; a < count; ++a) y[r][i + a] = sum[a] + bias[a];
    }
  }
}

template <class T>
void dots(const void* w, const int32_t* index, int64_t begin, int64_t end, int64_t d, const float* bias,
          const float* const* x, int64_t rows, float* const* y) {
  const Atoms<T> atoms{static_cast<const T*>(w), index, bias, d};
  if (rows == 1) {
    dots_of_lone_row<kTile.lone_row_atoms>(atoms, begin, end, x[0], y[0]);
    return;
  }
  for (int64_t r = 0; r < rows; r += kCarriedRows) {
    const int64_t n = rows - r < kCarriedRows ? rows - r : kCarriedRows;
    dots_of_rows(atoms, begin, end, x + r, n, y + r);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace daco
