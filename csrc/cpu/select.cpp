// Top-k by a rising threshold. Candidates above the threshold are collected in order of index; when their
// buffer is full it is cut back to the k largest, and the smallest of those becomes the threshold. Whatever
// comes later has a higher index, so it must be strictly above the threshold to displace a candidate: ties
// go to the lower index without ever comparing indices. A cut costs O(k) and follows at least k new
// candidates, so the whole is O(m) on any data, and on most data the scan is all there is.
#include "cpu/select.h"

#include <algorithm>
#include <functional>

namespace daco {
namespace cpu {
namespace {

constexpr int64_t kPiece = 256;  // entries scanned between two looks at the buffer

// Keeps the k largest of more than k candidates, ties to the earlier; returns the smallest kept.
float cut(SparseCode* code, int64_t k, float* scratch) {
  std::copy(code->value, code->value + code->count, scratch);
  std::nth_element(scratch, scratch + (k - 1), scratch + code->count, std::greater<float>());
  const float level = scratch[k - 1];
  int64_t above = 0;
  for (int64_t i = 0; i < code->count; ++i) above += code->value[i] > level;
  int64_t ties = k - above;
  int64_t kept = 0;
  for (int64_t i = 0; i < code->count; ++i) {
    const float v = code->value[i];
    if (v > level || (v == level && ties-- > 0)) {
      code->index[kept] = code->index[i];
      code->value[kept++] = v;
    }
  }
  code->count = kept;
  return level;
}

}  // namespace

int64_t selection_capacity(int64_t m, int64_t k) { return 2 * std::min(m, k) + 2 * kPiece; }

void keep_largest(const Kernels& kernels, const float* a, int64_t m, int64_t k, SparseCode* code,
                  float* scratch) {
  k = std::min(m, k);
  const int64_t capacity = selection_capacity(m, k);
  float level = 0.f;
  code->count = 0;
  for (int64_t begin = 0; begin < m; begin += kPiece) {
    if (code->count + kPiece > capacity) level = cut(code, k, scratch);
    const int64_t n = std::min(kPiece, m - begin);
    code->count += kernels.collect_above(a + begin, n, level, static_cast<int32_t>(begin),
                                         code->index + code->count, code->value + code->count);
  }
  if (code->count > k) cut(code, k, scratch);
}

void keep_above(const float* a, const int32_t* index, int64_t n, const float* threshold, SparseCode* code) {
  code->count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float level = threshold != nullptr ? threshold[index[i]] : 0.f;
    // A threshold below zero lets zeros pass; a code of zero is no code.
    if (a[i] > level && a[i] != 0.f) {
      code->index[code->count] = index[i];
      code->value[code->count++] = a[i];
    }
  }
}

}  // namespace cpu
}  // namespace daco
