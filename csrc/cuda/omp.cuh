// Orthogonal matching pursuit: the kernel with a Gram matrix, one cluster a row from start to end, and the
// step without one, which recomputes correlations from residuals between launches.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/pursuit.cuh"

namespace daco::cuda {

// What both kernels need to know of a call. Rows are counted from the first of this launch.
struct OmpArgs {
  Dictionary dictionary;
  const void* z;  // row 0 of this launch
  int64_t z_stride;
  DType activation;
  const int32_t* slots;
  int32_t policies;
  int32_t k;
  float tol;
  bool both_signs;
  const float* start;  // [rows, m] E z, plus b unless `bias` is given; rows are `stride` apart
  int64_t stride;
  const float* bias;  // [m] still to be added to start, or null
  int32_t* count;     // the code list
  int32_t* index;
  float* value;
  int64_t capacity;
};

// The cluster kernel's share of the plan.
struct ResidentArgs {
  const void* gram;
  bool vectors;    // rows of G may be read 16 bytes at a time
  int64_t chunks;  // of a block
  int32_t cached;  // rows of G that a block keeps in shared memory
};

// The state that the stepping kernel keeps in the workspace, one a row.
struct SteppedArgs {
  const float* alpha;  // [rows, m] correlations of this step, spaced as `start`
  const float* bias;   // [m] still to be added to alpha, or null
  float* residual;     // [rows, d]
  unsigned char* state;
  int64_t state_bytes;
  bool first;
};

DACO_DEVICE bool is_coded(int32_t slot, int32_t policies) { return slot >= kSlotObserve && slot < policies; }

DACO_DEVICE float first_correlation(const OmpArgs& a, int64_t row, int64_t j) {
  const float x = a.start[row * a.stride + j];
  return a.bias != nullptr ? x + a.bias[j] : x;
}

DACO_DEVICE float not_a_number() {
  union {
    uint32_t u;
    float f;
  } bits;
  bits.u = 0x7fc00000u;
  return bits.f;
}

// Eight entries of a row of G, as they are stored.
template <class G>
struct Chunk {
  static constexpr int kPacks = kChunk / Pack<G>::kCount;
  Pack<G> pack[kPacks];

  DACO_DEVICE float at(int i) const { return to_float(pack[i / Pack<G>::kCount].value[i % Pack<G>::kCount]); }
};

template <class G>
DACO_DEVICE Chunk<G> load_chunk(const G* row, int64_t chunk, int64_t m, bool vectors) {
  constexpr int kCount = Pack<G>::kCount;
  Chunk<G> x;
  const int64_t first = chunk * kChunk;
  if (vectors) {
#pragma unroll
    for (int p = 0; p < Chunk<G>::kPacks; ++p) x.pack[p] = load_pack(row + first + p * kCount);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      x.pack[i / kCount].value[i % kCount] = first + i < m ? row[first + i] : G(0.f);
    }
  }
  return x;
}

// Rows of G in shared memory, in planes of 16-byte packs so that a warp's accesses fall into different banks.
template <class G>
struct RowCache {
  Pack<G>* base;
  int64_t chunks;

  DACO_DEVICE Pack<G>* at(int row, int pack, int64_t chunk) const {
    return base + (static_cast<int64_t>(row) * Chunk<G>::kPacks + pack) * chunks + chunk;
  }
  // Starts to bring a chunk in. A thread reads back only its own chunks, so async_wait() is all that stands
  // between.
  DACO_DEVICE void fetch(int row, int64_t chunk, const G* from, int64_t first_chunk, int64_t m,
                         bool vectors) const {
    if (vectors) {
#pragma unroll
      for (int p = 0; p < Chunk<G>::kPacks; ++p) {
        async_copy16(at(row, p, chunk), from + (first_chunk + chunk) * kChunk + p * Pack<G>::kCount);
      }
    } else {
      const Chunk<G> x = load_chunk(from, first_chunk + chunk, m, false);
#pragma unroll
      for (int p = 0; p < Chunk<G>::kPacks; ++p) *at(row, p, chunk) = x.pack[p];
    }
  }
  DACO_DEVICE Chunk<G> load(int row, int64_t chunk) const {
    Chunk<G> x;
#pragma unroll
    for (int p = 0; p < Chunk<G>::kPacks; ++p) x.pack[p] = load_pack(at(row, p, chunk)->value);
    return x;
  }
};

template <class G>
DACO_DEVICE void subtract(float* alpha, float code, const Chunk<G>& row) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) alpha[i] = fmaf(-code, row.at(i), alpha[i]);
}

// The best of this thread's atoms under alpha = start - G[S, :]' c. `kChunks` is how many chunks a thread
// has.
template <class G, int kChunks>
DACO_DEVICE Choice best_of_mine(const PursuitState& s, const float (&start)[kChunks][kChunk], const G* gram,
                                const RowCache<G>& cache, const ResidentArgs& r, int64_t m,
                                int64_t first_chunk, int n, bool absolute) {
  Choice best{0, kNoIndex};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t local = threadIdx.x + static_cast<int64_t>(c) * kPursuitThreads;
    if (local >= r.chunks || (first_chunk + local) * kChunk >= m) continue;
    float alpha[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) alpha[i] = start[c][i];
    const int cached = n < r.cached ? n : r.cached;
#pragma unroll 4
    for (int i = 0; i < cached; ++i) subtract(alpha, s.code[i], cache.load(i, local));
#pragma unroll 2
    for (int i = cached; i < n; ++i) {
      subtract(alpha, s.code[i], load_chunk(gram + s.index[i] * m, first_chunk + local, m, r.vectors));
    }
    const auto index = static_cast<uint32_t>((first_chunk + local) * kChunk);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      // In rising order of index, so a tie keeps the lower.
      const uint32_t key = key_of(alpha[i], absolute);
      if (key > best.key) best = {key, index + i};
    }
  }
  return best;
}

// grid: rows x cluster size. Every block of a cluster runs the same control flow on the same bits.
template <class G, int kChunks>
DACO_DEVICE void pursue_resident(const OmpArgs& a, const ResidentArgs& r, unsigned blocks) {
  const Dictionary& d = a.dictionary;
  const int64_t m = d.size;
  const unsigned rank = blocks > 1 ? cluster_rank() : 0;
  const int64_t row = blockIdx.x / blocks;
  auto* s = reinterpret_cast<PursuitState*>(dynamic_shared());
  auto* inverse = reinterpret_cast<double*>(dynamic_shared() + padded(sizeof(PursuitState)));
  const RowCache<G> cache{
      reinterpret_cast<Pack<G>*>(reinterpret_cast<unsigned char*>(inverse) + inverse_bytes(a.k)), r.chunks};
  const auto* gram = static_cast<const G*>(r.gram);

  // z and slots belong to the caller; no kernel of this call has written them before.
  const bool coded = is_coded(a.slots[row], a.policies);
  const double norm = coded ? row_norm(s, a.activation, a.z, row * a.z_stride, d.dim) : 0.0;
  after_previous();
  start_next();
  if (!coded) {
    if (rank == 0 && threadIdx.x == 0) a.count[row] = -1;
    return;
  }
  if (!(norm > 0)) {  // a zero row, whose code is empty, or one that is not finite
    if (rank == 0 && threadIdx.x == 0) a.count[row] = norm == 0 ? 0 : -1;
    return;
  }

  const int64_t first_chunk = rank * r.chunks;
  float start[kChunks][kChunk];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t local = threadIdx.x + static_cast<int64_t>(c) * kPursuitThreads;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int64_t j = (first_chunk + local) * kChunk + i;
      start[c][i] = local < r.chunks && j < m ? first_correlation(a, row, j) : not_a_number();
    }
  }
  cluster_sync();  // no block writes into another that has not started

  int n = 0;
  for (int step = 0; n < a.k; ++step) {
    if (a.tol > 0) {
      const double energy = residual_energy(s, d, a.activation, a.z, row * a.z_stride, n, rank, blocks);
      if (sqrt(energy) <= static_cast<double>(a.tol) * norm) break;
    }
    async_wait();
    const Choice mine = best_of_mine<G, kChunks>(*s, start, gram, cache, r, m, first_chunk, n, a.both_signs);
    const Choice best = cluster_best(s, mine, rank, blocks, step & 1);
    if (!(static_cast<double>(value_of(best.key)) > kSmallestCorrelation * norm)) break;
    const int64_t j = best.index;

    // On its way while the entries are found. If the atom is skipped the next one takes its place.
    if (n < r.cached && n + 1 < a.k) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int64_t local = threadIdx.x + static_cast<int64_t>(c) * kPursuitThreads;
        if (local < r.chunks && (first_chunk + local) * kChunk < m) {
          cache.fetch(n, local, gram + j * m, first_chunk, m, r.vectors);
        }
      }
    }
    float target = 0;
    if (threadIdx.x < kWarp) target = first_correlation(a, row, j);
    double diagonal = 0;
    if constexpr (sizeof(G) == sizeof(float)) {
      if (threadIdx.x < kWarp) diagonal = gram_entries(s, reinterpret_cast<const float*>(gram), m, j, n);
    } else {
      diagonal = exact_entries(s, d, j, n, rank, blocks);
    }
    if (threadIdx.x < kWarp) fit_atom(s, inverse, a.k, n, j, target, diagonal, true, a.both_signs, norm);
    block_sync();

    // Barred from now on, taken or not.
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int64_t local = threadIdx.x + static_cast<int64_t>(c) * kPursuitThreads;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if ((first_chunk + local) * kChunk + i == j) start[c][i] = not_a_number();
      }
    }
    if (s->verdict == Verdict::kOver) break;
    if (s->verdict == Verdict::kSkipped) continue;
    border(*s, inverse, a.k, n);
    ++n;
  }
  async_wait();
  if (rank == 0 && threadIdx.x < kWarp) {
    write_codes(*s, n, a.both_signs, a.count + row, a.index + row * a.capacity, a.value + row * a.capacity);
  }
  cluster_sync();  // no block leaves while another may still write into it
}

// ---- without a Gram matrix

// grid: rows. One choice and one refit, and the residual that the next correlations are computed from.
DACO_DEVICE void pursue_stepped(const OmpArgs& a, const SteppedArgs& t) {
  const Dictionary& d = a.dictionary;
  const int64_t row = blockIdx.x;
  auto* s = reinterpret_cast<PursuitState*>(dynamic_shared());
  auto* inverse = reinterpret_cast<double*>(dynamic_shared() + padded(sizeof(PursuitState)));
  auto* kept = reinterpret_cast<SteppedState*>(t.state + row * t.state_bytes);
  auto* kept_inverse =
      reinterpret_cast<double*>(reinterpret_cast<unsigned char*>(kept) + padded(sizeof(SteppedState)));
  auto* barred = reinterpret_cast<uint32_t*>(kept_inverse + inverse_entries(a.k));

  after_previous();
  double norm;
  int n = 0;
  if (t.first) {
    const bool coded = is_coded(a.slots[row], a.policies);
    norm = coded ? row_norm(s, a.activation, a.z, row * a.z_stride, d.dim) : 0.0;
    if (threadIdx.x == 0) {
      kept->norm = norm;
      kept->count = 0;
      kept->running = norm > 0;
      a.count[row] = coded && norm >= 0 ? 0 : -1;
    }
    if (!(norm > 0)) return;
    for (int64_t w = threadIdx.x; w < barred_words(d.size); w += kPursuitThreads) barred[w] = 0;
  } else {
    if (kept->running == 0) return;
    norm = kept->norm;
    n = kept->count;
    for (int i = threadIdx.x; i < n; i += kPursuitThreads) {
      s->solution[i] = kept->solution[i];
      s->code[i] = kept->code[i];
      s->index[i] = kept->index[i];
    }
    for (int e = threadIdx.x; e < inverse_entries(a.k); e += kPursuitThreads) inverse[e] = kept_inverse[e];
  }
  block_sync();

  bool taken = false;
  if (a.tol > 0) {
    const double energy = residual_energy(s, d, a.activation, a.z, row * a.z_stride, n, 0, 1);
    taken = sqrt(energy) <= static_cast<double>(a.tol) * norm;
  }
  bool running = !taken;
  for (int turn = 0; running && !taken; ++turn) {
    Choice mine{0, kNoIndex};
    const float* alpha = t.alpha + row * a.stride;
    for (int64_t j = threadIdx.x; j < d.size; j += kPursuitThreads) {
      if ((barred[j / 32] >> (j % 32) & 1u) != 0) continue;
      const uint32_t key = key_of(t.bias != nullptr ? alpha[j] + t.bias[j] : alpha[j], a.both_signs);
      if (key > mine.key) mine = {key, static_cast<uint32_t>(j)};
    }
    const Choice best = cluster_best(s, mine, 0, 1, turn & 1);
    if (!(static_cast<double>(value_of(best.key)) > kSmallestCorrelation * norm)) {
      running = false;
      break;
    }
    const int64_t j = best.index;
    const double diagonal = exact_entries(s, d, j, n, 0, 1);
    if (threadIdx.x < kWarp) {
      const float target = first_correlation(a, row, j);
      fit_atom(s, inverse, a.k, n, j, target, diagonal, false, a.both_signs, norm);
    }
    if (threadIdx.x == 0) barred[j / 32] |= 1u << (j % 32);
    block_sync();
    taken = s->verdict == Verdict::kTaken;
  }
  if (!running) {
    if (threadIdx.x == 0) kept->running = 0;
    return;
  }
  border(*s, inverse, a.k, n);
  ++n;
  block_sync();
  if (threadIdx.x < kWarp) {
    write_codes(*s, n, a.both_signs, a.count + row, a.index + row * a.capacity, a.value + row * a.capacity);
  }
  for (int i = threadIdx.x; i < n; i += kPursuitThreads) {
    kept->solution[i] = s->solution[i];
    kept->code[i] = s->code[i];
    kept->index[i] = s->index[i];
  }
  for (int e = threadIdx.x; e < inverse_entries(a.k); e += kPursuitThreads) kept_inverse[e] = inverse[e];
  if (threadIdx.x == 0) {
    kept->count = n;
    kept->running = n < a.k;
  }
  if (n == a.k) return;
  for (int64_t e = threadIdx.x; e < d.dim; e += kPursuitThreads) {
    const float z = load_activation(a.activation, a.z, row * a.z_stride + e);
    t.residual[row * d.dim + e] = residual_at(*s, d, z, e, n);
  }
}

}  // namespace daco::cuda
