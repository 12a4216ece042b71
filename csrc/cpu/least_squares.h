// The small system G c = t over the atoms of a support, which grows by one atom at a time.
//
// Held in fp64: at most 64 x 64, it costs nothing, and nearly parallel atoms stay well determined. G = E A'
// is symmetric and positive definite up to the rounding of its operands; a triangular factorisation without
// pivoting is stable for such a matrix and, unlike a Cholesky factor, does not pretend that a metric's
// rounded E and A give the same entry both ways.
#pragma once

#include <cstdint>

namespace daco {
namespace cpu {

class LeastSquares {
 public:
  // Doubles of memory for a support of up to k atoms.
  static int64_t doubles(int64_t k, bool non_negative);

  void reset(double* memory, int32_t k);

  int32_t size() const { return n_; }
  const double* code() const { return code_; }
  double target(int32_t i) const { return target_[i]; }  // still there after reset(), until overwritten
  double last_pivot() const { return factor_[(n_ - 1) * (k_ + 1)]; }  // of the atom that came last

  // Adds an atom j by column[i] = G[S_i, j], row[i] = G[j, S_i], G[j, j] and t_j. Refuses (false, nothing
  // changes) an atom that is nearly a combination of those present. G itself is kept for
  // solve_non_negative() only.
  bool append(const float* column, const float* row, float diagonal, float target, bool keep_gram);

  void drop_last() { --n_; }  // undoes an append() that nothing was solved after

  void solve();               // c = G^-1 t
  void solve_non_negative();  // argmin over c >= 0 of c'Gc / 2 - c't

 private:
  void solve_passive(const bool* passive, double* solution);

  int32_t n_ = 0;
  int32_t k_ = 0;              // rows of the matrices below are k apart
  double* factor_ = nullptr;   // unit lower and upper factor in one matrix
  double* forward_ = nullptr;  // lower^-1 target
  double* target_ = nullptr;
  double* code_ = nullptr;
  double* gram_ = nullptr;
  double* part_ = nullptr;  // factors of a part of gram_
};

}  // namespace cpu
}  // namespace daco
