#include "cpu/least_squares.h"

#include <algorithm>
#include <cmath>

#include "core/steer.h"

namespace daco {
namespace cpu {
namespace {

// An atom whose Schur complement is below this fraction of its own Gram entry is refused.
constexpr double kSmallestPivot = 1e-4;

// Borders n x n factors by one row and column, which lie in place and are overwritten by the factors'.
// Returns the new pivot, the Schur complement of the corner.
double border(double* factor, int32_t k, int32_t n) {
  double* row = factor + n * k;
  for (int32_t i = 0; i < n; ++i) {
    double column_sum = factor[i * k + n];
    double row_sum = row[i];
    for (int32_t j = 0; j < i; ++j) {
      column_sum -= factor[i * k + j] * factor[j * k + n];
      row_sum -= row[j] * factor[j * k + i];
    }
    factor[i * k + n] = column_sum;
    row[i] = row_sum / factor[i * k + i];
  }
  double schur = row[n];
  for (int32_t i = 0; i < n; ++i) schur -= row[i] * factor[i * k + n];
  return schur;
}

// One entry of lower^-1 b, given the n before it.
double forward_entry(const double* factor, int32_t k, int32_t n, double b, const double* before) {
  for (int32_t i = 0; i < n; ++i) b -= factor[n * k + i] * before[i];
  return b;
}

// x = upper^-1 x.
void backward(const double* factor, int32_t k, int32_t n, double* x) {
  for (int32_t i = n - 1; i >= 0; --i) {
    for (int32_t j = i + 1; j < n; ++j) x[i] -= factor[i * k + j] * x[j];
    x[i] /= factor[i * k + i];
  }
}

}  // namespace

int64_t LeastSquares::doubles(int64_t k, bool non_negative) { return (non_negative ? 3 : 1) * k * k + 3 * k; }

void LeastSquares::reset(double* memory, int32_t k) {
  n_ = 0;
  k_ = k;
  forward_ = memory;
  target_ = forward_ + k;
  code_ = target_ + k;
  factor_ = code_ + k;
  gram_ = factor_ + k * k;
  part_ = gram_ + k * k;
}

bool LeastSquares::append(const float* column, const float* row, float diagonal, float target,
                          bool keep_gram) {
  const int32_t n = n_;
  for (int32_t i = 0; i < n; ++i) {
    factor_[i * k_ + n] = column[i];
    factor_[n * k_ + i] = row[i];
  }
  factor_[n * k_ + n] = diagonal;
  const double pivot = border(factor_, k_, n);
  if (n > 0 && !(pivot >= kSmallestPivot * diagonal)) return false;
  factor_[n * k_ + n] = pivot;
  if (keep_gram) {
    for (int32_t i = 0; i < n; ++i) {
      gram_[i * k_ + n] = column[i];
      gram_[n * k_ + i] = row[i];
    }
    gram_[n * k_ + n] = diagonal;
  }
  target_[n] = target;
  forward_[n] = forward_entry(factor_, k_, n, target, forward_);
  code_[n] = 0;
  ++n_;
  return true;
}

void LeastSquares::solve() {
  std::copy(forward_, forward_ + n_, code_);
  backward(factor_, k_, n_, code_);
}

void LeastSquares::solve_passive(const bool* passive, double* solution) {
  int32_t member[kMaxPursuit];
  double packed[kMaxPursuit];
  int32_t count = 0;
  for (int32_t i = 0; i < n_; ++i) {
    if (passive[i]) member[count++] = i;
  }
  if (count == n_) {  // the usual case: all atoms are in, and their factors are there
    std::copy(forward_, forward_ + n_, solution);
    backward(factor_, k_, n_, solution);
    return;
  }
  for (int32_t i = 0; i < count; ++i) {
    for (int32_t j = 0; j <= i; ++j) {
      part_[i * k_ + j] = gram_[member[i] * k_ + member[j]];
      part_[j * k_ + i] = gram_[member[j] * k_ + member[i]];
    }
    const double diagonal = part_[i * k_ + i];
    // The whole support passed the pivot test, so a part of it does; this only guards the square of rounding.
    part_[i * k_ + i] = std::max(border(part_, k_, i), 1e-12 * diagonal);
    packed[i] = forward_entry(part_, k_, i, target_[member[i]], packed);
  }
  backward(part_, k_, count, packed);
  std::fill(solution, solution + n_, 0.0);
  for (int32_t i = 0; i < count; ++i) solution[member[i]] = packed[i];
}

// The active-set method of Lawson and Hanson, started from the previous optimum: that is feasible and exact
// on its passive set, so adding one atom takes one step as a rule.
void LeastSquares::solve_non_negative() {
  bool passive[kMaxPursuit];
  double solution[kMaxPursuit];
  double largest = 1e-300;
  for (int32_t i = 0; i < n_; ++i) {
    passive[i] = code_[i] > 0;
    largest = std::max(largest, std::fabs(target_[i]));
  }
  for (int32_t round = 0; round < 10 * n_; ++round) {
    int32_t entering = -1;
    double steepest = 1e-12 * largest;
    for (int32_t i = 0; i < n_; ++i) {
      if (passive[i]) continue;
      double gradient = target_[i];
      for (int32_t j = 0; j < n_; ++j) gradient -= gram_[i * k_ + j] * code_[j];
      if (gradient > steepest) {
        steepest = gradient;
        entering = i;
      }
    }
    if (entering < 0) return;
    passive[entering] = true;
    for (;;) {
      solve_passive(passive, solution);
      int32_t blocking = -1;
      double step = 1;
      for (int32_t i = 0; i < n_; ++i) {
        if (!passive[i] || solution[i] > 0) continue;
        const double ratio = code_[i] > 0 ? code_[i] / (code_[i] - solution[i]) : 0.0;
        if (blocking < 0 || ratio < step) {
          step = ratio;
          blocking = i;
        }
      }
      if (blocking < 0) break;
      for (int32_t i = 0; i < n_; ++i) {
        if (!passive[i]) continue;
        code_[i] += step * (solution[i] - code_[i]);
        // The blocking atom leaves even if rounding left a trace of it: every turn must remove one.
        if (i == blocking || !(code_[i] > 0)) {
          code_[i] = 0;
          passive[i] = false;
        }
      }
    }
    std::copy(solution, solution + n_, code_);
  }
}

}  // namespace cpu
}  // namespace daco
