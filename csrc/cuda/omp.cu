#include "cuda/launch.cuh"
#include "cuda/pursuit_launch.h"

namespace daco::cuda {
namespace {

template <class G, int kChunks>
__global__ void __launch_bounds__(kPursuitThreads, 1)
    resident_kernel(const __grid_constant__ OmpArgs args, const __grid_constant__ ResidentArgs resident,
                    unsigned blocks) {
  pursue_resident<G, kChunks>(args, resident, blocks);
}

__global__ void __launch_bounds__(kPursuitThreads, 1)
    stepped_kernel(const __grid_constant__ OmpArgs args, const __grid_constant__ SteppedArgs stepped) {
  pursue_stepped(args, stepped);
}

using ResidentKernel = void (*)(OmpArgs, ResidentArgs, unsigned);

template <class G>
ResidentKernel kernel_for(int chunks) {
  return chunks == 1 ? resident_kernel<G, 1> : chunks == 2 ? resident_kernel<G, 2> : resident_kernel<G, 4>;
}

}  // namespace

Status launch_resident(const OmpArgs& args, const ResidentArgs& resident, DType gram_dtype,
                       const PursuitLayout& layout, int64_t rows, const Device& device, Stream stream) {
  const ResidentKernel kernel = gram_dtype == DType::kF32 ? kernel_for<float>(layout.chunks_a_thread)
                                                          : kernel_for<__half>(layout.chunks_a_thread);
  // If a device refuses sixteen blocks, the launch says so.
  if (layout.cluster > 8) cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  Launch how;
  how.what = "pursuit";
  how.grid = dim3(static_cast<unsigned>(rows * layout.cluster));
  how.threads = kPursuitThreads;
  how.shared = layout.shared_bytes;
  how.cluster = layout.cluster;
  how.overlap = true;
  return launch(how, device, stream, kernel, args, resident, static_cast<unsigned>(layout.cluster));
}

Status launch_stepped(const OmpArgs& args, const SteppedArgs& stepped, const PursuitLayout& layout,
                      int64_t rows, const Device& device, Stream stream) {
  Launch how;
  how.what = "a step of pursuit";
  how.grid = dim3(static_cast<unsigned>(rows));
  how.threads = kPursuitThreads;
  how.shared = layout.shared_bytes;
  how.overlap = true;
  return launch(how, device, stream, stepped_kernel, args, stepped);
}

}  // namespace daco::cuda
