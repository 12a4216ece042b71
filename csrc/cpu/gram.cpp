// The Gram matrix of a dictionary, built once by the host: G = E A'.
#include <memory>
#include <new>

#include "cpu/encode.h"
#include "cpu/plan.h"

namespace daco {
namespace cpu {
namespace {

constexpr int64_t kRows = 64;  // of E at a time, in fp32; what they give passes through a block of fp32

// Where finished entries go, in the dtype of G.
struct Store {
  const TypedKernels& kernels;
  char* gram;
  size_t size;
  int64_t m;

  void row(const float* from, int64_t i, int64_t first, int64_t n) const {
    kernels.narrow(from, gram + (i * m + first) * static_cast<int64_t>(size), n);
  }

  // G[begin + j, begin .. begin + n) = column j of y, for first <= j < last.
  void mirror(const float* const* y, int64_t n, int64_t begin, int64_t first, int64_t last) const {
    float column[kRows];
    for (int64_t j = first; j < last; ++j) {
      for (int64_t i = 0; i < n; ++i) column[i] = y[i][j];
      row(column, begin + j, begin, n);
    }
  }
};

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

  // One matrix in both roles makes G symmetric to the bit, and half of it is copied from the other half.
  // Scales are multiplied in on different sides, so int8 weights are left out.
  const bool symmetric = analysis == atoms && scales == nullptr;
  const std::unique_ptr<float[]> rows(new (std::nothrow) float[static_cast<size_t>(kRows * d)]);
  const std::unique_ptr<float[]> block(new (std::nothrow) float[static_cast<size_t>(kRows * m)]);
  if (rows == nullptr || block == nullptr) {
    return make_status(Code::kWorkspace, "build_gram: out of memory for a block of %lld rows",
                       static_cast<long long>(kRows));
  }
  const Kernels& table = kernels(isa);
  const int64_t row_bytes = d * static_cast<int64_t>(size_of(weight));
  const float* x[kRows];
  float* y[kRows];
  for (int64_t begin = 0; begin < m; begin += kRows) {
    const int64_t n = m - begin < kRows ? m - begin : kRows;
    const int64_t from = symmetric ? begin : 0;
    table.of(weight).widen(static_cast<const char*>(analysis) + begin * row_bytes, rows.get(), n * d);
    for (int64_t i = 0; i < n; ++i) {
      if (scales != nullptr) table.scale(rows.get() + i * d, scales[begin + i], d);
      x[i] = rows.get() + i * d;
      y[i] = block.get() + i * m;
    }
    const Encoder encoder{static_cast<const char*>(atoms) + from * row_bytes,
                          nullptr,
                          nullptr,
                          weight,
                          m - from,
                          d,
                          scales == nullptr ? nullptr : scales + m};
    encode(table, encoder, x, n, y, executor);
    const Store store{table.of(gram_dtype), static_cast<char*>(gram), size_of(gram_dtype), m};
    constexpr int64_t kColumns = 1024;
    parallel_for(executor, (m - from + kColumns - 1) / kColumns, [&](int64_t task) {
      const int64_t first = task * kColumns;
      const int64_t last = first + kColumns < m - from ? first + kColumns : m - from;
      for (int64_t i = 0; i < n; ++i) store.row(y[i] + first, begin + i, from + first, last - first);
      if (symmetric) store.mirror(y, n, begin, first < n ? n : first, last);
    });
  }
  return status;
}

}  // namespace cpu
}  // namespace daco
