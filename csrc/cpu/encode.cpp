#include "cpu/encode.h"

#include "cpu/heuristics.h"

namespace daco {
namespace cpu {

void encode_range(const Kernels& kernels, const Encoder& e, int64_t begin, int64_t end, const float* const* x,
                  int64_t rows, float* const* y) {
  const auto dots = kernels.of(e.dtype).dots;
  if (e.scale == nullptr) {
    dots(e.weights, e.index, begin, end, e.dim, e.bias, x, rows, y);
    return;
  }
  dots(e.weights, e.index, begin, end, e.dim, nullptr, x, rows, y);
  for (int64_t r = 0; r < rows; ++r) {
    float* out = y[r];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t atom = e.index != nullptr ? e.index[i] : i;
      out[i] = out[i] * e.scale[atom] + (e.bias != nullptr ? e.bias[atom] : 0.f);
    }
  }
}

void encode(const Kernels& kernels, const Encoder& e, const float* const* x, int64_t rows, float* const* y,
            const Executor& executor) {
  if (rows == 0 || e.n == 0) return;
  if (executor.run == nullptr || executor.threads <= 1) {
    encode_range(kernels, e, 0, e.n, x, rows, y);
    return;
  }
  const int64_t atom_bytes = e.dim * static_cast<int64_t>(size_of(e.dtype));
  const int64_t wanted = (rows < kManyRows ? kTaskBytes : kManyRowsTaskBytes) / atom_bytes;
  const int64_t piece = (wanted / kGroup + 1) * kGroup;
  const int64_t tasks = (e.n + piece - 1) / piece;
  parallel_for(executor, tasks, [&](int64_t task) {
    const int64_t begin = task * piece;
    const int64_t end = begin + piece < e.n ? begin + piece : e.n;
    encode_range(kernels, e, begin, end, x, rows, y);
  });
}

}  // namespace cpu
}  // namespace daco
