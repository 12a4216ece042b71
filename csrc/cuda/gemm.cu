// Launches of our own product kernel: correlations in fp32, Gram matrices in fp32 or fp16.
#include "cuda/gemm.cuh"

#include "cuda/codes.cuh"
#include "cuda/gemm.h"

namespace daco::cuda {
namespace {

template <class Out>
__global__ void __launch_bounds__(kGemmThreads) product_kernel(GemmArgs args, Out* out) {
  multiply_tile(args, out);
}

int64_t tiles(const GemmArgs& g) {
  return ((g.rows + kTileX - 1) / kTileX) * ((g.m + kTileW - 1) / kTileW);
}

Status refuse(const char* what, const char* expected, const char* got) {
  return make_status(Code::kInvalidArgument, "build_gram: %s: expected %s, got %s", what, expected, got);
}

bool is_quantised(DType t) { return t == DType::kI8 || t == DType::kF8E4M3; }

}  // namespace

Status own_product(const Product& p, Stream stream) {
  const GemmArgs g{p.x, p.x_stride, p.x_type, nullptr, p.rows, p.w, p.w_type, p.w_scale, p.m, p.d, p.bias};
  if (p.rows == 0) return {};
  product_kernel<float><<<static_cast<unsigned>(tiles(g)), kGemmThreads, kGemmShared, stream>>>(g, p.out);
  return launched("correlations");
}

Status build_gram(const void* analysis, const void* atoms, DType weight, const float* scales, int64_t m,
                  int64_t d, void* gram, DType gram_dtype, Stream stream) {
  if (m < 1 || m > INT32_MAX || d < 1) {
    return make_status(Code::kInvalidArgument,
                       "build_gram: analysis: expected [m, d] with m, d of at least 1, got [%lld, %lld]",
                       static_cast<long long>(m), static_cast<long long>(d));
  }
  if (gram_dtype != DType::kF32 && gram_dtype != DType::kF16) {
    return refuse("gram", "fp32 or fp16", name_of(gram_dtype));
  }
  if (analysis == nullptr) return refuse("analysis", "a buffer", "a null pointer");
  if (atoms == nullptr) return refuse("atoms", "a buffer", "a null pointer");
  if (gram == nullptr) return refuse("gram", "a buffer", "a null pointer");
  if (is_quantised(weight) != (scales != nullptr)) {
    return refuse("scales", is_quantised(weight) ? "[2, m] with quantised weights" : "none with these weights",
                  scales != nullptr ? "some" : "none");
  }
  const GemmArgs g{analysis, d,      weight, scales, m, atoms, weight, scales != nullptr ? scales + m : nullptr,
                   m,        d, nullptr};
  const auto grid = static_cast<unsigned>(tiles(g));
  if (gram_dtype == DType::kF32) {
    product_kernel<<<grid, kGemmThreads, kGemmShared, stream>>>(g, static_cast<float*>(gram));
  } else {
    product_kernel<<<grid, kGemmThreads, kGemmShared, stream>>>(g, static_cast<__half*>(gram));
  }
  return launched("build_gram");
}

}  // namespace daco::cuda
