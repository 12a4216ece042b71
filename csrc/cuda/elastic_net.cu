#include "cuda/pursuit_launch.h"

namespace daco::cuda {
namespace {

template <class G>
__global__ void __launch_bounds__(kPursuitThreads, 1)
    descent_kernel(const __grid_constant__ OmpArgs args, const __grid_constant__ ElasticArgs elastic) {
  descend<G>(args, elastic);
}

__global__ void __launch_bounds__(kPursuitThreads, 1)
    residual_kernel(const __grid_constant__ OmpArgs args, const float* dense, float* residual) {
  residual_of_dense(args, dense, residual);
}

template <class G>
__global__ void __launch_bounds__(kPursuitThreads, 1)
    description_kernel(const __grid_constant__ Dictionary dictionary, const G* gram, float* diagonal,
                       float* length) {
  describe_atoms(dictionary, gram, diagonal, length);
}

}  // namespace

Status launch_description(const Dictionary& dictionary, const void* gram, DType gram_dtype, float* diagonal,
                          float* length, Stream stream) {
  const auto grid = static_cast<unsigned>((dictionary.size + kPursuitWarps - 1) / kPursuitWarps);
  if (gram_dtype == DType::kF32) {
    description_kernel<<<grid, kPursuitThreads, 0, stream>>>(dictionary, static_cast<const float*>(gram),
                                                             diagonal, length);
  } else {
    description_kernel<<<grid, kPursuitThreads, 0, stream>>>(dictionary, static_cast<const __half*>(gram),
                                                             diagonal, length);
  }
  return launched("lengths of the atoms");
}

Status launch_descent(const OmpArgs& args, const ElasticArgs& elastic, DType gram_dtype,
                      const PursuitLayout& layout, int64_t rows, Stream stream) {
  const auto kernel = gram_dtype == DType::kF32 ? descent_kernel<float> : descent_kernel<__half>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(layout.shared_bytes));
  kernel<<<static_cast<unsigned>(rows), kPursuitThreads, layout.shared_bytes, stream>>>(args, elastic);
  return launched("elastic net");
}

Status launch_residual(const OmpArgs& args, const float* dense, float* residual, int64_t rows, Stream stream) {
  residual_kernel<<<static_cast<unsigned>(rows), kPursuitThreads, padded(sizeof(PursuitState)), stream>>>(
      args, dense, residual);
  return launched("residuals of the elastic net");
}

}  // namespace daco::cuda
