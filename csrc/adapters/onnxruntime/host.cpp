#include "adapters/onnxruntime/host.h"

#include <algorithm>
#include <new>
#include <thread>
#include <type_traits>

namespace daco::adapters {
namespace {

constexpr size_t kLine = 64;

Element element_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return Element::kF32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return Element::kF16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return Element::kBF16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return Element::kI8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN: return Element::kF8E4M3;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return Element::kI32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL: return Element::kBool;
    default: return Element::kOther;
  }
}

const char* name_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return "float";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return "bfloat16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE: return "double";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return "int64";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return "int32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return "int8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return "uint8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN: return "float8e4m3fn";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL: return "bool";
    default: return "another type";
  }
}

template <class T>
constexpr const char* kKind = "";
template <>
constexpr const char* kKind<int64_t> = "an integer";
template <>
constexpr const char* kKind<float> = "a float";
template <>
constexpr const char* kKind<std::string> = "a string";
template <>
constexpr const char* kKind<std::vector<float>> = "a list of floats";

template <class T>
T read(const Ort::ConstKernelInfo& info, const char* name) {
  if constexpr (std::is_same_v<T, std::vector<float>>) {
    return info.GetAttributes<float>(name);
  } else {
    return info.GetAttribute<T>(name);
  }
}

}  // namespace

void check(const Status& status) {
  if (status.ok()) return;
  throw Ort::Exception(status.message,
                       status.code == Code::kUnsupported ? ORT_NOT_IMPLEMENTED : ORT_INVALID_ARGUMENT);
}

template <class T>
T attribute(const Ort::ConstKernelInfo& info, const char* op, const char* name) {
  try {
    return read<T>(info, name);
  } catch (const Ort::Exception&) {
    throw Ort::Exception(std::string(op) + ": attribute " + name + " must be " + kKind<T> + "; node '" +
                             info.GetNodeName() + "' has none of that name and type",
                         ORT_INVALID_ARGUMENT);
  }
}

template int64_t attribute(const Ort::ConstKernelInfo&, const char*, const char*);
template float attribute(const Ort::ConstKernelInfo&, const char*, const char*);
template std::string attribute(const Ort::ConstKernelInfo&, const char*, const char*);
template std::vector<float> attribute(const Ort::ConstKernelInfo&, const char*, const char*);

Tensor::Tensor(const Ort::ConstValue& value) {
  if (value == nullptr) return;
  const auto info = value.GetTensorTypeAndShapeInfo();
  type_ = info.GetElementType();
  shape_ = info.GetShape();
  data_ = value.GetTensorRawData();
}

Operand Tensor::operand() const {
  Operand o;
  if (type_ == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED) return o;
  // A scalar has no shape to point at; Operand takes a null shape for an absent tensor.
  static constexpr int64_t kNoShape = 0;
  o.data = data_;
  o.element = element_of(type_);
  o.element_name = name_of(type_);
  o.shape = shape_.empty() ? &kNoShape : shape_.data();
  o.rank = shape_.size();
  return o;
}

int machine_threads() {
  constexpr unsigned kMost = 64;
  return static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, kMost));
}

Executor intra_op_threads(const Ort::KernelContext& context) {
  Executor e;
  e.context = const_cast<Ort::KernelContext*>(&context);
  // ONNX Runtime does not tell the size of its pool. The count only shapes the partition: tasks beyond the
  // pool's size queue, and results do not depend on it.
  e.threads = machine_threads();
  e.run = [](void* self, int64_t tasks, void (*body)(void*, int64_t), void* arg) {
    struct Job {
      void (*body)(void*, int64_t);
      void* arg;
    } job{body, arg};
    static_cast<const Ort::KernelContext*>(self)->ParallelFor(
        [](void* j, size_t task) {
          static_cast<Job*>(j)->body(static_cast<Job*>(j)->arg, static_cast<int64_t>(task));
        },
        static_cast<size_t>(tasks), 0, &job);
  };
  return e;
}

Arena::Arena(const OrtKernelInfo* info) {
  Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator_));
}

Arena::Block::Block(OrtAllocator* allocator, size_t bytes)
    : allocator_(allocator), raw_(allocator->Alloc(allocator, bytes + kLine)) {
  if (raw_ == nullptr) throw std::bad_alloc();
}

void* Arena::Block::data() const {
  const auto start = reinterpret_cast<uintptr_t>(raw_);
  return reinterpret_cast<void*>((start + kLine - 1) / kLine * kLine);
}

}  // namespace daco::adapters
