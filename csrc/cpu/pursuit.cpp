// Batch-OMP. Correlations after a refit are alpha = alpha0 - G[:, S] c; G is symmetric (up to rounding, which
// a choice may see but no coefficient does), so that subtracts whole rows of G. An atom that may not be
// chosen (again) has NaN as its correlation: NaN survives the subtraction and loses every comparison.
//
// Coefficients need Gram entries of the chosen atoms in fp32. They come from an fp32 Gram matrix, else as
// dot products of the chosen atoms, because the rounding of an fp16 Gram would show in the codes.
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

// Entries of G that an atom j brings: with the support in order of choice, and with itself.
struct Entries {
  const float* column;  // G[S, j]
  const float* row;     // G[j, S]
  float diagonal;
};

Entries gram_entries(const SteerPursuit& op, const Kernels& kernels, const Pursuit& row, int64_t j,
                     const PursuitScratch& scratch) {
  const int32_t n = row.fit.size();
  const int64_t m = atoms_of(op);
  const bool symmetric = is_symmetric(op);
  float* across = scratch.cross;
  float* down = symmetric ? across : across + op.k;
  if (op.gram != nullptr && op.gram_dtype == DType::kF32) {
    const auto* g = static_cast<const float*>(op.gram);
    for (int32_t i = 0; i < n; ++i) across[i] = g[j * m + row.index[i]];
    if (!symmetric) {
      for (int32_t i = 0; i < n; ++i) down[i] = g[row.index[i] * m + j];
    }
    return {down, across, g[j * m + j]};
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
  if (op.sign == PursuitSign::kSigned) correlation = std::fabs(correlation);
  return correlation > kSmallestCorrelation * row.norm;
}

// Chooses the next atom and refits; false when pursuit is over. `start` is null where first correlations are
// not kept.
bool extend(const SteerPursuit& op, const Kernels& kernels, float* correlation, float* start, Pursuit* row,
            const PursuitScratch& scratch) {
  constexpr float kBarred = std::numeric_limits<float>::quiet_NaN();
  // Against a zero row every correlation that a bias leaves is infinitely large; its code is empty.
  if (!(row->norm > 0)) return false;
  for (;;) {
    const Peak best = kernels.peak(correlation, atoms_of(op), op.sign == PursuitSign::kSigned);
    if (best.index < 0 || !(best.value > kSmallestCorrelation * row->norm)) return false;
    const int64_t j = best.index;
    const float target = start != nullptr ? start[j] : first_correlation(op, kernels, *row, j);
    correlation[j] = kBarred;
    if (start != nullptr) {
      start[j] = kBarred;
    } else {
      row->barred[j / 64] |= uint64_t{1} << (j % 64);
    }
    const Entries entries = gram_entries(op, kernels, *row, j, scratch);
    if (!(entries.diagonal > 0)) continue;
    const int32_t n = row->fit.size();
    if (!row->fit.append(entries.column, entries.row, entries.diagonal, target,
                         op.sign == PursuitSign::kNonNegative)) {
      continue;
    }
    if (op.gram != nullptr && !stands_out(op, *row, entries, n, target)) {
      row->fit.drop_last();
      return false;
    }
    row->index[n] = static_cast<int32_t>(j);
    refit(op, row);
    return true;
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
  if (op.gram == nullptr) {
    std::memset(row->barred, 0, static_cast<size_t>(barred_words(atoms_of(op))) * sizeof(uint64_t));
  }
}

void pursue(const SteerPursuit& op, const Kernels& kernels, float* start, Pursuit* row,
            const PursuitScratch& scratch) {
  float* correlation = start;
  while (row->fit.size() < op.k) {
    if (op.tol > 0) {
      find_residual(op, kernels, *row, scratch, scratch.residual);
      if (small_enough(op, kernels, *row, scratch.residual)) return;
    }
    if (!extend(op, kernels, correlation, start, row, scratch)) return;
    if (row->fit.size() == op.k) return;
    correlation = scratch.correlation;
    std::memcpy(correlation, start, static_cast<size_t>(atoms_of(op)) * sizeof(float));
    kernels.of(op.gram_dtype)
        .accumulate(correlation, op.gram, atoms_of(op), row->index, row->negative, row->fit.size());
  }
}

void pursue_step(const SteerPursuit& op, const Kernels& kernels, float* correlation, float* residual,
                 Pursuit* row, const PursuitScratch& scratch) {
  row->running = false;
  // Before the first choice the residual is the row itself.
  const float* left = row->fit.size() == 0 ? row->x : residual;
  if (op.tol > 0 && small_enough(op, kernels, *row, left)) return;
  for (int64_t word = 0; word < barred_words(atoms_of(op)); ++word) {
    for (uint64_t bits = row->barred[word]; bits != 0; bits &= bits - 1) {
      correlation[word * 64 + __builtin_ctzll(bits)] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  if (!extend(op, kernels, correlation, nullptr, row, scratch)) return;
  if (row->fit.size() == op.k) return;
  find_residual(op, kernels, *row, scratch, residual);
  row->running = true;
}

SparseCode finish(const SteerPursuit& op, Pursuit* row) {
  const bool both_signs = op.sign == PursuitSign::kSigned;
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
