// torch's tensors on the stable ABI: what the core wants to know of them, and making new ones.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <vector>

#include "adapters/operands.h"

namespace daco::adapters {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A plain exception: torch's own macro would put this file's name before the sentence.
inline void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

// Owns a string argument. The stable ABI's own conversion to std::string allocates one that nobody frees,
// 32 bytes a call, so the handle is taken as it comes.
class Text {
 public:
  explicit Text(StringHandle handle) : handle_(handle) {}
  ~Text() { torch_delete_string(handle_); }
  Text(const Text&) = delete;
  Text& operator=(const Text&) = delete;

  const char* c_str() const {
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &data));
    return data;
  }

 private:
  StringHandle handle_;
};

inline Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Element::kF32;
    case ScalarType::Half: return Element::kF16;
    case ScalarType::BFloat16: return Element::kBF16;
    case ScalarType::Char: return Element::kI8;
    case ScalarType::Float8_e4m3fn: return Element::kF8E4M3;
    case ScalarType::Int: return Element::kI32;
    case ScalarType::Bool: return Element::kBool;
    default: return Element::kOther;
  }
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Char: return "int8";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// Describes a tensor; the tensor must outlive the operand, which points at its sizes.
inline Operand describe(const Tensor& x) {
  Operand o;
  const auto sizes = x.sizes();
  o.data = x.const_data_ptr();
  o.element = element_of(x.scalar_type());
  o.element_name = name_of(x.scalar_type());
  o.shape = sizes.data();
  o.rank = sizes.size();
  return o;
}

inline Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// The distance of rows if z can be read in place as [T, d], else 0: a slice of the last tokens of a
// hidden state needs no copy.
inline int64_t row_stride(const Tensor& z) {
  const int64_t rank = z.dim();
  if (rank < 2 || z.stride(rank - 1) != 1) return 0;
  int64_t stride = 0, expected = 0;
  for (int64_t i = rank - 2; i >= 0; --i) {
    if (z.size(i) == 1) continue;
    if (stride == 0)
      stride = z.stride(i);
    else if (z.stride(i) != expected)
      return 0;
    expected = z.stride(i) * z.size(i);
  }
  return stride >= z.size(rank - 1) ? stride : 0;
}

// Where a tensor lies.
struct Place {
  bool gpu = false;
  int32_t index = 0;

  explicit Place(const Tensor& x) : gpu(x.is_cuda()), index(gpu ? x.get_device_index() : 0) {}
  bool operator==(const Place& p) const { return gpu == p.gpu && index == p.index; }
};

// An uninitialised tensor. The call below is what the stable interface's `empty` ends in, without the
// dispatcher, which costs more than a decoded token's whole row.
inline Tensor make(const std::vector<int64_t>& shape, int32_t dtype, const Place& place) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * (shape[i] > 1 ? shape[i] : 1);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype,
      place.gpu ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(), place.index, &handle));
  return Tensor(handle);
}

inline int32_t dtype_of(DType type) {
  switch (type) {
    case DType::kF16: return aoti_torch_dtype_float16();
    case DType::kBF16: return aoti_torch_dtype_bfloat16();
    default: return aoti_torch_dtype_float32();
  }
}

}  // namespace daco::adapters
