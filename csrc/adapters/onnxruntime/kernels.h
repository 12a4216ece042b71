// The operators as ONNX Runtime kernels: attributes are read and checked when a session is built, a
// call binds its tensors and runs.
#pragma once

#include <memory>

#include "adapters/onnxruntime/host.h"

namespace daco::adapters {

enum Output : size_t { kOutZ, kOutDoses, kOutIndex, kOutValue, kOutputs };

// What all kernels share: how a bound operator runs in the session's threads and memory. Holds nothing
// that a call changes, so one kernel serves concurrent runs.
template <class Op, size_t N>
class Kernel {
 public:
  explicit Kernel(const OrtKernelInfo* info) : arena_(info) {}

  void compute(OrtKernelContext* raw) const;

 protected:
  Op attributes_;
  // Replaces the absent `gram` input; empty otherwise.
  std::unique_ptr<char[]> gram_;

 private:
  Arena arena_;
};

class SaeKernel : public Kernel<SteerSae, kSaeInputs> {
 public:
  static constexpr const char* kName = "SteerSae";
  static constexpr size_t kOutputCount = kOutputs;
  explicit SaeKernel(const OrtKernelInfo* info);
};

class PursuitKernel : public Kernel<SteerPursuit, kPursuitInputs> {
 public:
  static constexpr const char* kName = "SteerPursuit";
  static constexpr size_t kOutputCount = kOutputs;
  explicit PursuitKernel(const OrtKernelInfo* info);

 private:
  void precompute_gram(const Ort::ConstKernelInfo& info);
};

class AffineKernel : public Kernel<SteerAffine, kAffineInputs> {
 public:
  static constexpr const char* kName = "SteerAffine";
  static constexpr size_t kOutputCount = kOutIndex;  // it has no support
  explicit AffineKernel(const OrtKernelInfo* info);
};

}  // namespace daco::adapters
