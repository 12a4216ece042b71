// The operators as ONNX Runtime kernels: attributes are read and checked when a session is built, a
// call binds its tensors and runs.
#pragma once

#include <memory>

#include "adapters/onnxruntime/host.h"

namespace daco::adapters {

enum Output : size_t { kOutZ, kOutDoses, kOutIndex, kOutValue, kOutputs };

// Attributes of a node, checked.
void read_attributes(const Ort::ConstKernelInfo& info, SteerSae* op);
void read_attributes(const Ort::ConstKernelInfo& info, SteerPursuit* op);
void read_attributes(const Ort::ConstKernelInfo& info, SteerAffine* op);

// The output i of a call, allocated; null where the graph does not use it.
void* output(const Ort::KernelContext& context, size_t i, const std::vector<int64_t>& shape);

// Up to this many atoms a precomputed Gram matrix stays in fp32 (64 MB); above it fp16 halves what pursuit
// reads, and codes are refitted in fp32 either way.
constexpr int64_t kGramInFp32 = 4096;

// The operands of a Gram matrix that a session must build itself: no `gram` input and constant matrices.
// False where there is nothing to build. The tensors back the result.
struct GramInputs {
  Tensor analysis, atoms, scales;
  GramOperands operands;
};
bool gram_inputs(const Ort::ConstKernelInfo& info, GramInputs* out);

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
  static constexpr const char* kProvider = "CPUExecutionProvider";
  static constexpr size_t kOutputCount = kOutputs;
  explicit SaeKernel(const OrtKernelInfo* info);
};

class PursuitKernel : public Kernel<SteerPursuit, kPursuitInputs> {
 public:
  static constexpr const char* kName = "SteerPursuit";
  static constexpr const char* kProvider = "CPUExecutionProvider";
  static constexpr size_t kOutputCount = kOutputs;
  explicit PursuitKernel(const OrtKernelInfo* info);

 private:
  void precompute_gram(const Ort::ConstKernelInfo& info);
};

class AffineKernel : public Kernel<SteerAffine, kAffineInputs> {
 public:
  static constexpr const char* kName = "SteerAffine";
  static constexpr const char* kProvider = "CPUExecutionProvider";
  static constexpr size_t kOutputCount = kOutIndex;  // it has no support
  explicit AffineKernel(const OrtKernelInfo* info);
};

}  // namespace daco::adapters
