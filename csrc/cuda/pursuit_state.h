// Sizes and structures that the pursuit kernels and their planning share. Free of CUDA, so that planning is
// tested without it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/steer.h"
#include "cuda/fit.h"

namespace daco::cuda {

constexpr int kPursuitThreads = 512;
constexpr int kPursuitWarps = kPursuitThreads / 32;
constexpr int kMaxCluster = 16;
constexpr int kSegments = 16;  // a multiple of every cluster size

// A row's pursuit, in shared memory. `inverse`, inverse_entries(k) doubles, lies elsewhere.
struct PursuitState {
  double solution[kMaxPursuit];
  double u[kMaxPursuit];
  double v[kMaxPursuit];
  double column[kMaxPursuit];  // G[S, j]
  double row[kMaxPursuit];     // G[j, S]
  double reciprocal;           // of the last pivot
  double energy[kSegments];    // squared norms of parts of the residual
  double norms[kPursuitWarps];
  // Parts of dot products: first those with the rows of A, the atom's own last, then those with rows of E.
  float part[2 * kMaxPursuit + 1][kSegments + 1];
  Choice peers[2][kMaxCluster];  // by parity of the step: a block may be a step ahead of its peers
  Choice warps[kPursuitWarps];
  float code[kMaxPursuit];
  int32_t index[kMaxPursuit];
  Verdict verdict;
};

constexpr int kChunk = 8;  // atoms that a thread takes together: 16 bytes of an fp16 Gram matrix

// The parts of a row's state in the workspace; `inverse` follows at the next multiple of 16 bytes.
struct SteppedState {
  double norm;
  double solution[kMaxPursuit];
  float code[kMaxPursuit];
  int32_t index[kMaxPursuit];
  int32_t count;
  int32_t running;
};

DACO_FIT constexpr int64_t barred_words(int64_t m) { return (m + 31) / 32; }

// Where the inverse lies behind either structure.
DACO_FIT constexpr size_t padded(size_t bytes) { return (bytes + 15) / 16 * 16; }
DACO_FIT constexpr size_t inverse_bytes(int k) {
  return padded(sizeof(double) * static_cast<size_t>(inverse_entries(k)));
}

}  // namespace daco::cuda
