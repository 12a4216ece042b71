// The code list: what every coder leaves in the workspace and the edit stage consumes. Internal to csrc/cuda.
#pragma once

#include <cstdint>

#include "core/status.h"
#include "core/steer.h"
#include "cuda/steer_cuda.h"

namespace daco::cuda {

// Row t has count[t] codes at index[t * capacity ...] and value[t * capacity ...], in an order that depends
// on nothing but the operands, every value other than zero. A row that gets no code because of its slot may
// have any count at or below zero; the edit stage looks at slots and at NaN or Inf in z itself, so a coder
// may leave anything whatever, as long as it stays inside its buffers, for a row that is not finite.
// A null `count` means that no row has a code.
struct Codes {
  int32_t* count = nullptr;    // [T]
  int32_t* index = nullptr;    // [T, capacity]
  float* value = nullptr;      // [T, capacity]
  float* strength = nullptr;   // [T, capacity] scratch of the edit stage, needed only when k_out > 0
  int64_t capacity = 0;
};

// Bytes of a code list for `rows` rows, and where its parts lie in them. `base` is 256-byte aligned.
size_t codes_bytes(int64_t rows, int64_t capacity, int32_t k_out);
Codes carve_codes(void* base, int64_t rows, int64_t capacity, int32_t k_out);

// The last stage of every operator with codes: deadband, gain and boost, shift, dose cap, norm keeping,
// rounding with saturation, doses, ranked support, and all that slots and non-finite rows ask for. `atoms`
// is the decoder or dictionary [m, d] of type op.weight; row 1 of op.scales applies to it. Rows 0 .. op.rows
// of the call are done; out may be z. Everything that earlier kernels of the call wrote on this stream is
// visible to it.
Status launch_edit(const Rows& op, const void* atoms, const Codes& codes, const Device& device, Stream stream);

// kDevice with the runtime's number and text when the last launch on this thread failed. `what` names it.
Status launched(const char* what);

}  // namespace daco::cuda
