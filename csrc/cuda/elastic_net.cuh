// The elastic net by coordinate descent, a block a row: the coordinate that would move furthest moves, and
// one row of G brings the correlations up to date. On a dictionary most coordinates rest at zero for good, so
// looking for the furthest, which the block does while it updates, costs less than sweeping over all.
//
// Correlations live in shared memory where they fit, else in the workspace.
#pragma once

#include "cuda/omp.cuh"

namespace daco::cuda {

// A step that moves the fit by no more than this, relative to the unit row, is no step.
constexpr float kSmallestStep = 1e-6f;
constexpr int kMostSteps = 64000;
// Correlations are recomputed from the codes when nothing moves any more, because rounding has added up.
constexpr int kMostRefreshes = 3;

struct ElasticArgs {
  const void* gram;
  bool vectors;
  const float* diagonal;  // [m] G_jj
  const float* length;    // [m] |A_j|
  float l1;               // alpha * tau
  float l2;               // alpha * (1 - tau)
  float* dense;           // [rows, m] codes of the unit row: written, and read unless `first`
  float* alpha;           // [rows, m] correlations, or null: in shared memory, as the codes are then
  float* code;            // [rows, m], or null
  bool first;
  bool last;  // write the code list
};

// Where coordinate j would go: the minimiser with all others held still.
DACO_BOTH float coordinate_optimum(float correlation, float code, float diagonal, float l1, float l2,
                                   bool both_signs) {
  const float pull = fmaf(diagonal, code, correlation);
  const float over = fabsf(pull) - l1;
  if (!(over > 0) || (pull < 0 && !both_signs)) return 0.f;
  const float size = over / (diagonal + l2);
  return pull < 0 ? -size : size;
}

// The furthest step among this thread's atoms, after alpha -= moved * row.
template <class G>
DACO_DEVICE Choice furthest_step(const OmpArgs& a, const ElasticArgs& t, float* alpha, const float* code,
                                 const G* row, float moved) {
  const int64_t m = a.dictionary.size;
  Choice best{0, kNoIndex};
  for (int64_t chunk = threadIdx.x; chunk * kChunk < m; chunk += kPursuitThreads) {
    const int64_t first = chunk * kChunk;
    Chunk<G> entries;
    if (moved != 0) entries = load_chunk(row, chunk, m, t.vectors);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int64_t j = first + i;
      if (j >= m) break;
      float correlation = alpha[j];
      if (moved != 0) alpha[j] = correlation = fmaf(-moved, entries.at(i), correlation);
      const float c = code[j];
      // At rest at zero, as nearly all are.
      if (c == 0 && !((a.both_signs ? fabsf(correlation) : correlation) > t.l1)) continue;
      const float diagonal = t.diagonal[j];
      if (!(diagonal > 0)) continue;
      const float to = coordinate_optimum(correlation, c, diagonal, t.l1, t.l2, a.both_signs);
      const uint32_t key = key_of(fabsf(to - c) * t.length[j], false);
      if (key > best.key) best = {key, static_cast<uint32_t>(j)};
    }
  }
  return best;
}

// alpha = alpha at the start - G (c - c at the start), without what rounding has added. The whole block
// calls.
template <class G>
DACO_DEVICE void refresh(const OmpArgs& a, const ElasticArgs& t, PursuitState* s, float* alpha,
                         const float* code, int64_t row, float reciprocal) {
  const int64_t m = a.dictionary.size;
  const float* base = t.dense + row * m;
  for (int64_t j = threadIdx.x; j < m; j += kPursuitThreads) {
    alpha[j] = first_correlation(a, row, j) * reciprocal;
  }
  block_sync();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t tile = 0; tile < m; tile += kPursuitThreads) {
    const int64_t mine = tile + threadIdx.x;
    const float moved = mine < m ? code[mine] - (t.first ? 0.f : base[mine]) : 0.f;
    const uint32_t some = warp_ballot(moved != 0);
    if (lane == 0) s->warps[warp].key = some;
    block_sync();
    for (int w = 0; w < kPursuitWarps; ++w) {
      for (uint32_t bits = s->warps[w].key; bits != 0; bits &= bits - 1) {
        const int64_t i = tile + w * kWarp + count_bits((bits & (~bits + 1u)) - 1u);
        const float step = code[i] - (t.first ? 0.f : base[i]);
        const auto* entries = static_cast<const G*>(t.gram) + i * m;
        // Each thread keeps to its own atoms, so atoms need no barrier.
        for (int64_t j = threadIdx.x; j < m; j += kPursuitThreads) {
          alpha[j] = fmaf(-step, to_float(entries[j]), alpha[j]);
        }
      }
    }
    block_sync();
  }
}

// The codes other than zero, in rising order of index, brought back to the row's norm. The whole block calls.
DACO_DEVICE void write_dense_codes(const OmpArgs& a, PursuitState* s, const float* code, int64_t row,
                                   double norm) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t m = a.dictionary.size;
  int32_t written = 0;
  for (int64_t tile = 0; tile < m; tile += kPursuitThreads) {
    const int64_t j = tile + threadIdx.x;
    const float value = j < m ? static_cast<float>(code[j] * norm) : 0.f;
    const uint32_t kept = warp_ballot(value != 0);
    if (lane == 0) s->warps[warp].key = static_cast<uint32_t>(count_bits(kept));
    block_sync();
    int32_t before = written;
    for (int w = 0; w < kPursuitWarps; ++w) {
      const auto count = static_cast<int32_t>(s->warps[w].key);
      if (w < warp) before += count;
      written += count;
    }
    if (value != 0) {
      const int64_t at = row * a.capacity + before + count_bits(kept & ((1u << lane) - 1u));
      a.index[at] = static_cast<int32_t>(j);
      a.value[at] = value;
    }
    block_sync();
  }
  if (threadIdx.x == 0) a.count[row] = written;
}

// grid: rows.
template <class G>
DACO_DEVICE void descend(const OmpArgs& a, const ElasticArgs& t) {
  const int64_t m = a.dictionary.size;
  const int64_t row = blockIdx.x;
  auto* s = reinterpret_cast<PursuitState*>(dynamic_shared());
  after_previous();
  if (!is_coded(a.slots[row], a.policies)) {
    if (threadIdx.x == 0) a.count[row] = -1;
    return;
  }
  const double norm = row_norm(s, a.activation, a.z, row * a.z_stride, a.dictionary.dim);
  if (!(norm > 0)) {
    if (threadIdx.x == 0) a.count[row] = norm == 0 ? 0 : -1;
    return;
  }
  const auto reciprocal = static_cast<float>(1.0 / norm);
  auto* shared = reinterpret_cast<float*>(dynamic_shared() + padded(sizeof(PursuitState)));
  float* alpha = t.alpha != nullptr ? t.alpha + row * m : shared;
  float* code = t.alpha != nullptr ? t.code + row * m : shared + m;
  for (int64_t chunk = threadIdx.x; chunk * kChunk < m; chunk += kPursuitThreads) {
    for (int64_t j = chunk * kChunk; j < m && j < (chunk + 1) * kChunk; ++j) {
      alpha[j] = first_correlation(a, row, j) * reciprocal;
      code[j] = t.first ? 0.f : t.dense[row * m + j];
    }
  }
  block_sync();

  const auto* gram = static_cast<const G*>(t.gram);
  Choice mine = furthest_step<G>(a, t, alpha, code, nullptr, 0.f);
  int refreshes = 0;
  bool moved_since = false;
  for (int step = 0; step < kMostSteps; ++step) {
    const Choice best = cluster_best(s, mine, 0, 1, step & 1);
    if (!(value_of(best.key) > kSmallestStep)) {
      if (!moved_since || refreshes == kMostRefreshes) break;
      ++refreshes;
      moved_since = false;
      refresh<G>(a, t, s, alpha, code, row, reciprocal);
      mine = furthest_step<G>(a, t, alpha, code, nullptr, 0.f);
      continue;
    }
    moved_since = true;
    const int64_t j = best.index;
    const float c = code[j];
    const float to = coordinate_optimum(alpha[j], c, t.diagonal[j], t.l1, t.l2, a.both_signs);
    block_sync();  // all have read alpha[j] and code[j]
    if (threadIdx.x == 0) code[j] = to;
    block_sync();
    mine = furthest_step<G>(a, t, alpha, code, gram + j * m, to - c);
  }
  block_sync();
  if (!t.last) {
    for (int64_t j = threadIdx.x; j < m; j += kPursuitThreads) t.dense[row * m + j] = code[j];
  } else {
    write_dense_codes(a, s, code, row, norm);
  }
}

// z - A' c |z| of every row, in fp32: what the correlations of the next descent are computed from. grid:
// rows.
DACO_DEVICE void residual_of_dense(const OmpArgs& a, const float* dense, float* residual) {
  const Dictionary& d = a.dictionary;
  const int64_t row = blockIdx.x;
  auto* s = reinterpret_cast<PursuitState*>(dynamic_shared());
  after_previous();
  if (!is_coded(a.slots[row], a.policies)) return;
  const double norm = row_norm(s, a.activation, a.z, row * a.z_stride, d.dim);
  if (!(norm > 0)) return;
  const float* code = dense + row * d.size;
  float* r = residual + row * d.dim;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t e = threadIdx.x; e < d.dim; e += kPursuitThreads) {
    r[e] = load_activation(a.activation, a.z, row * a.z_stride + e);
  }
  for (int64_t tile = 0; tile < d.size; tile += kPursuitThreads) {
    const int64_t mine = tile + threadIdx.x;
    const uint32_t some = warp_ballot(mine < d.size && code[mine] != 0);
    if (lane == 0) s->warps[warp].key = some;
    block_sync();
    for (int w = 0; w < kPursuitWarps; ++w) {
      for (uint32_t bits = s->warps[w].key; bits != 0; bits &= bits - 1) {
        const int64_t i = tile + w * kWarp + count_bits((bits & (~bits + 1u)) - 1u);
        const auto c = static_cast<float>(code[i] * norm) * scale_of(d, 1, i);
        with_type(d.weight, d.atoms, [&](const auto* matrix) {
          for (int64_t e = threadIdx.x; e < d.dim; e += kPursuitThreads) {
            r[e] = fmaf(-c, to_float(matrix[i * d.dim + e]), r[e]);
          }
        });
      }
    }
    block_sync();
  }
}

// A warp an atom: its length and its entry of G.
template <class G>
DACO_DEVICE void describe_atoms(const Dictionary& d, const G* gram, float* diagonal, float* length) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kPursuitWarps + threadIdx.x / kWarp;
  if (j >= d.size) return;
  double sum = 0;
  with_type(d.weight, d.atoms, [&](const auto* matrix) {
    for (int64_t e = threadIdx.x % kWarp; e < d.dim; e += kWarp) {
      const double x = to_float(matrix[j * d.dim + e]);
      sum += x * x;
    }
  });
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) {
    length[j] = static_cast<float>(sqrt(sum)) * scale_of(d, 1, j);
    diagonal[j] = to_float(gram[j * d.size + j]);
  }
}

}  // namespace daco::cuda
