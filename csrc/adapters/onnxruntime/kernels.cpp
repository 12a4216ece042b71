#include "adapters/onnxruntime/kernels.h"

#include "adapters/thread_pool.h"

namespace daco::adapters {
namespace {

// Multiplications below which starting threads costs more than they save.
constexpr int64_t kSmallGram = 100'000'000;

// The precomputed Gram matrix belongs to pursuit only.
void attach_gram(const SteerPursuit& from, const char* gram, SteerPursuit* op) {
  if (gram == nullptr || op->gram != nullptr) return;
  op->gram = gram;
  op->gram_dtype = from.gram_dtype;
}
void attach_gram(const SteerSae&, const char*, SteerSae*) {}
void attach_gram(const SteerAffine&, const char*, SteerAffine*) {}

}  // namespace

void* output(const Ort::KernelContext& context, size_t i, const std::vector<int64_t>& shape) {
  if (i >= context.GetOutputCount()) return nullptr;
  Ort::UnownedValue value = context.GetOutput(i, shape);
  return value == nullptr ? nullptr : value.GetTensorMutableRawData();
}

template <class Op, size_t N>
void Kernel<Op, N>::compute(OrtKernelContext* raw) const {
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
  attach_gram(attributes_, gram_.get(), &op);

  std::vector<int64_t> shape = tensors[0].shape();
  op.out = output(context, kOutZ, shape);
  shape.back() = 2;
  op.doses = static_cast<float*>(output(context, kOutDoses, shape));
  shape.back() = op.k_out;
  if constexpr (!std::is_same_v<Op, SteerAffine>) {
    op.support_index = static_cast<int32_t*>(output(context, kOutIndex, shape));
    op.support_value = static_cast<float*>(output(context, kOutValue, shape));
  }

  // Results that nobody asked for still need a place: the core writes doses always, and the two halves of
  // the support together.
  const auto rows = static_cast<size_t>(op.rows);
  size_t spare_doses = op.doses == nullptr ? rows * 2 : 0, spare_support = 0;
  if (op.support_index == nullptr && op.support_value == nullptr)
    op.k_out = 0;
  else if (op.support_index == nullptr || op.support_value == nullptr)
    spare_support = rows * static_cast<size_t>(op.k_out);

  const Executor executor = intra_op_threads(context);
  Plan plan;
  check(cpu::plan(op, executor.threads, &plan));
  if (op.rows == 0) return;
  const auto block = arena_.take(plan.workspace_bytes + (spare_doses + spare_support) * sizeof(float));
  char* memory = static_cast<char*>(block.data());
  auto* spare = reinterpret_cast<float*>(memory + plan.workspace_bytes);
  if (spare_doses > 0) op.doses = spare;
  if (spare_support > 0 && op.support_index == nullptr)
    op.support_index = reinterpret_cast<int32_t*>(spare + spare_doses);
  else if (spare_support > 0)
    op.support_value = spare + spare_doses;
  check(cpu::steer(op, plan, plan.workspace_bytes == 0 ? nullptr : memory, executor));
}

template class Kernel<SteerSae, kSaeInputs>;
template class Kernel<SteerPursuit, kPursuitInputs>;
template class Kernel<SteerAffine, kAffineInputs>;

void read_attributes(const Ort::ConstKernelInfo& info, SteerSae* op) {
  const char* name = SaeKernel::kName;
  check(parse_attribute(name, attribute<std::string>(info, name, "coder").c_str(), &op->coder));
  check(check_count(name, "k", attribute<int64_t>(info, name, "k"), op->coder == SaeCoder::kTopK ? 1 : 0,
                    &op->k));
  check(check_count(name, "k_out", attribute<int64_t>(info, name, "k_out"), 0, &op->k_out));
}

void read_attributes(const Ort::ConstKernelInfo& info, SteerPursuit* op) {
  const char* name = PursuitKernel::kName;
  check(parse_attribute(name, attribute<std::string>(info, name, "coder").c_str(), &op->coder));
  check(parse_attribute(name, attribute<std::string>(info, name, "sign").c_str(), &op->sign));
  check(check_count(name, "k", attribute<int64_t>(info, name, "k"), op->coder == PursuitCoder::kOmp ? 1 : 0,
                    &op->k));
  check(check_count(name, "k_out", attribute<int64_t>(info, name, "k_out"), 0, &op->k_out));
  op->tol = attribute<float>(info, name, "tol");
  op->tau = attribute<float>(info, name, "tau");
  op->alpha = attribute<float>(info, name, "alpha");
}

void read_attributes(const Ort::ConstKernelInfo& info, SteerAffine* op) {
  const char* name = AffineKernel::kName;
  check(parse_attribute(name, attribute<std::string>(info, name, "phi").c_str(), &op->phi));
  if (op->phi != AffinePhi::kClamp) return;
  const auto clamp = attribute<std::vector<float>>(info, name, "clamp");
  if (clamp.size() != 2) {
    check(make_status(Code::kInvalidArgument, "%s: attribute clamp must be [low, high], got %d numbers", name,
                      static_cast<int>(clamp.size())));
  }
  op->low = clamp[0];
  op->high = clamp[1];
}

bool gram_inputs(const Ort::ConstKernelInfo& info, GramInputs* out) {
  const bool given = info.GetInputCount() > kPursuitGram && !info.GetInputName(kPursuitGram).empty();
  if (given || info.GetInputCount() <= kPursuitAtoms) return false;
  int e_constant = 0, a_constant = 0;
  out->analysis = Tensor(info.GetTensorConstantInput(kPursuitAnalysis, &e_constant));
  out->atoms = Tensor(info.GetTensorConstantInput(kPursuitAtoms, &a_constant));
  if (!e_constant || !a_constant) return false;
  Operand scales;
  if (info.GetInputCount() > kPursuitScales && !info.GetInputName(kPursuitScales).empty()) {
    int s_constant = 0;
    out->scales = Tensor(info.GetTensorConstantInput(kPursuitScales, &s_constant));
    if (!s_constant) return false;
    scales = out->scales.operand();
  }
  check(bind_gram(out->analysis.operand(), out->atoms.operand(), scales, &out->operands));
  return true;
}

SaeKernel::SaeKernel(const OrtKernelInfo* raw) : Kernel(raw) {
  read_attributes(Ort::ConstKernelInfo(raw), &attributes_);
}

PursuitKernel::PursuitKernel(const OrtKernelInfo* raw) : Kernel(raw) {
  const Ort::ConstKernelInfo info(raw);
  read_attributes(info, &attributes_);
  precompute_gram(info);
}

// The Gram matrix is built here once instead of correlations being recomputed at every step of every row.
void PursuitKernel::precompute_gram(const Ort::ConstKernelInfo& info) {
  GramInputs inputs;
  if (!gram_inputs(info, &inputs)) return;
  const GramOperands& from = inputs.operands;
  const int64_t m = from.m;
  attributes_.gram_dtype = m <= kGramInFp32 ? DType::kF32 : DType::kF16;
  gram_.reset(new char[static_cast<size_t>(m) * static_cast<size_t>(m) * size_of(attributes_.gram_dtype)]);
  // A session under construction lends no threads, and tens of thousands of atoms take one thread a minute.
  ThreadPool pool(m * m * from.d < kSmallGram ? 1 : machine_threads());
  check(cpu::build_gram(from.analysis, from.atoms, from.weight, from.scales, m, from.d, gram_.get(),
                        attributes_.gram_dtype, pool.executor()));
}

AffineKernel::AffineKernel(const OrtKernelInfo* raw) : Kernel(raw) {
  read_attributes(Ort::ConstKernelInfo(raw), &attributes_);
}

}  // namespace daco::adapters
