// The kernels for AVX-512 F, BW, VL and DQ (sources.cmake sets the flags of this file alone).
#include "cpu/vec_avx512.h"

#define DACO_KERNELS kAvx512Kernels
#include "cpu/kernels.inl"
