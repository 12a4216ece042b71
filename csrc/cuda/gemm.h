// The vendor's matrix library, which computes the correlations of many rows where it is there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/status.h"
#include "cuda/steer_cuda.h"

namespace daco::cuda {

// out[i, j] = x_i . w_j for rows x_i of [rows, d] (row stride x_stride) and w_j of [m, d]; fp32, rows of out
// out_stride apart.
struct Product {
  const void* x = nullptr;
  int64_t x_stride = 0;
  DType x_type = DType::kF32;
  const void* w = nullptr;
  DType w_type = DType::kF32;
  int64_t rows = 0;
  int64_t m = 0;
  int64_t d = 0;
  float* out = nullptr;
  int64_t out_stride = 0;
};

// Whether the library serves this pair of types: equal ones of fp32, fp16 and bf16.
bool library_serves(DType x_type, DType w_type);

// Scratch that a product by the library may use; 256-byte aligned.
constexpr size_t kLibraryScratch = size_t{32} << 20;

// Finds libcublasLt and opens it on a device, once a process; false if it is missing or fails. Allocates at
// its first call for a device, so planning makes it before a launch could be part of a capture.
bool library_ready(int device);

// What library_ready() found, in words for a report: the file's name, or why it is not used.
const char* library_state();

// Launches the product. False if it has no algorithm for the shape: nothing was launched.
bool library_product(const Product& p, int device, void* scratch, Stream stream);

}  // namespace daco::cuda
