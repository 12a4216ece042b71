// The primitives that the CPU implementation is made of, one table of them for each instruction set.
// Every table comes from the one source kernels.inl; what differs is the vector type of vec_*.h.
//
// All pointers need the alignment of their elements only. Sums run in a fixed order that depends on the
// instruction set and the width alone, never on how rows or atoms are grouped: a row gives the same bits
// alone, in a batch, and on any number of threads.
#pragma once

#include <cstdint>

#include "core/steer.h"

namespace daco {
namespace cpu {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

struct Peak {
  int64_t index;  // -1 when every entry is NaN
  float value;
};

// Primitives on one element type of the operands. int8 elements count as the integers they are: what reads
// quantised weights multiplies the results by their scales.
struct TypedKernels {
  // y[r][i] = (bias ? bias[a] : 0) + W[a, :] . x[r], for begin <= i < end and r < rows, where
  // a = index ? index[i] : i.
  void (*dots)(const void* w, const int32_t* index, int64_t begin, int64_t end, int64_t d, const float* bias,
               const float* const* x, int64_t rows, float* const* y);
  // y[0..d) += sum_i coefficient[i] * W[index[i], :], added in the order of i.
  void (*accumulate)(float* y, const void* w, int64_t d, const int32_t* index, const float* coefficient,
                     int64_t n);
  double (*sum_squares)(const void* x, int64_t n);
  void (*widen)(const void* x, float* y, int64_t n);
  // To nearest, ties to even. What lies beyond the type's range, infinity included, becomes its largest
  // finite value, so that a finite row stays finite; NaN stays NaN.
  void (*narrow)(const float* x, void* y, int64_t n);  // null for int8, which no activation has
  bool (*all_finite)(const void* x, int64_t n);        // null for int8
};

struct Kernels {
  TypedKernels typed[4];  // by DType: fp32, fp16, bf16, int8

  double (*sum_squared_differences)(const float* x, const float* y, int64_t n);
  void (*add_scaled)(const float* x, const float* y, float scale, float* out, int64_t n);  // x + scale * y
  void (*scale)(float* x, float factor, int64_t n);
  // Largest entry (largest absolute value), the lower index on ties. NaN marks entries that cannot be
  // chosen.
  Peak (*peak)(const float* x, int64_t n, bool absolute);
  // Whether the bits of every |x[i]|, i < n, are below `limit`: no NaN, no infinity, nothing that large.
  bool (*all_below)(const float* x, int64_t n, uint32_t limit);
  // Appends every x[i] > level, i < n, as (first + i, x[i]); returns how many. Room for n is needed.
  int64_t (*collect_above)(const float* x, int64_t n, float level, int32_t first, int32_t* index,
                           float* value);
  // seen[i] |= gain[i] != 1 || boost[i] != 0 || undesirable[i]; a null operand is left out.
  void (*mark_watched)(const float* gain, const float* boost, const uint8_t* undesirable, uint8_t* seen,
                       int64_t n);
  // out = start + sum_i factor[i] * G[index[i], :], added in the order of i, for 1 <= n <= kMaxPursuit rows
  // of a Gram matrix G [., m] in fp32 or fp16 (by DType), and the peak of out, which may be start.
  Peak (*remaining[2])(const float* start, const void* g, int64_t m, const int32_t* index,
                       const float* factor, int64_t n, float* out, bool absolute);

  // In fp64: y += factor * x, and x . y.
  void (*add_doubles)(double* y, const double* x, double factor, int64_t n);
  void (*add_widened)(double* y, const float* x, double factor, int64_t n);
  double (*dot_doubles)(const double* x, const double* y, int64_t n);

  const TypedKernels& of(DType t) const { return typed[static_cast<int>(t)]; }
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

bool has(Isa isa);                // whether this machine and its system run it
const Kernels& kernels(Isa isa);  // a table that has() allows
// What `asked` (or DACO_RT_ISA, when kAuto) comes to on this machine.
Status resolve(Isa asked, Isa* isa);

}  // namespace cpu
}  // namespace daco
