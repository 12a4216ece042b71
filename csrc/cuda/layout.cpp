#include "cuda/layout.h"

#include "cuda/codes.cuh"

namespace daco::cuda {

Codes carve_codes(void* base, int64_t rows, int64_t capacity, int32_t k_out) {
  Carver carver(base);
  Codes codes;
  codes.count = carver.take<int32_t>(rows);
  codes.index = carver.take<int32_t>(rows * capacity);
  codes.value = carver.take<float>(rows * capacity);
  codes.strength = carver.take<float>(k_out > 0 ? rows * capacity : 0);
  codes.capacity = capacity;
  return codes;
}

size_t codes_bytes(int64_t rows, int64_t capacity, int32_t k_out) {
  Carver carver(nullptr);
  carver.take<int32_t>(rows);
  carver.take<int32_t>(rows * capacity);
  carver.take<float>(rows * capacity);
  carver.take<float>(k_out > 0 ? rows * capacity : 0);
  return carver.used();
}

}  // namespace daco::cuda
