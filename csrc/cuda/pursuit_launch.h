// The launches of the pursuit kernels.
#pragma once

#include "cuda/elastic_net.cuh"
#include "cuda/omp.cuh"
#include "cuda/pursuit_plan.h"

namespace daco::cuda {

Status launch_resident(const OmpArgs& args, const ResidentArgs& resident, DType gram_dtype,
                       const PursuitLayout& layout, int64_t rows, const Device& device, Stream stream);
Status launch_stepped(const OmpArgs& args, const SteppedArgs& stepped, const PursuitLayout& layout,
                      int64_t rows, const Device& device, Stream stream);

Status launch_description(const Dictionary& dictionary, const void* gram, DType gram_dtype, float* diagonal,
                          float* length, const Device& device, Stream stream);
Status launch_descent(const OmpArgs& args, const ElasticArgs& elastic, DType gram_dtype,
                      const PursuitLayout& layout, int64_t rows, const Device& device, Stream stream);
Status launch_residual(const OmpArgs& args, const float* dense, float* residual, int64_t rows,
                       const Device& device, Stream stream);

}  // namespace daco::cuda
