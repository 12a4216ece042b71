// How a call of SteerSae is cut into windows of rows, and where its pieces lie in the workspace. Host code only:
// pure functions of sizes, dtypes, attributes and the device's properties.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/tiling.h"

namespace daco::cuda {

enum class SaePath : int32_t {
  kEdit,     // coder none: there is no code
  kTensor,   // encode on the tensor cores
  kVector,   // encode on the fp32 units
  kLibrary,  // encode by the vendor's matrix library, if it takes the shape; else one of the above
  kWatched,  // only latents that some policy edits or reports
};

// From this many rows on a library's product beats ours, which reads the weights once per 64 rows.
constexpr int64_t kLibraryRows = 192;

struct SaeLayout {
  SaePath path = SaePath::kEdit;
  int64_t window = 0;    // rows that go through the stages together
  int64_t y_stride = 0;  // of pre-activations
  int64_t capacity = 0;  // of a row's code list
};

struct SaeBuffers {
  float* y = nullptr;        // [window, y_stride]
  void* codes = nullptr;     // a code list of `window` rows
  void* scratch = nullptr;   // of the library
  size_t bytes = 0;
};

SaeLayout lay_out(const SteerSae& op, const Device& device, bool library);
SaeBuffers carve(const SteerSae& op, const SaeLayout& layout, void* base);

// The rows [first, first + count) of a call as a call of their own.
template <class Op>
Op part_of_call(const Op& op, int64_t first, int64_t count) {
  Op part = op;
  const auto size = static_cast<int64_t>(size_of(op.activation));
  part.rows = count;
  part.z = static_cast<const char*>(op.z) + first * op.z_stride * size;
  part.out = static_cast<char*>(op.out) + first * op.out_stride * size;
  part.slots = op.slots + first;
  part.doses = op.doses + 2 * first;
  if (op.k_out > 0) {
    part.support_index = op.support_index + first * op.k_out;
    part.support_value = op.support_value + first * op.k_out;
  }
  return part;
}

}  // namespace daco::cuda
