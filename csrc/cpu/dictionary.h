// The two matrices of a pursuit, and entries of their Gram matrix from its definition, scales included.
#pragma once

#include "cpu/encode.h"

namespace daco {
namespace cpu {

// All of E with its bias.
inline Encoder analysis_of(const SteerPursuit& op) {
  return {op.analysis, op.bias, nullptr, op.weight, op.atoms, op.dim, op.scales};
}

// Whether one matrix in both roles makes G symmetric to the bit.
inline bool is_symmetric(const SteerPursuit& op) {
  return op.analysis == op.synthesis && op.scales == nullptr;
}

// out[i] = G[j, index[i]] = E_j . A_index[i] for i < n. `atom` [d] is overwritten.
void gram_row(const SteerPursuit& op, const Kernels& kernels, int64_t j, const int32_t* index, int64_t n,
              float* atom, float* out);
// out[i] = G[index[i], j].
void gram_column(const SteerPursuit& op, const Kernels& kernels, int64_t j, const int32_t* index, int64_t n,
                 float* atom, float* out);

// Rows of E that gram_block() takes at a time.
constexpr int64_t kGramRows = 8;

// out[a * n + b] = G[index[a], index[b]] for a, b < n, with the bits of gram_row(): each atom is read a few
// times instead of n times. `wide` [kGramRows, d] is overwritten; unused with fp32 weights.
void gram_block(const SteerPursuit& op, const Kernels& kernels, const int32_t* index, int64_t n, float* wide,
                float* out);

// The same from the Gram matrix as it is given: G[i, j], and out[i] = G[j, index[i]] for i < n.
float stored_entry(const SteerPursuit& op, const Kernels& kernels, int64_t i, int64_t j);
void stored_row(const SteerPursuit& op, const Kernels& kernels, int64_t j, const int32_t* index, int64_t n,
                float* out);

double synthesis_norm(const SteerPursuit& op, const Kernels& kernels, int64_t j);  // |A_j|

// residual = x + sum_i amount[i] * A_index[i]. `scaled` [n] is overwritten; unused without scales.
void find_residual(const SteerPursuit& op, const Kernels& kernels, const float* x, const int32_t* index,
                   const float* amount, int64_t n, float* scaled, float* residual);

// residual += amount * A_j
void add_atom(const SteerPursuit& op, const Kernels& kernels, int32_t j, float amount, float* residual);

}  // namespace cpu
}  // namespace daco
