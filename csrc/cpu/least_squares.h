// The small symmetric system G c = t over the atoms of a support, which grows by one atom at a time.
// Held in fp64: at most 64 x 64, it costs nothing, and nearly parallel atoms stay well determined.
#pragma once

#include <cstdint>

namespace daco {
namespace cpu {

class LeastSquares {
 public:
  // Doubles of memory for a support of up to k atoms.
  static int64_t doubles(int64_t k);

  void reset(double* memory, int32_t k);

  int32_t size() const { return n_; }
  const double* code() const { return code_; }

  // Adds an atom with Gram entries cross[0..size) and `diagonal`, and right-hand side `target`. Refuses
  // (false, nothing changes) an atom that is nearly a combination of those present.
  bool append(const float* cross, float diagonal, float target);

  void solve();               // c = G^-1 t
  void solve_non_negative();  // argmin over c >= 0 of c'Gc / 2 - c't

 private:
  void solve_passive(const bool* passive, double* solution) const;

  int32_t n_ = 0;
  double* factor_ = nullptr;  // lower Cholesky factor, packed by rows
  double* gram_ = nullptr;    // lower triangle, packed by rows
  double* part_ = nullptr;    // factor of a part of gram_
  double* target_ = nullptr;
  double* forward_ = nullptr;  // factor^-1 target
  double* code_ = nullptr;
};

}  // namespace cpu
}  // namespace daco
