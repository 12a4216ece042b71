// From a row's code to its new activations, doses and support.
#pragma once

#include "cpu/kernels.h"
#include "cpu/select.h"

namespace daco {
namespace cpu {

// Buffers that one thread uses at a time; `codes` is the most entries that a code can have.
struct EditScratch {
  int32_t* index;   // [codes] atoms that are edited
  float* amount;    // [codes] and by how much
  float* strength;  // [codes] |c| * |A| of the active codes, only for a reported support
  int32_t* rank;    // [codes] only for a reported support
  float* delta;     // [d]
  float* edited;    // [d]
};

// The rows that are not coded.
void copy_row(const Rows& op, int64_t t);                    // z' = z, bit for bit
void fill_row_with_nan(const Rows& op, int64_t t);           // z' = NaN
void report_nothing(const Rows& op, int64_t t, float dose);  // both doses, empty support

// z' = z + delta under the dose cap and the norm rule of row t's slot; returns |z' - z|. `edited` [d] is
// overwritten.
double add_delta(const Rows& op, const Kernels& kernels, int64_t t, const float* x, double norm,
                 const float* delta, float* edited);

// Row t, whose slot is in [1, P), whose fp32 values are x [d] with Euclidean norm `norm`, and whose code is
// `code` over the rows of `atoms` [m, d].
void steer_row(const Rows& op, const void* atoms, const Kernels& kernels, int64_t t, const float* x,
               double norm, const SparseCode& code, const EditScratch& scratch);

}  // namespace cpu
}  // namespace daco
