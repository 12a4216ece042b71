// What the kernels need of ONNX Runtime: attributes, tensors, threads and memory. Errors are thrown as
// Ort::Exception; library.cpp turns every exception into an OrtStatus at the border.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <cstdint>
#include <string>
#include <vector>

#include "adapters/operands.h"

namespace daco::adapters {

void check(const Status& status);

// Reads an attribute; a missing one and one of another type are the same error to ONNX Runtime.
template <class T>
T attribute(const Ort::ConstKernelInfo& info, const char* op, const char* name);

// An input of a node and the memory behind its description. Absent inputs have no elements.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(const Ort::ConstValue& value);

  Operand operand() const;
  const std::vector<int64_t>& shape() const { return shape_; }

 private:
  const void* data_ = nullptr;
  ONNXTensorElementDataType type_ = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<int64_t> shape_;
};

// How many threads are worth planning for on this machine.
int machine_threads();

// The session's intra-op threads; `context` must outlive the executor.
Executor intra_op_threads(const Ort::KernelContext& context);

// Memory of the session's CPU arena, 64-byte aligned. One allocator serves concurrent calls; each call
// takes a block of its own.
class Arena {
 public:
  explicit Arena(const OrtKernelInfo* info);
  ~Arena() { Ort::GetApi().ReleaseAllocator(allocator_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  class Block {
   public:
    Block(OrtAllocator* allocator, size_t bytes);
    ~Block() { allocator_->Free(allocator_, raw_); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    void* data() const;

   private:
    OrtAllocator* allocator_;
    void* raw_;
  };

  Block take(size_t bytes) const { return Block(allocator_, bytes); }

 private:
  OrtAllocator* allocator_ = nullptr;
};

}  // namespace daco::adapters
