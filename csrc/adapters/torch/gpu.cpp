// torch's CUDA library is not linked to: a build for machines with and without one is the same. The one
// function of it that is needed is looked up in the process, which holds it if any tensor lies on a GPU.
#include "adapters/torch/gpu.h"

#include <dlfcn.h>

#include <array>
#include <mutex>

#include "cuda/device_scope.h"
#include "cuda/steer_cuda.h"

namespace daco::adapters {
namespace {

cuda::Stream current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = []() -> Function {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return nullptr;
    return reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (function == nullptr || function(device, &stream) != 0) {
    throw std::runtime_error("daco: torch's CUDA library does not tell its current stream");
  }
  return static_cast<cuda::Stream>(stream);
}

cuda::Device properties_of(int32_t index) {
  constexpr int32_t kDevices = 64;
  static std::mutex mutex;
  static std::array<cuda::Device, kDevices> known;  // compute is 0 where it is not
  const std::lock_guard<std::mutex> lock(mutex);
  if (index >= 0 && index < kDevices && known[static_cast<size_t>(index)].compute > 0) {
    return known[static_cast<size_t>(index)];
  }
  cuda::Device device;
  check(cuda::properties(index, &device));
  if (index >= 0 && index < kDevices) known[static_cast<size_t>(index)] = device;
  return device;
}

template <class Op>
void run(const Op& op, const Place& place) {
  const cuda::DeviceScope scope(place.index);
  cuda::Plan plan;
  check(cuda::plan(op, properties_of(place.index), &plan));
  // torch hands memory out and takes it back in the order of its current stream, which is where we launch.
  // Its blocks are aligned to 512 bytes.
  Tensor scratch = make({static_cast<int64_t>(plan.workspace_bytes)}, aoti_torch_dtype_uint8(), place);
  void* workspace = plan.workspace_bytes > 0 ? scratch.mutable_data_ptr() : nullptr;
  check(cuda::steer(op, plan, workspace, current_stream(place.index)));
}

}  // namespace

void run_on_gpu(const SteerSae& op, const Place& place) { run(op, place); }
void run_on_gpu(const SteerPursuit& op, const Place& place) { run(op, place); }
void run_on_gpu(const SteerAffine& op, const Place& place) { run(op, place); }

void build_gram_on_gpu(const GramOperands& from, void* gram, DType stored, const Place& place) {
  const cuda::DeviceScope scope(place.index);
  check(cuda::build_gram(from.analysis, from.atoms, from.weight, from.scales, from.m, from.d, gram, stored,
                         current_stream(place.index)));
}

}  // namespace daco::adapters
