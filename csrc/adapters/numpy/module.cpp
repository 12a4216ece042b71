// The extension module daco_rt._core: the kernels on NumPy arrays, and what this build is. Arguments are
// prepared by daco_rt/ops/numpy.py (contiguous arrays, outputs allocated); nothing here is public.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>

#include "adapters/operands.h"
#include "adapters/thread_pool.h"
#include "build_info.h"
#include "cpu/convert.h"

namespace nb = nanobind;

namespace daco::adapters {
namespace {

using Input = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::c_contig, nb::device::cpu>;

void check(const Status& status) {
  if (status.ok()) return;
  PyErr_SetString(status.code == Code::kUnsupported ? PyExc_NotImplementedError : PyExc_ValueError,
                  status.message);
  throw nb::python_error();
}

// bf16 arrives viewed as uint16: NumPy hands no other dtype of two bytes to this module.
Element element_of(nb::dlpack::dtype t) {
  if (t == nb::dtype<float>()) return Element::kF32;
  if (t == nb::dtype<int32_t>()) return Element::kI32;
  if (t == nb::dtype<int8_t>()) return Element::kI8;
  if (t == nb::dtype<bool>()) return Element::kBool;
  if (t == nb::dtype<uint16_t>()) return Element::kBF16;
  if (t.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && t.bits == 16) return Element::kF16;
  return Element::kOther;
}

Operand describe(const Input& x) {
  Operand o;
  o.data = x.data();
  o.element = element_of(x.dtype());
  o.element_name = "another dtype";
  o.shape = x.shape_ptr();
  o.rank = x.ndim();
  return o;
}

Isa isa_named(const std::string& name) {
  if (name == "auto") return Isa::kAuto;
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512})
    if (name == name_of(isa)) return isa;
  throw nb::value_error(("isa must be auto, scalar, avx2 or avx512, got '" + name + "'").c_str());
}

template <class Op>
constexpr bool op_has_support = !std::is_same_v<Op, SteerAffine>;

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// Inputs in the order of the operator contract, None where one is absent. Outputs: z', doses and, of
// operators with a code, the support.
template <class Op, size_t N>
void run(Op& op, const nb::tuple& inputs, const nb::tuple& outputs, const std::string& isa, int threads) {
  if (inputs.size() != N || outputs.size() != (op_has_support<Op> ? 4 : 2))
    throw nb::value_error("wrong number of operands");
  Input held[N];
  Operand operands[N];
  for (size_t i = 0; i < N; ++i) {
    if (inputs[i].is_none()) continue;
    held[i] = nb::cast<Input>(inputs[i]);
    operands[i] = describe(held[i]);
  }
  check(bind(operands, &op));
  Output out[4];
  for (size_t i = 0; i < outputs.size(); ++i) out[i] = nb::cast<Output>(outputs[i]);
  op.out = out[0].data();
  op.doses = static_cast<float*>(out[1].data());
  if (op.k_out > 0) {
    op.support_index = static_cast<int32_t*>(out[2].data());
    op.support_value = static_cast<float*>(out[3].data());
  }
  Plan plan;
  check(cpu::plan(op, threads, &plan, isa_named(isa)));
  if (op.rows == 0) return;
  constexpr size_t kLine = 64;
  const std::unique_ptr<void, FreeDeleter> workspace(
      plan.workspace_bytes ? std::aligned_alloc(kLine, (plan.workspace_bytes + kLine - 1) / kLine * kLine)
                           : nullptr);
  if (plan.workspace_bytes && !workspace) throw std::bad_alloc();
  Status status;
  {
    const nb::gil_scoped_release released;
    ThreadPool pool(threads);
    status = cpu::steer(op, plan, workspace.get(), pool.executor());
  }
  check(status);
}

void steer_sae(const nb::tuple& inputs, const nb::tuple& outputs, const std::string& coder, int64_t k,
               int64_t k_out, const std::string& isa, int threads) {
  SteerSae op;
  check(parse_attribute("steer_sae", coder.c_str(), &op.coder));
  check(check_count("steer_sae", "k", k, op.coder == SaeCoder::kTopK ? 1 : 0, &op.k));
  check(check_count("steer_sae", "k_out", k_out, 0, &op.k_out));
  run<SteerSae, kSaeInputs>(op, inputs, outputs, isa, threads);
}

void steer_pursuit(const nb::tuple& inputs, const nb::tuple& outputs, const std::string& coder, int64_t k,
                   const std::string& sign, double tol, double tau, double alpha, int64_t k_out,
                   const std::string& isa, int threads) {
  SteerPursuit op;
  check(parse_attribute("steer_pursuit", coder.c_str(), &op.coder));
  check(parse_attribute("steer_pursuit", sign.c_str(), &op.sign));
  check(check_count("steer_pursuit", "k", k, op.coder == PursuitCoder::kOmp ? 1 : 0, &op.k));
  check(check_count("steer_pursuit", "k_out", k_out, 0, &op.k_out));
  op.tol = static_cast<float>(tol);
  op.tau = static_cast<float>(tau);
  op.alpha = static_cast<float>(alpha);
  run<SteerPursuit, kPursuitInputs>(op, inputs, outputs, isa, threads);
}

void steer_affine(const nb::tuple& inputs, const nb::tuple& outputs, const std::string& phi, double low,
                  double high, const std::string& isa, int threads) {
  SteerAffine op;
  check(parse_attribute("steer_affine", phi.c_str(), &op.phi));
  op.low = static_cast<float>(low);
  op.high = static_cast<float>(high);
  run<SteerAffine, kAffineInputs>(op, inputs, outputs, isa, threads);
}

void build_gram(const Input& analysis, const Input& atoms, const nb::object& scales, const Output& gram,
                const std::string& isa, int threads) {
  Input held;
  if (!scales.is_none()) held = nb::cast<Input>(scales);
  GramOperands from;
  check(bind_gram(describe(analysis), describe(atoms), scales.is_none() ? Operand{} : describe(held), &from));
  const int64_t m = from.m;
  if (gram.ndim() != 2 || gram.shape(0) != static_cast<size_t>(m) || gram.shape(1) != static_cast<size_t>(m))
    throw nb::value_error("the output must have shape (m, m)");
  const DType type = gram.dtype() == nb::dtype<float>() ? DType::kF32 : DType::kF16;
  const Isa chosen = isa_named(isa);
  Status status;
  {
    const nb::gil_scoped_release released;
    ThreadPool pool(threads);
    status = cpu::build_gram(from.analysis, from.atoms, from.weight, from.scales, m, from.d, gram.data(),
                             type, pool.executor(), chosen);
  }
  check(status);
}

DType float_of(const char* name, const Operand& x) {
  switch (x.element) {
    case Element::kF32: return DType::kF32;
    case Element::kF16: return DType::kF16;
    case Element::kBF16: return DType::kBF16;
    default: throw nb::type_error((std::string("convert: ") + name + " must be fp32, fp16 or bf16").c_str());
  }
}

bool convert(const Input& from, const Output& to, const std::string& isa) {
  const Operand x = describe(from), y = describe(nb::cast<Input>(nb::cast(to)));
  if (x.count() != y.count()) throw nb::value_error("convert: both arrays must have as many elements");
  const DType given = float_of("from", x), wanted = float_of("to", y);
  const Isa chosen = isa_named(isa);
  bool fits = false;
  Status status;
  {
    const nb::gil_scoped_release released;
    status = cpu::convert(given, x.data, wanted, to.data(), x.count(), &fits, chosen);
  }
  check(status);
  return fits;
}

nb::dict build_info() {
  nb::dict info;
  info["version"] = DACO_RT_VERSION;
  info["commit"] = DACO_RT_COMMIT;
  info["compiler"] = DACO_RT_COMPILER;
  info["isas"] = DACO_RT_ISAS;
  info["best_isa"] = name_of(cpu::best_isa());
  info["torch_headers"] = DACO_RT_TORCH_HEADERS;
  info["onnxruntime_headers"] = DACO_RT_ONNXRUNTIME_HEADERS;
  info["cuda"] = false;
  info["tensorrt"] = DACO_RT_TENSORRT_HEADERS[0] != 0;
  info["tensorrt_headers"] = DACO_RT_TENSORRT_HEADERS;
  return info;
}

}  // namespace
}  // namespace daco::adapters

NB_MODULE(_core, m) {
  using namespace daco::adapters;
  m.def("steer_sae", &steer_sae);
  m.def("steer_pursuit", &steer_pursuit);
  m.def("steer_affine", &steer_affine);
  m.def("build_gram", &build_gram, nb::arg("analysis"), nb::arg("atoms"), nb::arg("scales").none(),
        nb::arg("gram"), nb::arg("isa"), nb::arg("threads"));
  m.def("convert", &convert, nb::arg("from"), nb::arg("to"), nb::arg("isa") = "auto");
  m.def("build_info", &build_info);
}
