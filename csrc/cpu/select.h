// Which latents of a row of pre-activations are its code.
#pragma once

#include "cpu/kernels.h"

namespace daco {
namespace cpu {

// A sparse code: `count` atoms and their values, in buffers of the workspace.
struct SparseCode {
  int32_t* index;
  float* value;
  int64_t count;
};

// Entries that the buffers of keep_largest() need.
int64_t selection_capacity(int64_t m, int64_t k);

// The k largest of the positive entries of a [m], ties to the lower index, in rising order of index. Exact,
// O(m). `code` and `scratch` have room for selection_capacity(m, k).
void keep_largest(const Kernels& kernels, const float* a, int64_t m, int64_t k, SparseCode* code,
                  float* scratch);

// The entries of a [n] above their threshold (null: above zero); entry i stands for atom index[i].
void keep_above(const float* a, const int32_t* index, int64_t n, const float* threshold, SparseCode* code);

}  // namespace cpu
}  // namespace daco
