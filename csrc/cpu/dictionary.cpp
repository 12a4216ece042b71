#include "cpu/dictionary.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace daco {
namespace cpu {
namespace {

const void* row_of(const void* matrix, DType t, int64_t row, int64_t width) {
  return static_cast<const char*>(matrix) + row * width * static_cast<int64_t>(size_of(t));
}

const float* synthesis_scales(const SteerPursuit& op) {
  return op.scales != nullptr ? op.scales + op.atoms : nullptr;
}

void dot_products(const SteerPursuit& op, const Kernels& kernels, const void* left, float left_scale,
                  int64_t j, const void* right, const float* right_scales, const int32_t* index, int64_t n,
                  float* atom, float* out) {
  kernels.of(op.weight).widen(row_of(left, op.weight, j, op.dim), atom, op.dim);
  const Encoder encoder{right, nullptr, index, op.weight, n, op.dim, right_scales};
  const float* const x[] = {atom};
  float* const y[] = {out};
  encode_range(kernels, encoder, 0, n, x, 1, y);
  if (op.scales == nullptr) return;
  for (int64_t i = 0; i < n; ++i) out[i] *= left_scale;
}

}  // namespace

void gram_row(const SteerPursuit& op, const Kernels& kernels, int64_t j, const int32_t* index, int64_t n,
              float* atom, float* out) {
  dot_products(op, kernels, op.analysis, op.scales != nullptr ? op.scales[j] : 1.f, j, op.synthesis,
               synthesis_scales(op), index, n, atom, out);
}

void gram_column(const SteerPursuit& op, const Kernels& kernels, int64_t j, const int32_t* index, int64_t n,
                 float* atom, float* out) {
  dot_products(op, kernels, op.synthesis, op.scales != nullptr ? synthesis_scales(op)[j] : 1.f, j,
               op.analysis, op.scales, index, n, atom, out);
}

void gram_block(const SteerPursuit& op, const Kernels& kernels, const int32_t* index, int64_t n, float* wide,
                float* out) {
  const bool symmetric = is_symmetric(op);
  const Encoder encoder{op.synthesis, nullptr, index, op.weight, n, op.dim, synthesis_scales(op)};
  for (int64_t first = 0; first < n; first += kGramRows) {
    const int64_t rows = std::min(kGramRows, n - first);
    const float* x[kGramRows];
    float* y[kGramRows];
    for (int64_t r = 0; r < rows; ++r) {
      const void* atom = row_of(op.analysis, op.weight, index[first + r], op.dim);
      y[r] = out + (first + r) * n;
      x[r] = wide + r * op.dim;
      if (op.weight == DType::kF32) {
        x[r] = static_cast<const float*>(atom);
      } else {
        kernels.of(op.weight).widen(atom, wide + r * op.dim, op.dim);
      }
    }
    encode_range(kernels, encoder, symmetric ? first : 0, n, x, rows, y);
    for (int64_t r = 0; r < rows; ++r) {
      if (op.scales != nullptr) kernels.scale(y[r], op.scales[index[first + r]], n);
      for (int64_t i = first + rows; symmetric && i < n; ++i) out[i * n + first + r] = y[r][i];
    }
  }
}

float stored_entry(const SteerPursuit& op, const Kernels& kernels, int64_t i, int64_t j) {
  const int64_t at = i * op.atoms + j;
  if (op.gram_dtype == DType::kF32) return static_cast<const float*>(op.gram)[at];
  float entry;
  kernels.of(op.gram_dtype).widen(static_cast<const Half*>(op.gram) + at, &entry, 1);
  return entry;
}

void stored_row(const SteerPursuit& op, const Kernels& kernels, int64_t j, const int32_t* index, int64_t n,
                float* out) {
  const int64_t at = j * op.atoms;
  if (op.gram_dtype == DType::kF32) {
    const auto* row = static_cast<const float*>(op.gram) + at;
    for (int64_t i = 0; i < n; ++i) out[i] = row[index[i]];
    return;
  }
  constexpr int64_t kPiece = 64;
  Half entries[kPiece];
  const auto* row = static_cast<const Half*>(op.gram) + at;
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t count = std::min(kPiece, n - first);
    for (int64_t i = 0; i < count; ++i) entries[i] = row[index[first + i]];
    kernels.of(op.gram_dtype).widen(entries, out + first, count);
  }
}

double synthesis_norm(const SteerPursuit& op, const Kernels& kernels, int64_t j) {
  const double scale = op.scales != nullptr ? synthesis_scales(op)[j] : 1.f;
  return std::fabs(scale) *
         std::sqrt(kernels.of(op.weight).sum_squares(row_of(op.synthesis, op.weight, j, op.dim), op.dim));
}

void find_residual(const SteerPursuit& op, const Kernels& kernels, const float* x, const int32_t* index,
                   const float* amount, int64_t n, float* scaled, float* residual) {
  std::memcpy(residual, x, static_cast<size_t>(op.dim) * sizeof(float));
  if (const float* scales = synthesis_scales(op); scales != nullptr) {
    for (int64_t i = 0; i < n; ++i) scaled[i] = amount[i] * scales[index[i]];
    amount = scaled;
  }
  kernels.of(op.weight).accumulate(residual, op.synthesis, op.dim, index, amount, n);
}

void add_atom(const SteerPursuit& op, const Kernels& kernels, int32_t j, float amount, float* residual) {
  if (op.scales != nullptr) amount *= synthesis_scales(op)[j];
  kernels.of(op.weight).accumulate(residual, op.synthesis, op.dim, &j, &amount, 1);
}

}  // namespace cpu
}  // namespace daco
