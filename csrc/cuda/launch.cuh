// Launching, and the hand-over from one kernel of a call to the next.
//
// On compute capability 9.0 and later a kernel may be put on the device while the one before it still runs
// (programmatic dependent launch), which hides its start. The rule that keeps this safe: every thread of every
// kernel passes wait_for_previous() before it returns and before it touches anything an earlier kernel of the
// call writes, or writes anything an earlier kernel reads. A kernel is then complete only after all before
// it. The first kernel of a call is launched without overlap, so operands are ready from its start.
#pragma once

#include <cuda_runtime.h>

#include "core/status.h"
#include "cuda/steer_cuda.h"

namespace daco::cuda {

__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

struct Launch {
  const char* what = "";  // for the error message
  dim3 grid = dim3(1);
  int threads = 256;
  size_t shared = 0;
  int cluster = 1;       // blocks along x; 1 unless compute capability is 9.0 or later
  bool overlap = false;  // may start while the kernel before it runs
};

template <class... P, class... A>
Status launch(const Launch& how, const Device& device, Stream stream, void (*kernel)(P...), A&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = how.shared;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (how.overlap && device.compute >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(how.cluster);
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  cudaError_t error = cudaSuccess;
  if (how.shared > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(how.shared));
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // or the next launch would report it as its own
  return make_status(Code::kDevice, "%s: the CUDA runtime answered error %d (%s)", how.what,
                     static_cast<int>(error), cudaGetErrorString(error));
}

}  // namespace daco::cuda
