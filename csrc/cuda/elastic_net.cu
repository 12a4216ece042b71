#include "cuda/launch.cuh"
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

Launch a_block_a_row(const char* what, int64_t rows, size_t shared) {
  Launch how;
  how.what = what;
  how.grid = dim3(static_cast<unsigned>(rows));
  how.threads = kPursuitThreads;
  how.shared = shared;
  return how;
}

}  // namespace

Status launch_description(const Dictionary& dictionary, const void* gram, DType gram_dtype, float* diagonal,
                          float* length, const Device& device, Stream stream) {
  const Launch how =
      a_block_a_row("lengths of the atoms", (dictionary.size + kPursuitWarps - 1) / kPursuitWarps, 0);
  if (gram_dtype == DType::kF32) {
    return launch(how, device, stream, description_kernel<float>, dictionary, static_cast<const float*>(gram),
                  diagonal, length);
  }
  return launch(how, device, stream, description_kernel<__half>, dictionary, static_cast<const __half*>(gram),
                diagonal, length);
}

Status launch_descent(const OmpArgs& args, const ElasticArgs& elastic, DType gram_dtype,
                      const PursuitLayout& layout, int64_t rows, const Device& device, Stream stream) {
  const Launch how = a_block_a_row("elastic net", rows, layout.shared_bytes);
  if (gram_dtype == DType::kF32) return launch(how, device, stream, descent_kernel<float>, args, elastic);
  return launch(how, device, stream, descent_kernel<__half>, args, elastic);
}

Status launch_residual(const OmpArgs& args, const float* dense, float* residual, int64_t rows,
                       const Device& device, Stream stream) {
  const Launch how = a_block_a_row("residuals of the elastic net", rows, padded(sizeof(PursuitState)));
  return launch(how, device, stream, residual_kernel, args, dense, residual);
}

}  // namespace daco::cuda
