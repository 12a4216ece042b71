#include "adapters/onnxruntime/cuda_kernels.h"

#include <cuda_runtime_api.h>

namespace daco::adapters {
namespace {

// Workspaces and spare outputs share one block; the second begins on a boundary that both accept.
constexpr size_t kAlign = 256;

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  check(make_status(Code::kDevice, "%s: CUDA error %d: %s", what, static_cast<int>(error),
                    cudaGetErrorString(error)));
}

// Scratch of one call, given back when the launches are in the stream: what takes it next runs after them.
class Scratch {
 public:
  Scratch(OrtKernelContext* context, OrtAllocator* allocator, size_t bytes) : allocator_(allocator) {
    if (bytes == 0) return;
    const OrtMemoryInfo* where = nullptr;
    Ort::ThrowOnError(Ort::GetApi().AllocatorGetInfo(allocator, &where));
    Ort::ThrowOnError(Ort::GetApi().KernelContext_GetScratchBuffer(context, where, bytes + kAlign, &raw_));
  }
  ~Scratch() {
    if (raw_ != nullptr) allocator_->Free(allocator_, raw_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  char* data() const { return reinterpret_cast<char*>(aligned(reinterpret_cast<uintptr_t>(raw_))); }

 private:
  OrtAllocator* allocator_;
  void* raw_ = nullptr;
};

bool on_device(const Ort::ConstKernelInfo& info, size_t input) {
  int constant = 0;
  const Ort::ConstValue value = info.GetTensorConstantInput(input, &constant);
  return constant != 0 && value.GetTensorMemoryInfo().GetDeviceType() == OrtMemoryInfoDeviceType_GPU;
}

void* build_gram(const Ort::ConstKernelInfo& info, OrtAllocator* allocator, SteerPursuit* op) {
  GramInputs inputs;
  if (!gram_inputs(info, &inputs)) return nullptr;
  // Without it correlations are recomputed at each step: slower, and right wherever the constants lie.
  if (!on_device(info, kPursuitAnalysis) || !on_device(info, kPursuitAtoms)) return nullptr;
  const GramOperands& from = inputs.operands;
  op->gram_dtype = from.m <= kGramInFp32 ? DType::kF32 : DType::kF16;
  const auto m = static_cast<size_t>(from.m);
  void* gram = allocator->Alloc(allocator, m * m * size_of(op->gram_dtype));
  if (gram == nullptr) throw std::bad_alloc();
  try {
    check(cuda::build_gram(from.analysis, from.atoms, from.weight, from.scales, from.m, from.d, gram,
                           op->gram_dtype, nullptr));
    // The session's streams do not wait for the default one, and it is being built: time does not matter.
    check_cuda(cudaStreamSynchronize(nullptr), "SteerPursuit: building the Gram matrix");
  } catch (...) {
    allocator->Free(allocator, gram);
    throw;
  }
  return gram;
}
void* build_gram(const Ort::ConstKernelInfo&, OrtAllocator*, Rows*) { return nullptr; }

void attach_gram(const SteerPursuit& from, const void* gram, SteerPursuit* op) {
  if (gram == nullptr || op->gram != nullptr) return;
  op->gram = gram;
  op->gram_dtype = from.gram_dtype;
}
void attach_gram(const Rows&, const void*, Rows*) {}

}  // namespace

template <class Op, size_t N>
CudaKernel<Op, N>::CudaKernel(const OrtKernelInfo* raw) {
  const Ort::ConstKernelInfo info(raw);
  read_attributes(info, &attributes_);
  Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAllocator(raw, OrtMemTypeDefault, &allocator_));
  try {
    const OrtMemoryInfo* where = nullptr;
    int index = 0;
    Ort::ThrowOnError(Ort::GetApi().AllocatorGetInfo(allocator_, &where));
    Ort::ThrowOnError(Ort::GetApi().MemoryInfoGetId(where, &index));
    check(cuda::properties(index, &device_));
    gram_ = build_gram(info, allocator_, &attributes_);
  } catch (...) {
    Ort::GetApi().ReleaseAllocator(allocator_);
    throw;
  }
}

template <class Op, size_t N>
CudaKernel<Op, N>::~CudaKernel() {
  if (gram_ != nullptr) allocator_->Free(allocator_, gram_);
  Ort::GetApi().ReleaseAllocator(allocator_);
}

template <class Op, size_t N>
void CudaKernel<Op, N>::compute(OrtKernelContext* raw) const {
  const Ort::KernelContext context(raw);
  Tensor tensors[N];
  Operand operands[N];
  const size_t given = context.GetInputCount();
  for (size_t i = 0; i < N && i < given; ++i) {
    tensors[i] = Tensor(context.GetInput(i));
    operands[i] = tensors[i].operand();
  }
  Op op = attributes_;
  check(bind(operands, &op));
  attach_gram(attributes_, gram_, &op);

  std::vector<int64_t> shape = tensors[0].shape();
  op.out = output(context, kOutZ, shape);
  shape.back() = 2;
  op.doses = static_cast<float*>(output(context, kOutDoses, shape));
  shape.back() = op.k_out;
  if constexpr (!std::is_same_v<Op, SteerAffine>) {
    op.support_index = static_cast<int32_t*>(output(context, kOutIndex, shape));
    op.support_value = static_cast<float*>(output(context, kOutValue, shape));
  }
  if (op.support_index == nullptr && op.support_value == nullptr) op.k_out = 0;
  if (op.rows == 0) return;
  cuda::Plan plan;
  check(cuda::plan(op, device_, &plan));

  // Results that nobody asked for still need a place.
  const auto rows = static_cast<size_t>(op.rows);
  const size_t doses = op.doses == nullptr ? aligned(rows * 2 * sizeof(float)) : 0;
  const bool half = op.k_out > 0 && (op.support_index == nullptr || op.support_value == nullptr);
  const size_t support = half ? aligned(rows * static_cast<size_t>(op.k_out) * sizeof(float)) : 0;
  const size_t workspace = aligned(plan.workspace_bytes);
  const Scratch scratch(raw, allocator_, workspace + doses + support);
  char* memory = scratch.data();
  if (doses > 0) op.doses = reinterpret_cast<float*>(memory + workspace);
  if (half && op.support_index == nullptr)
    op.support_index = reinterpret_cast<int32_t*>(memory + workspace + doses);
  else if (half)
    op.support_value = reinterpret_cast<float*>(memory + workspace + doses);
  auto* stream = static_cast<cuda::Stream>(context.GetGPUComputeStream());
  check(cuda::steer(op, plan, workspace > 0 ? memory : nullptr, stream));
}

template class CudaKernel<SteerSae, kSaeInputs>;
template class CudaKernel<SteerPursuit, kPursuitInputs>;
template class CudaKernel<SteerAffine, kAffineInputs>;

}  // namespace daco::adapters
