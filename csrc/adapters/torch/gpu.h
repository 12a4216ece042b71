// Running an operator whose tensors lie on a GPU, in torch's current stream.
#pragma once

#include "adapters/torch/tensors.h"

namespace daco::adapters {

#if defined(DACO_RT_WITH_CUDA)

void run_on_gpu(const SteerSae& op, const Place& place);
void run_on_gpu(const SteerPursuit& op, const Place& place);
void run_on_gpu(const SteerAffine& op, const Place& place);
void build_gram_on_gpu(const GramOperands& from, void* gram, DType stored, const Place& place);

#else

[[noreturn]] inline void refuse_gpu() {
  throw std::runtime_error("daco: this build has no CUDA kernels; move the tensors to the CPU");
}
template <class Op>
void run_on_gpu(const Op&, const Place&) {
  refuse_gpu();
}
inline void build_gram_on_gpu(const GramOperands&, void*, DType, const Place&) { refuse_gpu(); }

#endif

}  // namespace daco::adapters
