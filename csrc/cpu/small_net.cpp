#include "cpu/small_net.h"

#include <algorithm>
#include <cmath>

namespace daco {
namespace cpu {
namespace {

constexpr int kQuickSweeps = 4;         // before the linear system is tried
constexpr int kApproachSweeps = 20;     // fewer admit too many atoms, 40 gain no more
constexpr double kQuickStep = 100;      // or until steps are this many times the tolerance
constexpr double kLastStep = 0.1;       // share of the tolerance at which sweeps alone are done
constexpr double kEntering = 1e-2;      // share of the tolerance from which on a code at zero must leave it
constexpr double kBrokenPivot = 1e-10;  // of the diagonal entry: the atoms are dependent
constexpr int64_t kRounds = 4 * kSmallSolve;

}  // namespace

void SmallNet::move(int64_t j, double by) {
  code[j] += by;
  kernels->add_widened(left, column + j * kSmallNet, -by, n);
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

// Borders the inverse by atom j; G need not be symmetric to the bit. False where j depends on the members.
bool SmallNet::include(int32_t j) {
  SmallInverse& held = *inverse;
  const int64_t count = held.count;
  if (count == kSmallSolve) return false;
  double down[kSmallSolve], across[kSmallSolve], right[kSmallSolve] = {};
  for (int64_t i = 0; i < count; ++i) down[i] = column[j * kSmallNet + held.member[i]];
  double schur = diagonal(j) + l2;
  const double least = kBrokenPivot * schur;
  for (int64_t i = 0; i < count; ++i) {
    const double* row = held.entry + i * kSmallSolve;
    const double g = column[held.member[i] * kSmallNet + j];
    across[i] = kernels->dot_doubles(row, down, count);
    kernels->add_doubles(right, row, g, count);
    schur -= g * across[i];
  }
  if (!(schur > least)) return false;
  for (int64_t i = 0; i < count; ++i) {
    double* row = held.entry + i * kSmallSolve;
    const double share = across[i] / schur;
    kernels->add_doubles(row, right, share, count);
    row[count] = -share;
  }
  double* last = held.entry + count * kSmallSolve;
  for (int64_t i = 0; i < count; ++i) last[i] = -right[i] / schur;
  last[count] = 1 / schur;
  held.member[held.count++] = j;
  return true;
}

// Takes the member at `at` out again; the last member takes its place. False where rounding forbids it.
bool SmallNet::exclude(int64_t at) {
  SmallInverse& held = *inverse;
  const int64_t last = held.count - 1;
  double gone[kSmallSolve];
  std::copy(held.entry + at * kSmallSolve, held.entry + at * kSmallSolve + held.count, gone);
  if (!(gone[at] > 0)) return false;
  for (int64_t i = 0; i <= last; ++i) {
    double* row = held.entry + i * kSmallSolve;
    if (i != at) kernels->add_doubles(row, gone, -row[at] / gone[at], held.count);
  }
  for (int64_t i = 0; i <= last; ++i) {
    double* row = held.entry + i * kSmallSolve;
    row[at] = row[last];
  }
  std::copy(held.entry + last * kSmallSolve, held.entry + last * kSmallSolve + last,
            held.entry + at * kSmallSolve);
  held.member[at] = held.member[last];
  held.count = last;
  return true;
}

// Brings the inverse to the atoms with a code and the one that enters.
bool SmallNet::invert_over(int64_t enters) {
  bool held[kSmallNet] = {};
  for (int64_t i = inverse->count - 1; i >= 0; --i) {
    const int32_t j = inverse->member[i];
    if (code[j] != 0 || j == enters) {
      held[j] = true;
    } else if (!exclude(i)) {
      inverse->count = 0;
      return invert_over(enters);
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    if ((code[j] != 0 || j == enters) && !held[j] && !include(static_cast<int32_t>(j))) return false;
  }
  return true;
}

// What is left of the optimality condition of an atom whose code has, or will have, the given sign.
double SmallNet::gradient(int64_t j, double sign) const {
  const double theta = code[j] > 0 ? 1.0 : code[j] < 0 ? -1.0 : sign;
  return left[j] - l2 * code[j] - l1 * theta;
}

// An active-set method: with the signs of the non-zero codes held, the optimum is one linear system. A step
// there ends at the first code that would change its sign, which leaves; at the full step the atom that gains
// most enters. Every step lowers the objective, so no support comes twice. False when it is given up.
bool SmallNet::solve_support() {
  double wanted[kSmallSolve], step[kSmallSolve];
  int64_t enters = -1;
  double sign = 0;
  bool renewed = false;
  for (int64_t round = 0; round < kRounds; ++round) {
    if (!invert_over(enters)) return false;
    const int64_t count = inverse->count;
    const int32_t* member = inverse->member;
    for (int64_t i = 0; i < count; ++i) wanted[i] = gradient(member[i], sign);
    double share = 1;
    int64_t leaves = -1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = member[i];
      const double c = code[j];
      step[i] = kernels->dot_doubles(inverse->entry + i * kSmallSolve, wanted, count);
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
    double worst = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = member[i];
      const double off = std::fabs(gradient(j, sign)) / (diagonal(j) + l2);
      worst = std::max(worst, off * static_cast<double>(length[j]));
    }
    if (worst > kEntering * tolerance && !renewed) {  // the inverse may have gathered rounding
      renewed = true;
      inverse->count = 0;
      continue;
    }
    enters = entering(&sign);
    if (enters < 0) return true;
  }
  return false;
}

void SmallNet::approach() {
  for (int i = 0; i < kApproachSweeps; ++i) {
    if (sweep() <= kQuickStep * tolerance) return;
  }
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
