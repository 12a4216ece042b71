#include "cpu/least_squares.h"

#include <algorithm>
#include <cmath>

#include "core/steer.h"

namespace daco {
namespace cpu {
namespace {

// An atom whose Schur complement is below this fraction of its own Gram entry is refused.
constexpr double kSmallestPivot = 1e-4;

constexpr int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

// Solves L y = b in place, L packed lower with n rows.
void forward(const double* factor, int32_t n, double* b) {
  for (int32_t i = 0; i < n; ++i) {
    const double* row = factor + triangle(i);
    double sum = b[i];
    for (int32_t j = 0; j < i; ++j) sum -= row[j] * b[j];
    b[i] = sum / row[i];
  }
}

// Solves L' x = b in place.
void backward(const double* factor, int32_t n, double* b) {
  for (int32_t i = n - 1; i >= 0; --i) {
    const double* row = factor + triangle(i);
    b[i] /= row[i];
    for (int32_t j = 0; j < i; ++j) b[j] -= row[j] * b[i];
  }
}

}  // namespace

int64_t LeastSquares::doubles(int64_t k) { return 3 * triangle(k) + 3 * k; }

void LeastSquares::reset(double* memory, int32_t k) {
  n_ = 0;
  factor_ = memory;
  gram_ = factor_ + triangle(k);
  part_ = gram_ + triangle(k);
  target_ = part_ + triangle(k);
  forward_ = target_ + k;
  code_ = forward_ + k;
}

bool LeastSquares::append(const float* cross, float diagonal, float target) {
  double* row = factor_ + triangle(n_);
  std::copy(cross, cross + n_, row);
  forward(factor_, n_, row);
  double schur = diagonal;
  double reached = 0;
  for (int32_t i = 0; i < n_; ++i) {
    schur -= row[i] * row[i];
    reached += row[i] * forward_[i];
  }
  if (n_ > 0 && !(schur >= kSmallestPivot * diagonal)) return false;
  row[n_] = std::sqrt(schur);
  std::copy(cross, cross + n_, gram_ + triangle(n_));
  gram_[triangle(n_) + n_] = diagonal;
  target_[n_] = target;
  forward_[n_] = (target - reached) / row[n_];
  code_[n_] = 0;
  ++n_;
  return true;
}

void LeastSquares::solve() {
  std::copy(forward_, forward_ + n_, code_);
  backward(factor_, n_, code_);
}

void LeastSquares::solve_passive(const bool* passive, double* solution) const {
  int32_t member[kMaxPursuit];
  double packed[kMaxPursuit];
  int32_t count = 0;
  for (int32_t i = 0; i < n_; ++i) {
    if (passive[i]) member[count++] = i;
  }
  for (int32_t i = 0; i < count; ++i) {
    double* row = part_ + triangle(i);
    for (int32_t j = 0; j <= i; ++j) row[j] = gram_[triangle(member[i]) + member[j]];
    const double diagonal = row[i];
    forward(part_, i, row);
    double schur = diagonal;
    for (int32_t j = 0; j < i; ++j) schur -= row[j] * row[j];
    row[i] = std::sqrt(std::max(schur, 1e-12 * diagonal));
    packed[i] = target_[member[i]];
  }
  forward(part_, count, packed);
  backward(part_, count, packed);
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
      for (int32_t j = 0; j < n_; ++j) {
        gradient -= (i >= j ? gram_[triangle(i) + j] : gram_[triangle(j) + i]) * code_[j];
      }
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
