// The second stage of the SAE coders: from pre-activations to the code list.
#pragma once

#include <cstdint>

#include "cuda/codes.cuh"

namespace daco::cuda {

struct Select {
  const float* y = nullptr;  // [rows, y_stride], y_stride a multiple of 4, 16-byte aligned
  int64_t y_stride = 0;
  int64_t rows = 0;
  int64_t atoms = 0;
  int64_t k = 0;  // the k largest of relu(y), ties to the lower index, zeros dropped; 0: every non-zero y
  const float* bias = nullptr;  // [atoms], added to y where it is still missing; top-k only
  const int32_t* slots = nullptr;
  int64_t policies = 0;
  Codes codes;  // of capacity k, or of capacity atoms when k is 0
};

Status launch_select(const Select& call, const Device& device, Stream stream);

}  // namespace daco::cuda
