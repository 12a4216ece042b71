// Element types of operands and what they weigh.
#pragma once

#include <cstddef>
#include <cstdint>

namespace daco {

enum class DType : uint8_t { kF32 = 0, kF16 = 1, kBF16 = 2, kI8 = 3, kF8E4M3 = 4 };

constexpr size_t size_of(DType t) {
  return t == DType::kF32 ? 4 : (t == DType::kF16 || t == DType::kBF16) ? 2 : 1;
}

constexpr const char* name_of(DType t) {
  switch (t) {
    case DType::kF32: return "fp32";
    case DType::kF16: return "fp16";
    case DType::kBF16: return "bf16";
    case DType::kI8: return "int8";
    case DType::kF8E4M3: return "fp8_e4m3";
  }
  return "unknown";
}

}  // namespace daco
