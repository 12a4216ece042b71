// Batch-OMP. Correlations after a refit are alpha = alpha0 - G[:, S] c; G is symmetric (up to rounding, which
// a choice may see but no coefficient does), so that subtracts whole rows of G. An atom that may not be
// chosen (again) has NaN as its correlation: NaN survives the subtraction and loses every comparison.
//
// Coefficients need Gram entries of the chosen atoms in fp32. They come from an fp32 Gram matrix, else as
// dot products of the chosen atoms, because the rounding of an fp16 Gram would show in the codes. While atoms
// are chosen by an fp16 Gram matrix its own entries do for the fit, as long as no decision is a close one;
// the exact ones come at the end, for all atoms at once, which reads each atom a few times instead of once a
// step.
#include "cpu/pursuit.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/dictionary.h"

namespace daco {
namespace cpu {
namespace {

// Pursuit stops when the largest correlation is at most this fraction of the row's norm.
constexpr double kSmallestCorrelation = 1e-5;

// Decisions that the rounding of an fp16 Gram matrix, 2^-11 of an entry, cannot turn: a square with digits
// left, a pivot far above the one that is refused, a correlation far above what rounding can amount to. All
// others are made in exact entries.
constexpr float kClearSquare = 1e-2f;
constexpr double kClearPivot = 0.1;
constexpr double kClearCorrelation = 0x1p-7;

// Entries of G that an atom j brings: with the support in order of choice, and with itself.
struct Entries {
  const float* column;  // G[S, j]
  const float* row;     // G[j, S]
  float diagonal;
};

bool takes_both_signs(const SteerPursuit& op) { return op.sign == PursuitSign::kSigned; }

Entries gram_entries(const SteerPursuit& op, const Kernels& kernels, const Pursuit& row, int64_t j,
                     const PursuitScratch& scratch) {
  const int32_t n = row.fit.size();
  const bool symmetric = is_symmetric(op);
  float* across = scratch.cross;
  float* down = symmetric ? across : across + op.k;
  if (op.gram != nullptr && (op.gram_dtype == DType::kF32 || !row.exact)) {
    stored_row(op, kernels, j, row.index, n, across);
    for (int32_t i = 0; i < n && !symmetric; ++i) down[i] = stored_entry(op, kernels, row.index[i], j);
    return {down, across, stored_entry(op, kernels, j, j)};
  }
  const auto self = static_cast<int32_t>(j);
  float diagonal;
  gram_row(op, kernels, j, &self, 1, scratch.atom, &diagonal);
  gram_row(op, kernels, j, row.index, n, scratch.atom, across);
  if (!symmetric) gram_column(op, kernels, j, row.index, n, scratch.atom, down);
  return {down, across, diagonal};
}

// alpha0 of one atom, with the bits that the encoder gave it.
float first_correlation(const SteerPursuit& op, const Kernels& kernels, const Pursuit& row, int64_t j) {
  const auto atom = static_cast<int32_t>(j);
  float out;
  const float* const x[] = {row.x};
  float* const y[] = {&out};
  Encoder encoder = analysis_of(op);
  encoder.index = &atom;
  encode_range(kernels, encoder, 0, 1, x, 1, y);
  return out;
}

void refit(const SteerPursuit& op, Pursuit* row) {
  if (op.sign == PursuitSign::kNonNegative) {
    row->fit.solve_non_negative();
  } else {
    row->fit.solve();
  }
  for (int32_t i = 0; i < row->fit.size(); ++i) {
    row->code[i] = static_cast<float>(row->fit.code()[i]);
    row->negative[i] = -row->code[i];
  }
}

// Whether the correlation of a chosen atom, n before it, holds up in exact entries of G. Where a row is all
// but explained, what is left is the rounding of the Gram matrix, and atoms chosen by that would only fit
// noise.
bool stands_out(const SteerPursuit& op, const Pursuit& row, const Entries& entries, int32_t n, float target) {
  double correlation = target;
  for (int32_t i = 0; i < n; ++i) correlation -= static_cast<double>(row.code[i]) * entries.row[i];
  if (takes_both_signs(op)) correlation = std::fabs(correlation);
  return correlation > kSmallestCorrelation * row.norm;
}

// Whether that is so however an fp16 Gram matrix was rounded.
bool stands_out_clearly(const Pursuit& row, const Entries& entries, int32_t n, float correlation) {
  double reach = 0;
  for (int32_t i = 0; i < n; ++i) reach += std::fabs(static_cast<double>(row.code[i]) * entries.row[i]);
  return correlation > kSmallestCorrelation * row.norm + kClearCorrelation * reach;
}

// Puts exact entries of G in the place of those of an fp16 Gram matrix and refits. An atom that is nearly a
// combination of those before it, and did not seem so, falls out.
void make_exact(const SteerPursuit& op, const Kernels& kernels, Pursuit* row, const PursuitScratch& scratch) {
  const int32_t n = row->fit.size();
  row->exact = true;
  gram_block(op, kernels, row->index, n, scratch.wide, scratch.entries);
  row->fit.reset(row->memory, op.k);
  float* across = scratch.cross;
  float* down = across + op.k;
  int32_t kept[kMaxPursuit];
  for (int32_t i = 0; i < n; ++i) {
    const int32_t before = row->fit.size();
    for (int32_t a = 0; a < before; ++a) {
      across[a] = scratch.entries[i * n + kept[a]];
      down[a] = scratch.entries[kept[a] * n + i];
    }
    if (!row->fit.append(down, across, scratch.entries[i * n + i], static_cast<float>(row->fit.target(i)),
                         false)) {
      continue;
    }
    kept[before] = i;
    row->index[before] = row->index[i];
  }
  refit(op, row);
}

// Adds atom j, which has correlation `value`, to the fit. `*over`: pursuit ends here, by the stopping rule.
bool append(const SteerPursuit& op, const Kernels& kernels, int64_t j, float target, float value,
            Pursuit* row, const PursuitScratch& scratch, bool* over) {
  Entries entries = gram_entries(op, kernels, *row, j, scratch);
  const int32_t n = row->fit.size();
  if (!row->exact) {
    if (entries.diagonal >= kClearSquare && stands_out_clearly(*row, entries, n, value) &&
        row->fit.append(entries.column, entries.row, entries.diagonal, target, false)) {
      if (n == 0 || row->fit.last_pivot() >= kClearPivot * entries.diagonal) return true;
      row->fit.drop_last();
    }
    make_exact(op, kernels, row, scratch);
    return append(op, kernels, j, target, value, row, scratch, over);
  }
  if (!(entries.diagonal > 0)) return false;
  if (!row->fit.append(entries.column, entries.row, entries.diagonal, target,
                       op.sign == PursuitSign::kNonNegative)) {
    return false;
  }
  *over = op.gram != nullptr && !stands_out(op, *row, entries, n, target);
  if (*over) row->fit.drop_last();
  return !*over;
}

// Chooses the next atom and refits; false when pursuit is over. `start` is null where first correlations are
// not kept; `best` is the peak of `correlation`.
bool extend(const SteerPursuit& op, const Kernels& kernels, float* correlation, float* start, Peak best,
            Pursuit* row, const PursuitScratch& scratch) {
  constexpr float kBarred = std::numeric_limits<float>::quiet_NaN();
  // Against a zero row every correlation that a bias leaves is infinitely large; its code is empty.
  if (!(row->norm > 0)) return false;
  for (;; best = kernels.peak(correlation, op.atoms, takes_both_signs(op))) {
    if (best.index < 0 || !(best.value > kSmallestCorrelation * row->norm)) return false;
    const int64_t j = best.index;
    const float target = start != nullptr ? start[j] : first_correlation(op, kernels, *row, j);
    correlation[j] = kBarred;
    if (start != nullptr) {
      start[j] = kBarred;
    } else {
      row->barred[j / 64] |= uint64_t{1} << (j % 64);
    }
    bool over = false;
    if (append(op, kernels, j, target, best.value, row, scratch, &over)) {
      row->index[row->fit.size() - 1] = static_cast<int32_t>(j);
      refit(op, row);
      return true;
    }
    if (over) return false;
  }
}

void find_residual(const SteerPursuit& op, const Kernels& kernels, const Pursuit& row,
                   const PursuitScratch& scratch, float* residual) {
  find_residual(op, kernels, row.x, row.index, row.negative, row.fit.size(), scratch.cross, residual);
}

bool small_enough(const SteerPursuit& op, const Kernels& kernels, const Pursuit& row, const float* residual) {
  return std::sqrt(kernels.of(DType::kF32).sum_squares(residual, op.dim)) <=
         static_cast<double>(op.tol) * row.norm;
}

}  // namespace

int64_t barred_words(int64_t m) { return (m + 63) / 64; }

void begin(const SteerPursuit& op, const float* x, double norm, Pursuit* row) {
  row->x = x;
  row->norm = norm;
  row->fit.reset(row->memory, op.k);
  row->running = true;
  // Codes that are looked at on the way, by a tolerance or for their signs, are exact from the start.
  row->exact = op.gram == nullptr || op.gram_dtype == DType::kF32 || op.tol > 0 ||
               op.sign == PursuitSign::kNonNegative;
  if (op.gram == nullptr) {
    std::memset(row->barred, 0, static_cast<size_t>(barred_words(op.atoms)) * sizeof(uint64_t));
  }
}

void pursue(const SteerPursuit& op, const Kernels& kernels, float* start, Pursuit* row,
            const PursuitScratch& scratch) {
  const bool absolute = takes_both_signs(op);
  float* correlation = start;
  Peak best = kernels.peak(start, op.atoms, absolute);
  for (;;) {
    if (op.tol > 0) {
      find_residual(op, kernels, *row, scratch, scratch.residual);
      if (small_enough(op, kernels, *row, scratch.residual)) return;
    }
    const bool went_on = extend(op, kernels, correlation, start, best, row, scratch);
    const int32_t found = row->fit.size();
    if (!went_on || found == op.k) {
      if (!row->exact && found > 0) make_exact(op, kernels, row, scratch);
      if (!went_on || row->fit.size() == op.k) return;
    }
    correlation = scratch.correlation;
    best = kernels.remaining[static_cast<int>(op.gram_dtype)](
        start, op.gram, op.atoms, row->index, row->negative, row->fit.size(), correlation, absolute);
  }
}

void pursue_step(const SteerPursuit& op, const Kernels& kernels, float* correlation, float* residual,
                 Pursuit* row, const PursuitScratch& scratch) {
  row->running = false;
  // Before the first choice the residual is the row itself.
  const float* left = row->fit.size() == 0 ? row->x : residual;
  if (op.tol > 0 && small_enough(op, kernels, *row, left)) return;
  for (int64_t word = 0; word < barred_words(op.atoms); ++word) {
    for (uint64_t bits = row->barred[word]; bits != 0; bits &= bits - 1) {
      correlation[word * 64 + __builtin_ctzll(bits)] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  const Peak best = kernels.peak(correlation, op.atoms, takes_both_signs(op));
  if (!extend(op, kernels, correlation, nullptr, best, row, scratch)) return;
  if (row->fit.size() == op.k) return;
  find_residual(op, kernels, *row, scratch, residual);
  row->running = true;
}

SparseCode finish(const SteerPursuit& op, Pursuit* row) {
  const bool both_signs = takes_both_signs(op);
  SparseCode code{row->index, row->code, 0};
  for (int32_t i = 0; i < row->fit.size(); ++i) {
    const float c = row->code[i];
    if (both_signs ? c == 0 : !(c > 0)) continue;
    code.index[code.count] = row->index[i];
    code.value[code.count++] = c;
  }
  return code;
}

}  // namespace cpu
}  // namespace daco
