// The torch library `daco`: schemas and the CPU kernels, on the LibTorch stable ABI, so that one binary
// serves every torch from 2.11 on. Shapes for tracing (fake tensors) live in daco_rt/ops/torch_ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "adapters/operands.h"

namespace daco::adapters {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using AffineOutputs = std::tuple<Tensor, Tensor>;

// A plain exception: torch's own macro would put this file's name before the sentence.
void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

// Owns a string argument. The stable ABI's own conversion to std::string allocates one that nobody frees,
// 32 bytes a call, so the handle is taken as it comes.
class Text {
 public:
  explicit Text(StringHandle handle) : handle_(handle) {}
  ~Text() { torch_delete_string(handle_); }
  Text(const Text&) = delete;
  Text& operator=(const Text&) = delete;

  const char* c_str() const {
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &data));
    return data;
  }

 private:
  StringHandle handle_;
};

Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Element::kF32;
    case ScalarType::Half: return Element::kF16;
    case ScalarType::BFloat16: return Element::kBF16;
    case ScalarType::Char: return Element::kI8;
    case ScalarType::Float8_e4m3fn: return Element::kF8E4M3;
    case ScalarType::Int: return Element::kI32;
    case ScalarType::Bool: return Element::kBool;
    default: return Element::kOther;
  }
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Char: return "int8";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// Describes a tensor; the tensor must outlive the operand, which points at its sizes.
Operand describe(const Tensor& x) {
  Operand o;
  const auto sizes = x.sizes();
  o.data = x.const_data_ptr();
  o.element = element_of(x.scalar_type());
  o.element_name = name_of(x.scalar_type());
  o.shape = sizes.data();
  o.rank = sizes.size();
  return o;
}

Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// The distance of rows if z can be read in place as [T, d], else 0: a slice of the last tokens of a
// hidden state needs no copy.
int64_t row_stride(const Tensor& z) {
  const int64_t rank = z.dim();
  if (rank < 2 || z.stride(rank - 1) != 1) return 0;
  int64_t stride = 0, expected = 0;
  for (int64_t i = rank - 2; i >= 0; --i) {
    if (z.size(i) == 1) continue;
    if (stride == 0)
      stride = z.stride(i);
    else if (z.stride(i) != expected)
      return 0;
    expected = z.stride(i) * z.size(i);
  }
  return stride >= z.size(rank - 1) ? stride : 0;
}

Executor torch_threads() {
  Executor e;
  e.threads = static_cast<int>(torch::stable::get_num_threads());
  e.run = [](void*, int64_t tasks, void (*body)(void*, int64_t), void* arg) {
    torch::stable::parallel_for(0, tasks, 1, [body, arg](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) body(arg, t);
    });
  };
  return e;
}

// An uninitialised tensor on the CPU. The call below is what the stable interface's `empty` ends in, without
// the dispatcher, which costs more than a decoded token's whole row.
Tensor make(const std::vector<int64_t>& shape, int32_t dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * (shape[i] > 1 ? shape[i] : 1);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  return Tensor(handle);
}

int32_t dtype_of(DType type) {
  switch (type) {
    case DType::kF16: return aoti_torch_dtype_float16();
    case DType::kBF16: return aoti_torch_dtype_bfloat16();
    default: return aoti_torch_dtype_float32();
  }
}

// Allocates the outputs, plans, runs. The workspace is torch's too, so its caching allocator serves it.
template <class Op>
Outputs run(Op& op, const Tensor& z) {
  const auto sizes = z.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  Tensor out = make(shape, dtype_of(op.activation));
  shape.back() = 2;
  Tensor doses = make(shape, aoti_torch_dtype_float32());
  shape.back() = op.k_out;
  Tensor index = make(shape, aoti_torch_dtype_int32());
  Tensor value = make(shape, aoti_torch_dtype_float32());
  op.out = out.mutable_data_ptr();
  op.doses = static_cast<float*>(doses.mutable_data_ptr());
  if (op.k_out > 0) {
    op.support_index = static_cast<int32_t*>(index.mutable_data_ptr());
    op.support_value = static_cast<float*>(value.mutable_data_ptr());
  }
  const Executor executor = torch_threads();
  Plan plan;
  check(cpu::plan(op, executor.threads, &plan));
  if (op.rows > 0) {
    // One cache line more than asked for: torch's CPU allocator promises 64 bytes only by default.
    constexpr size_t kLine = 64;
    Tensor scratch = make({static_cast<int64_t>(plan.workspace_bytes + kLine)}, aoti_torch_dtype_uint8());
    const auto start = reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr());
    void* workspace = reinterpret_cast<void*>((start + kLine - 1) / kLine * kLine);
    check(cpu::steer(op, plan, plan.workspace_bytes == 0 ? nullptr : workspace, executor));
  }
  return {out, doses, index, value};
}

template <class Op, size_t N>
Outputs steer(Op& op, std::array<Tensor, N>& tensors) {
  const int64_t stride = row_stride(tensors[0]);
  if (stride == 0) tensors[0] = packed(tensors[0]);
  for (size_t i = 1; i < N; ++i) tensors[i] = packed(tensors[i]);
  Operand operands[N];
  for (size_t i = 0; i < N; ++i) operands[i] = describe(tensors[i]);
  check(bind(operands, &op));
  if (stride != 0) op.z_stride = stride;
  return run(op, tensors[0]);
}

Outputs steer_sae(const Tensor& z, const Tensor& slots, const Tensor& enc, const Tensor& enc_bias,
                  const Tensor& dec, const Tensor& threshold, const Tensor& gain, const Tensor& boost,
                  const Tensor& undesirable, const Tensor& shift, const Tensor& limits, const Tensor& scales,
                  StringHandle coder, int64_t k, int64_t k_out) {
  const Text coder_text(coder);
  const char* name = "steer_sae";
  SteerSae op;
  check(parse_attribute(name, coder_text.c_str(), &op.coder));
  check(check_count(name, "k", k, op.coder == SaeCoder::kTopK ? 1 : 0, &op.k));
  check(check_count(name, "k_out", k_out, 0, &op.k_out));
  std::array<Tensor, kSaeInputs> tensors = {z,    slots, enc,         enc_bias, dec,    threshold,
                                            gain, boost, undesirable, shift,    limits, scales};
  return steer(op, tensors);
}

Outputs steer_pursuit(const Tensor& z, const Tensor& slots, const Tensor& analysis, const Tensor& bias,
                      const Tensor& gram, const Tensor& atoms, const Tensor& gain, const Tensor& boost,
                      const Tensor& undesirable, const Tensor& shift, const Tensor& limits,
                      const Tensor& scales, StringHandle coder, int64_t k, StringHandle sign, double tol,
                      double tau, double alpha, int64_t k_out) {
  const Text coder_text(coder), sign_text(sign);
  const char* name = "steer_pursuit";
  SteerPursuit op;
  check(parse_attribute(name, coder_text.c_str(), &op.coder));
  check(parse_attribute(name, sign_text.c_str(), &op.sign));
  check(check_count(name, "k", k, op.coder == PursuitCoder::kOmp ? 1 : 0, &op.k));
  check(check_count(name, "k_out", k_out, 0, &op.k_out));
  op.tol = static_cast<float>(tol);
  op.tau = static_cast<float>(tau);
  op.alpha = static_cast<float>(alpha);
  std::array<Tensor, kPursuitInputs> tensors = {z,    slots, analysis,    bias,  gram,   atoms,
                                                gain, boost, undesirable, shift, limits, scales};
  return steer(op, tensors);
}

AffineOutputs steer_affine(const Tensor& z, const Tensor& slots, const Tensor& a, const Tensor& a_bias,
                           const Tensor& b, const Tensor& shift, const Tensor& limits, StringHandle phi,
                           double low, double high) {
  const Text phi_text(phi);
  SteerAffine op;
  check(parse_attribute("steer_affine", phi_text.c_str(), &op.phi));
  op.low = static_cast<float>(low);
  op.high = static_cast<float>(high);
  std::array<Tensor, kAffineInputs> tensors = {z, slots, a, a_bias, b, shift, limits};
  const Outputs all = steer(op, tensors);
  return {std::get<0>(all), std::get<1>(all)};
}

Tensor build_gram(const Tensor& analysis, const Tensor& atoms, const Tensor& scales, ScalarType dtype) {
  if (dtype != ScalarType::Float && dtype != ScalarType::Half)
    check(make_status(Code::kInvalidArgument, "build_gram: dtype must be float32 or float16, got %s",
                      name_of(dtype)));
  const DType stored = dtype == ScalarType::Float ? DType::kF32 : DType::kF16;
  const Tensor e = packed(analysis), a = packed(atoms), s = packed(scales);
  GramOperands from;
  check(bind_gram(describe(e), describe(a), describe(s), &from));
  Tensor gram = make({from.m, from.m}, dtype_of(stored));
  check(cpu::build_gram(from.analysis, from.atoms, from.weight, from.scales, from.m, from.d,
                        gram.mutable_data_ptr(), stored, torch_threads()));
  return gram;
}

}  // namespace
}  // namespace daco::adapters

STABLE_TORCH_LIBRARY(daco, m) {
  m.def(
      "steer_sae(Tensor z, Tensor slots, Tensor enc, Tensor enc_bias, Tensor dec, Tensor threshold, "
      "Tensor gain, Tensor boost, Tensor undesirable, Tensor shift, Tensor limits, Tensor scales, *, "
      "str coder, int k, int k_out) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "steer_pursuit(Tensor z, Tensor slots, Tensor analysis, Tensor bias, Tensor gram, Tensor atoms, "
      "Tensor gain, Tensor boost, Tensor undesirable, Tensor shift, Tensor limits, Tensor scales, *, "
      "str coder, int k, str sign, float tol, float tau, float alpha, int k_out) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "steer_affine(Tensor z, Tensor slots, Tensor a, Tensor a_bias, Tensor b, Tensor shift, Tensor limits, "
      "*, "
      "str phi, float low, float high) -> (Tensor, Tensor)");
  m.def("build_gram(Tensor analysis, Tensor atoms, Tensor scales, *, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(daco, CPU, m) {
  m.impl("steer_sae", TORCH_BOX(&daco::adapters::steer_sae));
  m.impl("steer_pursuit", TORCH_BOX(&daco::adapters::steer_pursuit));
  m.impl("steer_affine", TORCH_BOX(&daco::adapters::steer_affine));
  m.impl("build_gram", TORCH_BOX(&daco::adapters::build_gram));
}
