// What is refused, in which words, and what a plan promises.
#include <cstdlib>

#include "problem.h"

using namespace daco;
using problem::Operands;
using problem::Shape;

namespace {

// A call that validate() accepts, with outputs.
struct Accepted {
  Operands operands{Shape{}};
  std::vector<float> out = std::vector<float>(operands.z.size());
  std::vector<float> doses = std::vector<float>(2 * operands.slots.size());
  std::vector<int32_t> index = std::vector<int32_t>(3 * operands.slots.size());
  std::vector<float> value = std::vector<float>(index.size());

  template <class Op>
  Op with_outputs(Op op) {
    op.out = out.data();
    op.doses = doses.data();
    op.support_index = index.data();
    op.support_value = value.data();
    return op;
  }
  SteerSae sae(SaeCoder coder = SaeCoder::kJumpRelu) { return with_outputs(operands.sae(coder)); }
  SteerPursuit pursuit() { return with_outputs(operands.pursuit(PursuitSign::kPositive, true)); }
};

template <class Op, class F>
void refuses(Op op, const char* text, F&& spoil) {
  spoil(op);
  CHECK_STATUS(validate(op), Code::kInvalidArgument, text);
}

void* shifted(const void* p, size_t bytes) { return const_cast<char*>(static_cast<const char*>(p)) + bytes; }

}  // namespace

TEST(accepts_good_calls) {
  Accepted a;
  for (SaeCoder coder : {SaeCoder::kTopK, SaeCoder::kRelu, SaeCoder::kJumpRelu, SaeCoder::kNone}) {
    CHECK_OK(validate(a.sae(coder)));
  }
  CHECK_OK(validate(a.pursuit()));
  SteerSae none = a.sae(SaeCoder::kNone);
  none.enc = none.dec = none.threshold = none.enc_bias = nullptr;
  CHECK_OK(validate(none));
  SteerSae optional = a.sae(SaeCoder::kTopK);
  optional.boost = optional.threshold = nullptr;
  CHECK_OK(validate(optional));
  SteerPursuit no_gram = a.pursuit();
  no_gram.gram = nullptr;
  CHECK_OK(validate(no_gram));
  SteerSae empty = a.sae();
  empty.rows = 0;
  empty.z = empty.slots = nullptr;
  empty.out = nullptr;
  empty.doses = nullptr;
  CHECK_OK(validate(empty));
}

TEST(refuses_bad_sizes_by_name) {
  Accepted a;
  refuses(a.sae(), "SteerSae: z: expected at least 0 rows, got -1", [](SteerSae& o) { o.rows = -1; });
  refuses(a.sae(), "width d", [](SteerSae& o) { o.dim = 0; });
  refuses(a.sae(), "atoms m", [](SteerSae& o) { o.atoms = 0; });
  refuses(a.sae(), "policies P: expected at least 2", [](SteerSae& o) { o.policies = 1; });
  refuses(a.sae(), "k_out", [](SteerSae& o) { o.k_out = -1; });
  refuses(a.sae(), "coder", [](SteerSae& o) { o.coder = static_cast<SaeCoder>(9); });
  refuses(a.sae(SaeCoder::kTopK), "k: expected 1 to m", [](SteerSae& o) { o.k = 0; });
  refuses(a.sae(SaeCoder::kTopK), "k: expected 1 to m with coder topk, got 34",
          [](SteerSae& o) { o.k = 34; });
  refuses(a.sae(), "z: expected fp32, fp16 or bf16, got int8",
          [](SteerSae& o) { o.activation = DType::kI8; });
  refuses(a.pursuit(), "SteerPursuit: k", [](SteerPursuit& o) { o.k = 65; });
  refuses(a.pursuit(), "tol", [](SteerPursuit& o) { o.tol = -1.f; });
  refuses(a.pursuit(), "tol", [](SteerPursuit& o) { o.tol = NAN; });
  refuses(a.pursuit(), "sign", [](SteerPursuit& o) { o.sign = static_cast<PursuitSign>(3); });
  refuses(a.pursuit(), "gram: expected fp32 or fp16, got bf16",
          [](SteerPursuit& o) { o.gram_dtype = DType::kBF16; });
  refuses(a.pursuit(), "tau", [](SteerPursuit& o) {
    o.coder = PursuitCoder::kElasticNet;
    o.tau = 2.f;
  });
  refuses(a.pursuit(), "alpha", [](SteerPursuit& o) {
    o.coder = PursuitCoder::kElasticNet;
    o.alpha = 0.f;
  });
}

TEST(refuses_bad_pointers_by_name) {
  Accepted a;
  refuses(a.sae(), "z: expected a buffer", [](SteerSae& o) { o.z = nullptr; });
  refuses(a.sae(), "slots", [](SteerSae& o) { o.slots = nullptr; });
  refuses(a.sae(), "enc_bias", [](SteerSae& o) { o.enc_bias = nullptr; });
  refuses(a.sae(), "dec", [](SteerSae& o) { o.dec = nullptr; });
  refuses(a.sae(), "threshold", [](SteerSae& o) { o.threshold = nullptr; });
  refuses(a.sae(), "support_value", [](SteerSae& o) { o.support_value = nullptr; });
  refuses(a.sae(), "scales: expected none", [&](SteerSae& o) { o.scales = a.operands.bias.data(); });
  refuses(a.pursuit(), "analysis", [](SteerPursuit& o) { o.analysis = nullptr; });
  refuses(a.sae(), "gain: expected a pointer aligned to its 4-byte elements",
          [](SteerSae& o) { o.gain = static_cast<const float*>(shifted(o.gain, 2)); });
}

TEST(refuses_overlapping_rows) {
  Accepted a;
  SteerSae same = a.sae();
  same.out = a.operands.z.data();
  CHECK_OK(validate(same));
  refuses(same, "partial overlap", [](SteerSae& o) { o.out = shifted(o.out, 4); });
  refuses(same, "partial overlap", [](SteerSae& o) { o.out_stride += 1; });
  refuses(a.sae(), "row stride", [](SteerSae& o) { o.z_stride = o.dim - 1; });
  // Two column ranges of one wide buffer interleave without meeting.
  SteerSae apart = a.sae();
  std::vector<float> wide(static_cast<size_t>(apart.rows * apart.dim * 2));
  apart.z = wide.data();
  apart.out = wide.data() + apart.dim;
  apart.z_stride = apart.out_stride = 2 * apart.dim;
  CHECK_OK(validate(apart));
  apart.out = wide.data() + apart.dim - 1;
  CHECK_STATUS(validate(apart), Code::kInvalidArgument, "partial overlap");
}

TEST(says_what_is_unsupported) {
  Accepted a;
  Plan plan;
  SteerSae sae = a.sae();
  sae.scales = a.operands.bias.data();
  sae.weight = DType::kF8E4M3;
  CHECK_STATUS(cpu::plan(sae, 1, &plan), Code::kUnsupported,
               "SteerSae: weights: fp8_e4m3 has kernels on CUDA only; on the CPU quantise to int8");
  CHECK_STATUS(cpu::steer(sae, plan, nullptr, Executor::serial()), Code::kUnsupported, "fp8_e4m3");
  SteerPursuit pursuit = a.pursuit();
  pursuit.weight = DType::kF8E4M3;
  CHECK_STATUS(cpu::plan(pursuit, 1, &plan), Code::kUnsupported, "fp8_e4m3");
}

TEST(quantised_weights_need_scales) {
  Accepted a;
  SteerSae sae = a.operands.quantise(a.sae());
  CHECK_OK(validate(sae));
  refuses(sae, "SteerSae: scales: expected a buffer", [](SteerSae& o) { o.scales = nullptr; });
  SteerPursuit pursuit = a.operands.quantise(a.pursuit());
  CHECK_OK(validate(pursuit));
  refuses(pursuit, "SteerPursuit: scales: expected a buffer", [](SteerPursuit& o) { o.scales = nullptr; });
  SteerSae none = a.sae(SaeCoder::kNone);
  none.weight = DType::kF8E4M3;  // coder none reads no matrix, of whatever type
  CHECK_OK(validate(none));
  Plan plan;
  CHECK_OK(cpu::plan(none, 1, &plan));
}

TEST(refuses_bad_affine_calls_by_name) {
  problem::AffineOperands operands(6, 17, 3);
  std::vector<float> out(6 * 17), doses(12);
  SteerAffine op = operands.op(AffinePhi::kClamp);
  op.out = out.data();
  op.doses = doses.data();
  CHECK_OK(validate(op));
  refuses(op, "SteerAffine: a: expected [P, r, d] with a rank r of at least 1, got 0",
          [](SteerAffine& o) { o.atoms = 0; });
  refuses(op, "SteerAffine: clamp: expected low <= high, got [1, 0.5]", [](SteerAffine& o) { o.low = 1.f; });
  refuses(op, "clamp", [](SteerAffine& o) { o.high = NAN; });
  refuses(op, "phi", [](SteerAffine& o) { o.phi = static_cast<AffinePhi>(3); });
  refuses(op, "k_out", [](SteerAffine& o) { o.k_out = 1; });
  refuses(op, "a: expected fp32, fp16 or bf16, got int8", [](SteerAffine& o) { o.weight = DType::kI8; });
  refuses(op, "scales: expected none", [&](SteerAffine& o) { o.scales = operands.shift.data(); });
  refuses(op, "policies P", [](SteerAffine& o) { o.policies = 1; });
  refuses(op, "a: expected a buffer", [](SteerAffine& o) { o.a = nullptr; });
  refuses(op, "a_bias", [](SteerAffine& o) { o.a_bias = nullptr; });
  refuses(op, "b: expected a buffer", [](SteerAffine& o) { o.b = nullptr; });
  refuses(op, "shift", [](SteerAffine& o) { o.shift = nullptr; });
  refuses(op, "limits", [](SteerAffine& o) { o.limits = nullptr; });
  refuses(op, "partial overlap", [&](SteerAffine& o) { o.out = operands.z.data() + 1; });
  op.phi = AffinePhi::kRelu;
  op.low = NAN;  // read by clamp only
  CHECK_OK(validate(op));
  AffinePhi phi;
  for (const char* name : {"identity", "relu", "clamp"}) {
    CHECK(parse(name, &phi) && std::strcmp(name_of(phi), name) == 0);
  }
  CHECK(!parse("tanh", &phi));
}

TEST(plans_without_pointers_what_runs_with_them) {
  SteerSae op;
  op.rows = 100;
  op.dim = 64;
  op.atoms = 1000;
  op.policies = 3;
  op.k = 8;
  Plan one, many, again;
  CHECK_OK(cpu::plan(op, 1, &one));
  CHECK_OK(cpu::plan(op, 8, &many));
  CHECK_OK(cpu::plan(op, 8, &again));
  CHECK(one.workspace_bytes > 0 && one.workspace_bytes <= many.workspace_bytes);
  CHECK(many.workspace_bytes == again.workspace_bytes && many.threads == 8);
  CHECK(std::strlen(one.variant) > 0 && std::strlen(one.reason) > 0);
  op.rows = 1000000;
  CHECK_OK(cpu::plan(op, 8, &again));
  CHECK(again.workspace_bytes < 2 * many.workspace_bytes);  // bounded, whatever T is

  SteerPursuit pursuit;
  pursuit.rows = 4;
  pursuit.dim = 64;
  static_cast<Rows&>(pursuit).atoms = 1000;
  pursuit.policies = 3;
  pursuit.k = 8;
  CHECK_OK(cpu::plan(pursuit, 2, &one));
  float some;
  pursuit.gram = &some;
  CHECK_OK(cpu::plan(pursuit, 2, &many));
  CHECK(one.workspace_bytes == many.workspace_bytes);
  op.rows = 0;
  CHECK_OK(cpu::plan(op, 1, &one));
  CHECK(one.workspace_bytes == 0);
}

TEST(refuses_a_workspace_that_does_not_do) {
  Accepted a;
  const SteerSae op = a.sae();
  Plan plan;
  CHECK_OK(cpu::plan(op, 1, &plan));
  problem::Fenced workspace(plan.workspace_bytes + 64, 0);
  CHECK_STATUS(cpu::steer(op, plan, nullptr, Executor::serial()), Code::kWorkspace, "workspace");
  CHECK_STATUS(cpu::steer(op, plan, workspace.as<char>() + 4, Executor::serial()), Code::kWorkspace,
               "aligned to 64");
  Plan small = plan;
  small.workspace_bytes /= 2;
  CHECK_STATUS(cpu::steer(op, small, workspace.as<>(), Executor::serial()), Code::kWorkspace, "plan again");
  Plan nobody = plan;
  nobody.threads = 0;
  CHECK_STATUS(cpu::steer(op, nobody, workspace.as<>(), Executor::serial()), Code::kInvalidArgument,
               "threads");
}

TEST(takes_the_instruction_set_from_the_environment) {
  Accepted a;
  Plan plan;
  setenv("DACO_RT_ISA", "scalar", 1);
  CHECK(cpu::best_isa() == Isa::kScalar);
  CHECK_OK(cpu::plan(a.sae(), 1, &plan));
  CHECK(plan.isa == Isa::kScalar);
  setenv("DACO_RT_ISA", "sse9", 1);
  CHECK_STATUS(cpu::plan(a.sae(), 1, &plan), Code::kInvalidArgument, "DACO_RT_ISA");
  CHECK_OK(cpu::plan(a.sae(), 1, &plan, Isa::kScalar));
  unsetenv("DACO_RT_ISA");
  CHECK(cpu::best_isa() == problem::isas().back());
  CHECK_STATUS(cpu::plan(a.sae(), 1, &plan, static_cast<Isa>(7)), Code::kInvalidArgument, "isa");
}

TEST(names_go_both_ways) {
  SaeCoder coder;
  PursuitCoder pursuit;
  PursuitSign sign;
  for (const char* name : {"topk", "relu", "jumprelu", "none"}) {
    CHECK(parse(name, &coder) && std::strcmp(name_of(coder), name) == 0);
  }
  for (const char* name : {"omp", "elastic_net"}) {
    CHECK(parse(name, &pursuit) && std::strcmp(name_of(pursuit), name) == 0);
  }
  for (const char* name : {"positive", "signed", "nnls"}) {
    CHECK(parse(name, &sign) && std::strcmp(name_of(sign), name) == 0);
  }
  CHECK(!parse("TopK", &coder) && !parse("", &coder) && !parse(nullptr, &coder));
  CHECK(std::strcmp(name_of(Isa::kAvx512), "avx512") == 0);
  CHECK(std::strcmp(name_of(static_cast<SaeCoder>(9)), "unknown") == 0);
}

TEST(truncates_long_messages) {
  const std::string text(1000, 'x');
  const Status status = make_status(Code::kDevice, "%s", text.c_str());
  CHECK(std::strlen(status.message) == sizeof(status.message) - 1);
}

TEST(build_gram_refuses_by_name) {
  float x = 0;
  const Executor serial = Executor::serial();
  CHECK_STATUS(cpu::build_gram(&x, &x, DType::kF32, nullptr, 0, 1, &x, DType::kF32, serial),
               Code::kInvalidArgument, "[m, d]");
  CHECK_STATUS(cpu::build_gram(&x, &x, DType::kF32, nullptr, 1, 1, &x, DType::kBF16, serial),
               Code::kInvalidArgument, "gram");
  CHECK_STATUS(cpu::build_gram(&x, &x, DType::kI8, nullptr, 1, 1, &x, DType::kF32, serial),
               Code::kInvalidArgument, "scales: expected [2, m] with int8 weights");
  CHECK_STATUS(cpu::build_gram(&x, &x, DType::kF32, &x, 1, 1, &x, DType::kF32, serial),
               Code::kInvalidArgument, "scales: expected none");
  CHECK_STATUS(cpu::build_gram(&x, &x, DType::kF8E4M3, &x, 1, 1, &x, DType::kF32, serial), Code::kUnsupported,
               "fp8_e4m3");
  CHECK_STATUS(cpu::build_gram(nullptr, &x, DType::kF32, nullptr, 1, 1, &x, DType::kF32, serial),
               Code::kInvalidArgument, "analysis");
}

int main() { return check::run_all(); }
