// The kernels for AVX2, FMA and F16C (sources.cmake sets the flags of this file alone).
#include "cpu/vec_avx2.h"

#define DACO_KERNELS kAvx2Kernels
#include "cpu/kernels.inl"
