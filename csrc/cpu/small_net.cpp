#include "cpu/small_net.h"

#include <algorithm>
#include <cmath>

namespace daco {
namespace cpu {
namespace {

constexpr int kQuickSweeps = 24;        // before the linear system is tried
constexpr double kQuickStep = 100;      // or until steps are this many times the tolerance
constexpr double kLastStep = 0.1;       // share of the tolerance at which sweeps alone are done
constexpr double kEntering = 1e-2;      // share of the tolerance from which on a code at zero must leave it
constexpr double kBrokenPivot = 1e-10;  // of the diagonal entry: the atoms are dependent
constexpr int64_t kRounds = 4 * kSmallSolve;

}  // namespace

void SmallNet::move(int64_t j, double by) {
  code[j] += by;
  const float* g = column + j * kSmallNet;
  for (int64_t i = 0; i < n; ++i) left[i] -= by * static_cast<double>(g[i]);
}

// One pass of coordinate descent; returns its longest step.
double SmallNet::sweep() {
  double longest = 0;
  for (int64_t j = 0; j < n; ++j) {
    const double g = diagonal(j);
    if (!(g > 0)) continue;
    const double by = shrink(left[j] + g * code[j], l1, both_signs) / (g + l2) - code[j];
    if (by == 0) continue;
    move(j, by);
    longest = std::max(longest, std::fabs(by) * static_cast<double>(length[j]));
  }
  return longest;
}

// The atom at zero that gains most by leaving it, or -1.
int64_t SmallNet::entering(double* sign) const {
  int64_t best = -1;
  double longest = kEntering * tolerance;
  for (int64_t j = 0; j < n; ++j) {
    const double g = diagonal(j);
    if (code[j] != 0 || !(g > 0)) continue;
    const double step = shrink(left[j], l1, both_signs) / (g + l2);
    if (std::fabs(step) * static_cast<double>(length[j]) > longest) {
      longest = std::fabs(step) * static_cast<double>(length[j]);
      best = j;
      *sign = step > 0 ? 1.0 : -1.0;
    }
  }
  return best;
}

// (G + l2)_PP step = step, by elimination: G is positive definite up to rounding and need not be symmetric to
// the bit. False where the members are dependent.
bool SmallNet::solve_step(const int32_t* member, int64_t count, double* step) const {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < count; ++j) factor[i * count + j] = column[member[j] * kSmallNet + member[i]];
    factor[i * count + i] += l2;
  }
  for (int64_t k = 0; k < count; ++k) {
    const double* pivot = factor + k * count;
    if (!(pivot[k] > kBrokenPivot * (diagonal(member[k]) + l2))) return false;
    for (int64_t i = k + 1; i < count; ++i) {
      double* row = factor + i * count;
      const double share = row[k] / pivot[k];
      for (int64_t j = k + 1; j < count; ++j) row[j] -= share * pivot[j];
      step[i] -= share * step[k];
    }
  }
  for (int64_t i = count - 1; i >= 0; --i) {
    const double* row = factor + i * count;
    for (int64_t j = i + 1; j < count; ++j) step[i] -= row[j] * step[j];
    step[i] /= row[i];
  }
  return true;
}

// An active-set method: with the signs of the non-zero codes held, the optimum is one linear system. A step
// there ends at the first code that would change its sign, which leaves; at the full step the atom that gains
// most enters. Every step lowers the objective, so no support comes twice. False when it is given up.
bool SmallNet::solve_support() {
  int32_t member[kSmallSolve];
  double step[kSmallSolve];
  int64_t enters = -1;
  double sign = 0;
  for (int64_t round = 0; round < kRounds; ++round) {
    int64_t count = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (code[j] == 0 && j != enters) continue;
      if (count == kSmallSolve) return false;
      const double theta = code[j] > 0 ? 1.0 : code[j] < 0 ? -1.0 : sign;
      step[count] = left[j] - l2 * code[j] - l1 * theta;
      member[count++] = static_cast<int32_t>(j);
    }
    if (count > 0 && !solve_step(member, count, step)) return false;
    double share = 1;
    int64_t leaves = -1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = member[i];
      const double c = code[j];
      if (j == enters && !(step[i] * sign > 0)) return false;  // nothing but rounding let it in
      if (c == 0 || (c + step[i]) * c > 0) continue;
      const double ratio = -c / step[i];
      if (leaves < 0 || ratio < share) {
        share = ratio;
        leaves = j;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = member[i];
      move(j, j == leaves ? -code[j] : share * step[i]);
      if (j == leaves) code[j] = 0;
    }
    enters = -1;
    if (leaves >= 0) continue;
    enters = entering(&sign);
    if (enters < 0) return true;
  }
  return false;
}

void SmallNet::solve() {
  // Where the system is given up, sweeps bring the support nearer to the right one before it is tried again.
  for (int done = 0, batch = kQuickSweeps; done < kNetSweeps; done += batch, batch *= 2) {
    double longest = 0;
    for (int i = 0; i < batch; ++i) {
      longest = sweep();
      if (longest <= (done == 0 ? kQuickStep : kLastStep) * tolerance) break;
    }
    if (solve_support() || longest <= kLastStep * tolerance) return;
  }
}

}  // namespace cpu
}  // namespace daco
