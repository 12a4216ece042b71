// What a device can do, asked through single attributes: the whole property struct takes milliseconds.
#include <cuda_runtime.h>

#include "cuda/codes.cuh"

namespace daco::cuda {
namespace {

Status runtime_error(const char* what, cudaError_t error) {
  return make_status(Code::kDevice, "%s: the CUDA runtime answered error %d (%s)", what,
                     static_cast<int>(error), cudaGetErrorString(error));
}

struct Wanted {
  cudaDeviceAttr attribute;
  int value;
};

}  // namespace

Status properties(int index, Device* device) {
  const char* what = "device";
  cudaError_t error = cudaSuccess;
  if (index < 0) error = cudaGetDevice(&index);
  Wanted wanted[] = {{cudaDevAttrComputeCapabilityMajor, 0},
                     {cudaDevAttrComputeCapabilityMinor, 0},
                     {cudaDevAttrMultiProcessorCount, 0},
                     {cudaDevAttrMaxSharedMemoryPerBlockOptin, 0},
                     {cudaDevAttrL2CacheSize, 0}};
  for (Wanted& one : wanted) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&one.value, one.attribute, index);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // the runtime keeps the error, and the next launch would report it as its own
    return runtime_error(what, error);
  }
  device->index = index;
  device->compute = wanted[0].value * 10 + wanted[1].value;
  device->multiprocessors = wanted[2].value;
  device->shared_bytes = wanted[3].value;
  device->l2_bytes = wanted[4].value;
  return {};
}

Status launched(const char* what) {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? Status{} : runtime_error(what, error);
}

}  // namespace daco::cuda
