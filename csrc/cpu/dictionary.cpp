#include "cpu/dictionary.h"

#include <cmath>
#include <cstring>

namespace daco {
namespace cpu {
namespace {

const void* row_of(const void* matrix, DType t, int64_t row, int64_t width) {
  return static_cast<const char*>(matrix) + row * width * static_cast<int64_t>(size_of(t));
}

const float* synthesis_scales(const SteerPursuit& op) {
  return op.scales != nullptr ? op.scales + atoms_of(op) : nullptr;
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
  dot_products(op, kernels, op.analysis, op.scales != nullptr ? op.scales[j] : 1.f, j, op.atoms,
               synthesis_scales(op), index, n, atom, out);
}

void gram_column(const SteerPursuit& op, const Kernels& kernels, int64_t j, const int32_t* index, int64_t n,
                 float* atom, float* out) {
  dot_products(op, kernels, op.atoms, op.scales != nullptr ? synthesis_scales(op)[j] : 1.f, j, op.analysis,
               op.scales, index, n, atom, out);
}

double synthesis_norm(const SteerPursuit& op, const Kernels& kernels, int64_t j) {
  const double scale = op.scales != nullptr ? synthesis_scales(op)[j] : 1.f;
  return std::fabs(scale) *
         std::sqrt(kernels.of(op.weight).sum_squares(row_of(op.atoms, op.weight, j, op.dim), op.dim));
}

void find_residual(const SteerPursuit& op, const Kernels& kernels, const float* x, const int32_t* index,
                   const float* amount, int64_t n, float* scaled, float* residual) {
  std::memcpy(residual, x, static_cast<size_t>(op.dim) * sizeof(float));
  if (const float* scales = synthesis_scales(op); scales != nullptr) {
    for (int64_t i = 0; i < n; ++i) scaled[i] = amount[i] * scales[index[i]];
    amount = scaled;
  }
  kernels.of(op.weight).accumulate(residual, op.atoms, op.dim, index, amount, n);
}

void add_atom(const SteerPursuit& op, const Kernels& kernels, int32_t j, float amount, float* residual) {
  if (op.scales != nullptr) amount *= synthesis_scales(op)[j];
  kernels.of(op.weight).accumulate(residual, op.atoms, op.dim, &j, &amount, 1);
}

}  // namespace cpu
}  // namespace daco
