// The two matrices of a pursuit, and entries of their Gram matrix from its definition, scales included.
#pragma once

#include "cpu/encode.h"

namespace daco {
namespace cpu {

// SteerPursuit's matrix hides the number of the same name.
inline int64_t atoms_of(const Rows& rows) { return rows.atoms; }

// All of E with its bias.
inline Encoder analysis_of(const SteerPursuit& op) {
  return {op.analysis, op.bias, nullptr, op.weight, atoms_of(op), op.dim, op.scales};
}

// Whether one matrix in both roles makes G symmetric to the bit.
inline bool is_symmetric(const SteerPursuit& op) { return op.analysis == op.atoms && op.scales == nullptr; }

// out[i] = G[j, index[i]] = E_j . A_index[i] for i < n. `atom` [d] is overwritten.
void gram_row(const SteerPursuit& op, const Kernels& kernels, int64_t j, const int32_t* index, int64_t n,
              float* atom, float* out);
// out[i] = G[index[i], j].
void gram_column(const SteerPursuit& op, const Kernels& kernels, int64_t j, const int32_t* index, int64_t n,
                 float* atom, float* out);

double synthesis_norm(const SteerPursuit& op, const Kernels& kernels, int64_t j);  // |A_j|

// residual = x + sum_i amount[i] * A_index[i]. `scaled` [n] is overwritten; unused without scales.
void find_residual(const SteerPursuit& op, const Kernels& kernels, const float* x, const int32_t* index,
                   const float* amount, int64_t n, float* scaled, float* residual);

// residual += amount * A_j
void add_atom(const SteerPursuit& op, const Kernels& kernels, int32_t j, float amount, float* residual);

}  // namespace cpu
}  // namespace daco
