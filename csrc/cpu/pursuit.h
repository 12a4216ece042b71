// Orthogonal matching pursuit of rows whose correlations at the start, E z + b, are known.
#pragma once

#include "cpu/kernels.h"
#include "cpu/least_squares.h"
#include "cpu/select.h"

namespace daco {
namespace cpu {

// One row's progress. Buffers of k entries, and a bit an atom for those that may not be chosen any more.
struct Pursuit {
  const float* x;  // [d]
  double norm;
  LeastSquares fit;
  int32_t* index;
  float* code;       // codes of the last refit
  float* negative;   // and their negatives, as coefficients of a subtraction
  uint64_t* barred;  // only without a Gram matrix
  double* memory;    // of `fit`
  bool running;
  // Whether `fit` holds exact entries of G, or those of an fp16 Gram matrix for the time being.
  bool exact;
};

// Buffers that one thread uses at a time.
struct PursuitScratch {
  float* correlation;  // [m], only with a Gram matrix
  float* residual;     // [d], only with a Gram matrix
  float* atom;         // [d]
  float* cross;        // [2 k]
  float* wide;         // [kGramRows, d], only with a Gram matrix and weights other than fp32
  float* entries;      // [k, k], only with a Gram matrix
};

// With op.gram: one row from start to end. `start` [m] holds the first correlations and is overwritten.
void pursue(const SteerPursuit& op, const Kernels& kernels, float* start, Pursuit* row,
            const PursuitScratch& scratch);

// Without a Gram matrix correlations come from the residual, E r + b, by reading E again; so rows go step by
// step together and each step reads E once for all of them. This is one row's share of a step: it takes the
// correlations, extends the support, and leaves the new residual. row->running says whether to go on.
void pursue_step(const SteerPursuit& op, const Kernels& kernels, float* correlation, float* residual,
                 Pursuit* row, const PursuitScratch& scratch);

int64_t barred_words(int64_t m);

void begin(const SteerPursuit& op, const float* x, double norm, Pursuit* row);
SparseCode finish(const SteerPursuit& op, Pursuit* row);

}  // namespace cpu
}  // namespace daco
