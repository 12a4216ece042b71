#include "cpu/convert.h"

#include "cpu/kernels.h"

namespace daco {
namespace cpu {
namespace {

constexpr int64_t kPiece = 2048;  // elements: in fp32 a sixth of a first-level cache

// Bits of the smallest fp32 number that rounds to infinity in a format.
uint32_t overflow_bits(DType t) {
  if (t == DType::kF16) return 0x477ff000u;   // 65,520
  if (t == DType::kBF16) return 0x7f7f8000u;  // half a step above the largest
  return 0x7f800000u;
}

bool is_float(DType t) { return t == DType::kF32 || t == DType::kF16 || t == DType::kBF16; }

}  // namespace

Status convert(DType from, const void* x, DType to, void* y, int64_t n, bool* fits, Isa isa) {
  Status status = resolve(isa, &isa);
  if (!status.ok()) return status;
  if (!is_float(from) || !is_float(to)) {
    return make_status(Code::kUnsupported, "convert: expected fp32, fp16 or bf16, got %s to %s",
                       name_of(from), name_of(to));
  }
  const Kernels& table = kernels(isa);
  const uint32_t limit = overflow_bits(to);
  float wide[kPiece];
  *fits = true;
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t count = n - first < kPiece ? n - first : kPiece;
    const char* in = static_cast<const char*>(x) + first * static_cast<int64_t>(size_of(from));
    const float* piece = wide;
    if (from == DType::kF32) {
      piece = reinterpret_cast<const float*>(in);
    } else {
      table.of(from).widen(in, wide, count);
    }
    if (!table.all_below(piece, count, limit)) {
      *fits = false;
      return status;
    }
    table.of(to).narrow(piece, static_cast<char*>(y) + first * static_cast<int64_t>(size_of(to)), count);
  }
  return status;
}

}  // namespace cpu
}  // namespace daco
