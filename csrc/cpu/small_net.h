// The elastic net on a set of atoms small enough for a table of their Gram entries:
//
//   minimise  c'Gc / 2 - c't + l1 * |c|_1 + l2 * |c|^2 / 2     (c >= 0 unless both signs are allowed)
//
// Held in fp64. Coordinate descent finds the atoms that stay; on those the optimum is the solution of a
// linear system, which takes out the many last sweeps that nearly parallel atoms would cost.
#pragma once

#include <cstdint>

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

struct SmallNet {
  int64_t n = 0;
  const float* column = nullptr;  // column[j * kSmallNet + i] = G[i, j]; G[j, j] <= 0 keeps j at zero
  const float* length = nullptr;  // [n] |A_j|, what a step of c_j is measured in
  double* left = nullptr;         // [n] t - G c at the start, and kept so
  double* code = nullptr;         // [n] c, where the search starts and ends
  double* factor = nullptr;       // [kSmallSolve^2] overwritten
  double l1 = 0, l2 = 0;
  bool both_signs = false;
  double tolerance = 0;  // steps of this length are no steps any more

  void solve();

 private:
  double diagonal(int64_t j) const { return column[j * kSmallNet + j]; }
  void move(int64_t j, double by);
  double sweep();
  bool solve_support();
  bool solve_step(const int32_t* member, int64_t count, double* step) const;
  int64_t entering(double* sign) const;
};

}  // namespace cpu
}  // namespace daco
