// The Gram matrix of a dictionary, built once at the start of a session.
#include "cuda/codes.cuh"
#include "cuda/gram.cuh"
#include "cuda/launch.cuh"

namespace daco::cuda {
namespace {

template <class Out>
__global__ void __launch_bounds__(kGramThreads) gram_kernel(const __grid_constant__ GramArgs args, Out* out) {
  multiply_tile(args, out);
}

Status refuse(const char* what, const char* expected, const char* got) {
  return make_status(Code::kInvalidArgument, "build_gram: %s: expected %s, got %s", what, expected, got);
}

bool is_quantised(DType t) { return t == DType::kI8 || t == DType::kF8E4M3; }

}  // namespace

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
    return refuse("scales",
                  is_quantised(weight) ? "[2, m] with quantised weights" : "none with these weights",
                  scales != nullptr ? "some" : "none");
  }
  const GramArgs g{analysis, atoms, scales, weight, m, d};
  const int64_t tiles = ((m + kTileX - 1) / kTileX) * ((m + kTileW - 1) / kTileW);
  Launch how;
  how.what = "build_gram";
  how.grid = dim3(static_cast<unsigned>(tiles));
  how.threads = kGramThreads;
  how.shared = kGramShared;
  // Nothing here depends on the device.
  if (gram_dtype == DType::kF32)
    return launch(how, Device{}, stream, gram_kernel<float>, g, static_cast<float*>(gram));
  return launch(how, Device{}, stream, gram_kernel<__half>, g, static_cast<__half*>(gram));
}

}  // namespace daco::cuda
