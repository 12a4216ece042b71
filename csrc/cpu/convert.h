// Weights from one floating-point format to another, for hosts that write them.
#pragma once

#include "core/steer.h"

namespace daco {
namespace cpu {

// y [n] = x [n], each of fp32, fp16 or bf16, to nearest, ties to even. `*fits` is false, and y unfinished,
// where x holds NaN, infinity, or what would become infinity. Reads x once from memory; on the calling
// thread.
Status convert(DType from, const void* x, DType to, void* y, int64_t n, bool* fits, Isa isa = Isa::kAuto);

}  // namespace cpu
}  // namespace daco
