// What the pursuit kernels are made of: a row's state in shared memory, the search for the most correlated
// atom, exact entries of G, and the fit. A cluster of 1, 2, 4, 8 or 16 blocks works on a row; each of them
// holds the whole state and takes every decision for itself from the same bits, so only two things travel
// between blocks: the best atom of each block's share, and parts of sums over d.
//
// Results do not depend on the size of the cluster: sums over d are cut into kSegments whatever the number of
// blocks that share them, and the order inside a segment and among segments is fixed.
#pragma once

#include <type_traits>

#include "cuda/pursuit_state.h"
#include "cuda/simt.cuh"

namespace daco::cuda {

// The operands that exact entries of G and residuals are made of.
struct Dictionary {
  const void* analysis;
  const void* atoms;
  const float* scales;  // [2, m] or null
  DType weight;
  int64_t dim;
  int64_t size;      // m
  int64_t segment;   // elements of d in a segment
  bool vectors;      // rows may be read 16 bytes at a time
  bool same_matrix;  // E is A
};

DACO_DEVICE float scale_of(const Dictionary& d, int matrix, int64_t atom) {
  return d.scales != nullptr ? d.scales[matrix * d.size + atom] : 1.f;
}

// ---- the best atom

DACO_DEVICE Choice warp_best(Choice mine) {
  const uint32_t key = warp_max(mine.key);
  return {key, warp_min(mine.key == key ? mine.index : kNoIndex)};
}

// The best of the cluster; every thread of it calls and gets the same.
DACO_DEVICE Choice cluster_best(PursuitState* s, Choice mine, unsigned rank, unsigned blocks, int parity) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  mine = warp_best(mine);
  if (lane == 0) s->warps[warp] = mine;
  block_sync();
  if (warp == 0) {
    mine = lane < kPursuitWarps ? s->warps[lane] : Choice{0, kNoIndex};
    mine = warp_best(mine);
    if (lane < static_cast<int>(blocks)) *in_block(&s->peers[parity][rank], lane) = mine;
  }
  cluster_sync();
  return warp_best(lane < static_cast<int>(blocks) ? s->peers[parity][lane] : Choice{0, kNoIndex});
}

// ---- sums over d

constexpr int kGroup = 4;  // dot products that a warp has in flight: their loads wait together

// sum[q] = x . y[q] over elements [begin, end), in every lane.
template <class T>
DACO_DEVICE void dot_group(const T* x, const T* const* y, int64_t begin, int64_t end, bool vectors,
                           float* sum) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int q = 0; q < kGroup; ++q) sum[q] = 0;
  if (vectors) {
    constexpr int kCount = Pack<T>::kCount;
    // Packs of bytes widen to sixteen registers each: two at a time are enough of them.
    constexpr int kAtOnce = sizeof(T) == 1 ? 2 : kGroup;
#pragma unroll 1
    for (int64_t e = begin + lane * kCount; e < end; e += kWarp * kCount) {
      const Pack<T> a = load_pack(x + e);
#pragma unroll
      for (int first = 0; first < kGroup; first += kAtOnce) {
        Pack<T> b[kAtOnce];
#pragma unroll
        for (int q = 0; q < kAtOnce; ++q) b[q] = load_pack(y[first + q] + e);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const float left = to_float(a.value[i]);
#pragma unroll
          for (int q = 0; q < kAtOnce; ++q) {
            sum[first + q] = fmaf(left, to_float(b[q].value[i]), sum[first + q]);
          }
        }
      }
    }
  } else {
#pragma unroll 1
    for (int64_t e = begin + lane; e < end; e += kWarp) {
      const float a = to_float(x[e]);
#pragma unroll
      for (int q = 0; q < kGroup; ++q) sum[q] = fmaf(a, to_float(y[q][e]), sum[q]);
    }
  }
#pragma unroll
  for (int q = 0; q < kGroup; ++q) sum[q] = warp_sum(sum[q]);
}

// This block's parts of the dot products between rows `left`[j] and `right`[index[i]], i < count (and
// right[j] itself as number `count` when `own`), into part[first + i] of every block of the cluster.
DACO_DEVICE void spread_dots(PursuitState* s, const Dictionary& d, const void* left, const void* right,
                             int64_t j, int count, bool own, int first, unsigned rank, unsigned blocks) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int total = count + (own ? 1 : 0);
  const int groups = (total + kGroup - 1) / kGroup;
  const int mine = kSegments / static_cast<int>(blocks);
  for (int task = warp; task < groups * mine; task += kPursuitWarps) {
    const int segment = static_cast<int>(rank) * mine + task / groups;
    const int at = task % groups * kGroup;
    const int64_t begin = segment * d.segment;
    const int64_t end = begin + d.segment < d.dim ? begin + d.segment : d.dim;
    float sum[kGroup];
    with_type(d.weight, left, [&](const auto* matrix) {
      using T = typename std::remove_const<typename std::remove_pointer<decltype(matrix)>::type>::type;
      const T* y[kGroup];
#pragma unroll
      for (int q = 0; q < kGroup; ++q) {
        // Beyond the last product the last is taken again, and dropped below.
        const int i = at + q < total ? at + q : total - 1;
        const int64_t atom = i < count ? s->index[i] : j;
        y[q] = static_cast<const T*>(right) + atom * d.dim;
      }
      dot_group(matrix + j * d.dim, y, begin, end, d.vectors, sum);
    });
#pragma unroll
    for (int q = 0; q < kGroup; ++q) {
      if (at + q < total && lane < static_cast<int>(blocks)) {
        *in_block(&s->part[first + at + q][segment], lane) = sum[q];
      }
    }
  }
}

DACO_DEVICE double sum_of_parts(const float* part) {
  double sum = 0;
  for (int i = 0; i < kSegments; ++i) sum += static_cast<double>(part[i]);
  return sum;
}

// Entries of G for atom j and a support of n, from the rows of E and A; they reach column, row and the
// returned diagonal in warp 0 alone. Every thread of the cluster calls.
DACO_DEVICE double exact_entries(PursuitState* s, const Dictionary& d, int64_t j, int n, unsigned rank,
                                 unsigned blocks) {
  const int lane = threadIdx.x % kWarp;
  spread_dots(s, d, d.analysis, d.atoms, j, n, true, 0, rank, blocks);
  // One matrix in both roles makes G symmetric to the bit, apart from the scales.
  if (!d.same_matrix) spread_dots(s, d, d.atoms, d.analysis, j, n, false, n + 1, rank, blocks);
  cluster_sync();
  if (threadIdx.x >= kWarp) return 0;
  const double scale_e = scale_of(d, 0, j), scale_a = scale_of(d, 1, j);
  for (int i = lane; i < n; i += kWarp) {
    const int64_t atom = s->index[i];
    s->row[i] = sum_of_parts(s->part[i]) * scale_e * scale_of(d, 1, atom);
    const float* down = s->part[d.same_matrix ? i : n + 1 + i];
    s->column[i] = sum_of_parts(down) * scale_of(d, 0, atom) * scale_a;
  }
  warp_sync();
  return sum_of_parts(s->part[n]) * scale_e * scale_a;
}

// The same from an fp32 Gram matrix; warp 0 alone calls.
DACO_DEVICE double gram_entries(PursuitState* s, const float* gram, int64_t m, int64_t j, int n) {
  const int lane = threadIdx.x % kWarp;
  const double diagonal = gram[j * m + j];
  for (int i = lane; i < n; i += kWarp) {
    const int64_t atom = s->index[i];
    s->row[i] = gram[j * m + atom];
    s->column[i] = gram[atom * m + j];
  }
  warp_sync();
  return diagonal;
}

// ---- the fit

// Warp 0 alone: judges atom j by column, row, its diagonal and its first correlation, and if it is taken
// refits. u, v and reciprocal are left for border().
DACO_DEVICE void fit_atom(PursuitState* s, const double* inverse, int k, int n, int64_t j, float target,
                          double diagonal, bool has_gram, bool both_signs, double norm) {
  const int lane = threadIdx.x % kWarp;
  const int stride = inverse_stride(k);
  double explained = 0, moved = 0, standing = 0;
  for (int i = lane; i < n; i += kWarp) {
    s->u[i] = inverse_times(inverse, stride, n, i, s->column);
    s->v[i] = times_inverse(inverse, stride, n, i, s->row);
    explained += s->row[i] * s->u[i];
    moved += s->row[i] * s->solution[i];
    standing += s->row[i] * static_cast<double>(s->code[i]);
  }
  explained = warp_sum(explained);
  moved = warp_sum(moved);
  standing = static_cast<double>(target) - warp_sum(standing);
  if (both_signs) standing = fabs(standing);
  const double pivot = diagonal - explained;
  const Verdict verdict = judge(pivot, diagonal, n, has_gram, standing, norm);
  if (lane == 0) s->verdict = verdict;
  if (verdict != Verdict::kTaken) return;
  const double reciprocal = 1.0 / pivot;
  const double last = (static_cast<double>(target) - moved) * reciprocal;
  for (int i = lane; i < n; i += kWarp) {
    s->solution[i] -= s->u[i] * last;
    s->code[i] = static_cast<float>(s->solution[i]);
  }
  if (lane == 0) {
    s->solution[n] = last;
    s->code[n] = static_cast<float>(last);
    s->index[n] = static_cast<int32_t>(j);
    s->reciprocal = reciprocal;
  }
}

// The whole block, once it has seen the verdict kTaken; the next fit needs a barrier in between.
DACO_DEVICE void border(const PursuitState& s, double* inverse, int k, int n) {
  const int entries = (n + 1) * (n + 1);
  for (int e = threadIdx.x; e < entries; e += kPursuitThreads) {
    border_inverse(inverse, inverse_stride(k), n, e / (n + 1), e % (n + 1), s.u, s.v, s.reciprocal);
  }
}

// ---- rows

DACO_DEVICE float load_activation(DType type, const void* z, int64_t i) {
  if (type == DType::kF32) return static_cast<const float*>(z)[i];
  if (type == DType::kF16) return to_float(static_cast<const __half*>(z)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(z)[i]);
}

// |z| of row z + first, NaN if an element is not finite; the whole block calls and gets the same.
DACO_DEVICE double row_norm(PursuitState* s, DType type, const void* z, int64_t first, int64_t dim) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < dim; i += kPursuitThreads) {
    const double x = load_activation(type, z, first + i);
    sum += (x - x == 0) ? x * x : x - x;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) s->norms[threadIdx.x / kWarp] = sum;
  block_sync();
  sum = 0;
  for (int i = 0; i < kPursuitWarps; ++i) sum += s->norms[i];
  block_sync();
  return sqrt(sum);
}

// r[e] = z[e] - sum_i code[i] A[S_i, e] for one element of d.
DACO_DEVICE float residual_at(const PursuitState& s, const Dictionary& d, float z, int64_t e, int n) {
  float r = z;
  for (int i = 0; i < n; ++i) {
    const int64_t atom = s.index[i];
    float a = 0;
    with_type(d.weight, d.atoms, [&](const auto* matrix) { a = to_float(matrix[atom * d.dim + e]); });
    r = fmaf(-s.code[i] * scale_of(d, 1, atom), a, r);
  }
  return r;
}

// |z - A_S' c| squared; every thread of the cluster calls and gets the same. Only asked for with a tolerance.
DACO_DEVICE double residual_energy(PursuitState* s, const Dictionary& d, DType type, const void* z,
                                   int64_t first, int n, unsigned rank, unsigned blocks) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int mine = kSegments / static_cast<int>(blocks);
  for (int task = warp; task < mine; task += kPursuitWarps) {
    const int segment = static_cast<int>(rank) * mine + task;
    const int64_t begin = segment * d.segment;
    const int64_t end = begin + d.segment < d.dim ? begin + d.segment : d.dim;
    double sum = 0;
    for (int64_t e = begin + lane; e < end; e += kWarp) {
      const double r = residual_at(*s, d, load_activation(type, z, first + e), e, n);
      sum += r * r;
    }
    sum = warp_sum(sum);
    if (lane < static_cast<int>(blocks)) *in_block(&s->energy[segment], lane) = sum;
  }
  cluster_sync();
  double sum = 0;
  for (int i = 0; i < kSegments; ++i) sum += s->energy[i];
  return sum;
}

// Warp 0 of one block: the codes that count, in the order of choice.
DACO_DEVICE void write_codes(const PursuitState& s, int n, bool both_signs, int32_t* count, int32_t* index,
                             float* value) {
  const int lane = threadIdx.x % kWarp;
  int written = 0;
  for (int first = 0; first < n; first += kWarp) {
    const int i = first + lane;
    const bool keep = i < n && counts(s.code[i], both_signs);
    const uint32_t kept = warp_ballot(keep);
    if (keep) {
      const int at = written + count_bits(kept & ((1u << lane) - 1u));
      index[at] = s.index[i];
      value[at] = s.code[i];
    }
    written += count_bits(kept);
  }
  if (lane == 0) *count = written;
}

}  // namespace daco::cuda
