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
  return chunks == 1   ? resident_kernel<G, 1>
         : chunks == 2 ? resident_kernel<G, 2>
                       : resident_kernel<G, 4>;
}

}  // namespace

Status launch_resident(const OmpArgs& args, const ResidentArgs& resident, DType gram_dtype,
                       const PursuitLayout& layout, int64_t rows, Stream stream) {
  const ResidentKernel kernel = gram_dtype == DType::kF32 ? kernel_for<float>(layout.chunks_a_thread)
                                                          : kernel_for<__half>(layout.chunks_a_thread);
  // A failure shows at the launch, which then has not the shared memory or the cluster that it asks for.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(layout.shared_bytes));
  cudaLaunchAttribute attribute[1];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows * layout.cluster));
  config.blockDim = dim3(kPursuitThreads);
  config.dynamicSmemBytes = layout.shared_bytes;
  config.stream = stream;
  if (layout.cluster > 1) {
    if (layout.cluster > 8) {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim.x = static_cast<unsigned>(layout.cluster);
    attribute[0].val.clusterDim.y = 1;
    attribute[0].val.clusterDim.z = 1;
    config.attrs = attribute;
    config.numAttrs = 1;
  }
  cudaLaunchKernelEx(&config, kernel, args, resident, static_cast<unsigned>(layout.cluster));
  return launched("pursuit");
}

Status launch_stepped(const OmpArgs& args, const SteppedArgs& stepped, const PursuitLayout& layout, int64_t rows,
                      Stream stream) {
  cudaFuncSetAttribute(stepped_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(layout.shared_bytes));
  stepped_kernel<<<static_cast<unsigned>(rows), kPursuitThreads, layout.shared_bytes, stream>>>(args, stepped);
  return launched("a step of pursuit");
}

}  // namespace daco::cuda
