// The Gram matrix of a dictionary, built once by the host: G = E A'.
#include <cstring>
#include <memory>
#include <new>

#include "cpu/encode.h"
#include "cpu/plan.h"

namespace daco {
namespace cpu {
namespace {

constexpr int64_t kRows = 64;

Status refuse(const char* what, const char* expected, const char* got) {
  return make_status(Code::kInvalidArgument, "build_gram: %s: expected %s, got %s", what, expected, got);
}

bool is_misaligned(const void* p, DType t) { return reinterpret_cast<uintptr_t>(p) % size_of(t) != 0; }

Status check(const void* analysis, const void* atoms, DType weight, const float* scales, int64_t m, int64_t d,
             const void* gram, DType gram_dtype) {
  if (m < 1 || m > INT32_MAX || d < 1) {
    return make_status(Code::kInvalidArgument,
                       "build_gram: analysis: expected [m, d] with m, d of at least 1, got [%lld, %lld]",
                       static_cast<long long>(m), static_cast<long long>(d));
  }
  if (gram_dtype != DType::kF32 && gram_dtype != DType::kF16) {
    return refuse("gram", "fp32 or fp16", name_of(gram_dtype));
  }
  if (Status status = check_weights("build_gram", weight); !status.ok()) return status;
  if ((scales != nullptr) != (weight == DType::kI8)) {
    return refuse("scales", weight == DType::kI8 ? "[2, m] with int8 weights" : "none but with int8 weights",
                  scales != nullptr ? "some" : "none");
  }
  if (analysis == nullptr || is_misaligned(analysis, weight))
    return refuse("analysis", "an aligned buffer", "none");
  if (atoms == nullptr || is_misaligned(atoms, weight)) return refuse("atoms", "an aligned buffer", "none");
  if (gram == nullptr || is_misaligned(gram, gram_dtype)) return refuse("gram", "an aligned buffer", "none");
  return {};
}

}  // namespace

Status build_gram(const void* analysis, const void* atoms, DType weight, const float* scales, int64_t m,
                  int64_t d, void* gram, DType gram_dtype, const Executor& executor, Isa isa) {
  Status status = check(analysis, atoms, weight, scales, m, d, gram, gram_dtype);
  if (status.ok()) status = resolve(isa, &isa);
  if (!status.ok()) return status;

  // 64 rows of E at a time, in fp32; an fp16 result passes through a block of fp32.
  const bool direct = gram_dtype == DType::kF32;
  const std::unique_ptr<float[]> rows(new (std::nothrow) float[static_cast<size_t>(kRows * d)]);
  const std::unique_ptr<float[]> block(direct ? nullptr
                                              : new (std::nothrow) float[static_cast<size_t>(kRows * m)]);
  if (rows == nullptr || (!direct && block == nullptr)) {
    return make_status(Code::kWorkspace, "build_gram: out of memory for a block of %lld rows",
                       static_cast<long long>(kRows));
  }
  const Kernels& table = kernels(isa);
  const Encoder encoder{atoms, nullptr, nullptr, weight, m, d, scales == nullptr ? nullptr : scales + m};
  const float* x[kRows];
  float* y[kRows];
  for (int64_t begin = 0; begin < m; begin += kRows) {
    const int64_t n = m - begin < kRows ? m - begin : kRows;
    const char* first =
        static_cast<const char*>(analysis) + begin * d * static_cast<int64_t>(size_of(weight));
    table.of(weight).widen(first, rows.get(), n * d);
    for (int64_t i = 0; i < n; ++i) {
      if (scales != nullptr) table.scale(rows.get() + i * d, scales[begin + i], d);
      x[i] = rows.get() + i * d;
      y[i] = direct ? static_cast<float*>(gram) + (begin + i) * m : block.get() + i * m;
    }
    encode(table, encoder, x, n, y, executor);
    if (!direct) {
      char* out = static_cast<char*>(gram) + begin * m * static_cast<int64_t>(size_of(gram_dtype));
      table.of(gram_dtype).narrow(block.get(), out, n * m);
    }
  }
  return status;
}

}  // namespace cpu
}  // namespace daco
