// Pre-activations of rows: the one place where the big analysis matrix is read.
#pragma once

#include "cpu/kernels.h"

namespace daco {
namespace cpu {

// The scaled product comes first and the bias after it: y = scale * (q . x) + bias.
struct Encoder {
  const void* weights;   // [m, d]
  const float* bias;     // [m] or null
  const int32_t* index;  // the n atoms wanted, or null for the first n
  DType dtype;
  int64_t n;
  int64_t dim;
  const float* scale = nullptr;  // [m] of quantised weights
};

// y[r][i] for begin <= i < end, on the calling thread; with the bits that encode() gives them.
void encode_range(const Kernels& kernels, const Encoder& encoder, int64_t begin, int64_t end,
                  const float* const* x, int64_t rows, float* const* y);

// y[r][i] = weights[a_i] . x[r] + bias[a_i] for all rows r and i < n. Reads the weights once for up to 64
// rows, in pieces that threads share.
void encode(const Kernels& kernels, const Encoder& encoder, const float* const* x, int64_t rows,
            float* const* y, const Executor& executor);

}  // namespace cpu
}  // namespace daco
