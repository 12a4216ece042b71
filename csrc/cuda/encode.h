// The first stage of the SAE coders: pre-activations y = E z + b.
#pragma once

#include <cstdint>

#include "core/steer.h"
#include "cuda/steer_cuda.h"
#include "cuda/tiling.h"

namespace daco::cuda {

struct Encode {
  const void* z = nullptr;
  int64_t z_stride = 0;
  DType activation = DType::kF32;
  const int32_t* slots = nullptr;  // rows that need no code may be left out
  int64_t policies = 0;
  int64_t rows = 0;
  int64_t dim = 0;
  const void* weights = nullptr;  // [atoms, dim]
  DType weight = DType::kF32;
  const float* scales = nullptr;  // [atoms] or null
  const float* bias = nullptr;    // [atoms]
  int64_t atoms = 0;
  float* y = nullptr;  // [rows, y_stride]
  int64_t y_stride = 0;

  // Only watched latents, and of those the ones above their threshold: all else becomes 0.
  bool watched = false;
  const float* gain = nullptr;
  const float* boost = nullptr;
  const uint8_t* undesirable = nullptr;
  const float* threshold = nullptr;  // null: 0
};

Status launch_encode_dot(const Encode& call, const DotTiling& tiling, const Device& device, Stream stream);
Status launch_encode_mma(const Encode& call, const MmaTiling& tiling, const Device& device, Stream stream);

}  // namespace daco::cuda
