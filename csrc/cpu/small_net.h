// The elastic net on a set of atoms small enough for a table of their Gram entries:
//
//   minimise  c'Gc / 2 - c't + l1 * |c|_1 + l2 * |c|^2 / 2     (c >= 0 unless both signs are allowed)
//
// Held in fp64. Coordinate descent finds the atoms that stay; on those the optimum is the solution of a
// linear system, which takes out the many last sweeps that nearly parallel atoms would cost.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace daco {
namespace cpu {

constexpr int64_t kSmallNet = 512;    // most atoms of the table
constexpr int64_t kSmallSolve = 256;  // most non-zero codes that are solved for at once
constexpr int kNetSweeps = 1000;      // most sweeps of one descent

// The minimiser along one coordinate, times its curvature.
inline double shrink(double v, double l1, bool both_signs) {
  if (v > l1) return v - l1;
  return both_signs && v < -l1 ? v + l1 : 0.0;
}

// The inverse of (G + l2) over some atoms of the table, row i and column i for member[i]. It follows the
// support one atom at a time, which costs a hundredth of solving afresh, and stays valid while the table only
// grows.
struct SmallInverse {
  int64_t count;
  int32_t member[kSmallSolve];
  double entry[kSmallSolve * kSmallSolve];
};

struct SmallNet {
  const Kernels* kernels = nullptr;
  int64_t n = 0;
  const float* column = nullptr;    // column[j * kSmallNet + i] = G[i, j]; G[j, j] <= 0 keeps j at zero
  const float* length = nullptr;    // [n] |A_j|, what a step of c_j is measured in
  double* left = nullptr;           // [n] t - G c at the start, and kept so
  double* code = nullptr;           // [n] c, where the search starts and ends
  SmallInverse* inverse = nullptr;  // of what was solved before, or with a count of 0
  double l1 = 0, l2 = 0;
  bool both_signs = false;
  double tolerance = 0;  // steps of this length are no steps any more

  void solve();
  void approach();  // sweeps alone, for a set that is to grow or an answer that is to be refined

 private:
  double diagonal(int64_t j) const { return column[j * kSmallNet + j]; }
  void move(int64_t j, double by);
  double sweep();
  bool solve_support();
  bool invert_over(int64_t enters);
  bool include(int32_t j);
  bool exclude(int64_t at);
  double gradient(int64_t j, double sign) const;
  int64_t entering(double* sign) const;
};

}  // namespace cpu
}  // namespace daco
