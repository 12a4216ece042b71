// The kernels for the baseline of the target machine (sources.cmake sets the flags of this file alone).
#include "cpu/vec_scalar.h"

#define DACO_KERNELS kScalarKernels
#include "cpu/kernels.inl"
