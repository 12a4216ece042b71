// The operators for ONNX Runtime's CUDA provider, in the same library as those for the CPU: registered for
// another provider, they are never looked at where that provider is absent, and nothing of CUDA is loaded
// then.
#pragma once

#include "adapters/onnxruntime/kernels.h"
#include "cuda/steer_cuda.h"

namespace daco::adapters {

// Runs a bound operator on the session's stream. Scratch memory comes from the provider's arena through the
// call's own context, which keeps it apart from other streams until this one has passed.
template <class Op, size_t N>
class CudaKernel {
 public:
  static constexpr const char* kProvider = "CUDAExecutionProvider";

  explicit CudaKernel(const OrtKernelInfo* info);
  ~CudaKernel();
  CudaKernel(const CudaKernel&) = delete;
  CudaKernel& operator=(const CudaKernel&) = delete;

  void compute(OrtKernelContext* raw) const;

 private:
  Op attributes_;
  OrtAllocator* allocator_ = nullptr;  // of the device that the session runs on
  cuda::Device device_;
  void* gram_ = nullptr;  // device memory; replaces the absent `gram` input of a pursuit
};

struct CudaSaeKernel : CudaKernel<SteerSae, kSaeInputs> {
  static constexpr const char* kName = SaeKernel::kName;
  static constexpr size_t kOutputCount = SaeKernel::kOutputCount;
  using CudaKernel::CudaKernel;
};

struct CudaPursuitKernel : CudaKernel<SteerPursuit, kPursuitInputs> {
  static constexpr const char* kName = PursuitKernel::kName;
  static constexpr size_t kOutputCount = PursuitKernel::kOutputCount;
  using CudaKernel::CudaKernel;
};

struct CudaAffineKernel : CudaKernel<SteerAffine, kAffineInputs> {
  static constexpr const char* kName = AffineKernel::kName;
  static constexpr size_t kOutputCount = AffineKernel::kOutputCount;
  using CudaKernel::CudaKernel;
};

}  // namespace daco::adapters
