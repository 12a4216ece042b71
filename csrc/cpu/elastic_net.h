// The elastic net of rows whose correlations at the start, E z + b, are known.
//
// A working set grows by the atoms that violate the optimality conditions most; the net over it is solved
// exactly; then correlations with everything else are looked at again. Scaled by |z|, which changes nothing
// but the penalties: l1 = alpha * tau * |z|, l2 = alpha * (1 - tau).
#pragma once

#include "cpu/dictionary.h"
#include "cpu/select.h"

namespace daco {
namespace cpu {

struct SmallInverse;

// One row's progress. The working set has room for all m atoms: how many codes are not zero has no cap.
struct Net {
  const float* x;  // [d]
  double norm;
  int32_t* index;   // [m] the working set, in order of admission
  float* code;      // [m]
  float* diagonal;  // [m] G[j, j]
  float* length;    // [m] |A_j|
  float* coarse;    // [m] how far entries of this row of G may be off, the diagonal apart; below 0: not known
  uint64_t* member;  // a bit an atom: in the working set, or never to be
  int64_t count;
  int64_t modelled;  // how many of them have Gram entries in the scratch
  double floor;      // correlations this little above l1 are no violation
  int settling;      // rounds since the last admission
  bool symmetric;    // E is A: G[i, j] = G[j, i] and |A_j|^2 = G[j, j], up to fp32 rounding
  bool running;
};

// Buffers that one thread uses at a time.
struct NetScratch {
  float* correlation;     // [m]
  int32_t* candidate;     // [m]
  float* value;           // [m]
  float* column;          // [kSmallNet^2], Gram entries of the working set
  double* left;           // [kSmallNet]
  double* code;           // [kSmallNet]
  SmallInverse* inverse;  // of the row that is being solved
  float* entry;           // [kSmallNet]
  float* residual;        // [d]
  float* atom;            // [d]
};

void begin(const SteerPursuit& op, const Kernels& kernels, const float* x, double norm, const float* start,
           Net* net);

// With op.gram: one row from start to end.
void solve_net(const SteerPursuit& op, const Kernels& kernels, const float* start, Net* net,
               const NetScratch& scratch);

// Without a Gram matrix correlations come from the residual, E r + b, by reading E again, so rows go step by
// step together. One row's share of a step: takes the correlations, leaves the new residual; net->running
// says whether to go on.
void solve_net_step(const SteerPursuit& op, const Kernels& kernels, const float* correlation, float* residual,
                    Net* net, const NetScratch& scratch);

SparseCode finish(Net* net);

int64_t member_words(int64_t m);

}  // namespace cpu
}  // namespace daco
