// Whole calls of SteerPursuit by the GPU's launchers, run on the CPU, against the CPU kernels: types, signs,
// Gram matrices and none, cluster sizes, the elastic net, broken rows, odd sizes.
#include <cstdlib>

#include "cuda/pursuit_plan.h"
#include "cuda_case.h"

namespace {

using namespace cuda_case;
using daco::PursuitCoder;
using daco::PursuitSign;

struct Kind {
  PursuitCoder coder = PursuitCoder::kOmp;
  PursuitSign sign = PursuitSign::kPositive;
  bool with_gram = true;
  DType gram = DType::kF32;
  float tol = 0;
};

// The same Gram matrix for both sides, made from the numbers that the weights stand for.
void check_pursuit(const Kind& kind, Shape shape, DType activation, DType weight, unsigned seed,
                   int multiprocessors = 4) {
  Operands o(shape, seed);
  daco::SteerPursuit op = o.pursuit(kind.sign, false);
  op.coder = kind.coder;
  op.tol = kind.tol;
  op.tau = 0.9f;
  op.alpha = 0.1f;
  const auto entries = static_cast<size_t>(shape.atoms * shape.atoms);
  std::vector<float> gram(entries);
  std::vector<__half> narrow(entries);
  const std::string what = std::string(daco::name_of(kind.coder)) + " " + daco::name_of(kind.sign) +
                           ", rows " + std::to_string(shape.rows) + ", d " + std::to_string(shape.dim) +
                           ", m " + std::to_string(shape.atoms) + ", " + daco::name_of(activation) + " by " +
                           daco::name_of(weight) + (kind.with_gram ? ", gram " : ", no gram ") +
                           daco::name_of(kind.gram);
  bool made = false;
  check_types(op, &o, activation, weight, device(multiprocessors), what,
              [&](daco::SteerPursuit* call, const void* w) {
                call->analysis = call->synthesis = w;
                if (!kind.with_gram) return;
                if (!made) {  // called first with the exact numbers
                  CHECK_OK(daco::cpu::build_gram(w, w, DType::kF32, nullptr, shape.atoms, shape.dim,
                                                 gram.data(), DType::kF32, daco::Executor::serial()));
                  for (size_t i = 0; i < entries; ++i) narrow[i] = __float2half_rn(gram[i]);
                  made = true;
                }
                call->gram = kind.gram == DType::kF32 ? static_cast<const void*>(gram.data()) : narrow.data();
                call->gram_dtype = kind.gram;
              });
}

}  // namespace

TEST(omp_in_every_pair_of_types) {
  unsigned seed = 1;
  for (const DType weight : kWeights) {
    for (const DType activation : kFloats) {
      Kind kind;
      kind.gram = seed % 2 == 0 ? DType::kF32 : DType::kF16;
      check_pursuit(kind, Shape{9, 64, 96, 4, 5, 6}, activation, weight, ++seed);
    }
  }
}

TEST(omp_without_a_gram_matrix) {
  unsigned seed = 40;
  for (const DType weight : kWeights) {
    Kind kind;
    kind.with_gram = false;
    kind.sign = seed % 2 == 0 ? PursuitSign::kPositive : PursuitSign::kSigned;
    check_pursuit(kind, Shape{9, 48, 70, 4, 5, 3}, DType::kF32, weight, ++seed);
  }
}

TEST(omp_with_both_signs_and_a_tolerance) {
  Kind kind;
  kind.sign = PursuitSign::kSigned;
  check_pursuit(kind, Shape{9, 30, 45, 4, 8, 9}, DType::kF32, DType::kF32, 60);
  kind.gram = DType::kF16;
  check_pursuit(kind, Shape{9, 30, 45, 4, 8, 9}, DType::kF32, DType::kF32, 61);
  kind.tol = 0.6f;
  check_pursuit(kind, Shape{9, 30, 45, 4, 12, 9}, DType::kF32, DType::kF32, 62);
  kind.with_gram = false;
  check_pursuit(kind, Shape{9, 30, 45, 4, 12, 9}, DType::kF32, DType::kF32, 63);
}

TEST(omp_at_awkward_sizes) {
  Kind kind;
  check_pursuit(kind, Shape{1, 1, 1, 3, 1, 1}, DType::kF32, DType::kF32, 70);
  check_pursuit(kind, Shape{8, 7, 13, 3, 13, 20}, DType::kF32, DType::kF32, 71);
  kind.gram = DType::kF16;
  check_pursuit(kind, Shape{8, 17, 33, 3, 6, 4}, DType::kF16, DType::kI8, 72);
  check_pursuit(kind, Shape{3, 130, 80, 3, 40, 4}, DType::kF32, DType::kF32, 73);
}

TEST(omp_over_clusters) {
  for (const int multiprocessors : {4, 40, 132}) {
    Kind kind;
    kind.gram = DType::kF16;
    check_pursuit(kind, Shape{3, 64, 200, 3, 6, 4}, DType::kBF16, DType::kBF16, 80, multiprocessors);
    kind.gram = DType::kF32;
    check_pursuit(kind, Shape{3, 64, 203, 3, 6, 4}, DType::kF32, DType::kF32, 81, multiprocessors);
  }
}

TEST(elastic_net) {
  unsigned seed = 90;
  for (const PursuitSign sign : {PursuitSign::kPositive, PursuitSign::kSigned, PursuitSign::kNonNegative}) {
    Kind kind;
    kind.coder = PursuitCoder::kElasticNet;
    kind.sign = sign;
    check_pursuit(kind, Shape{9, 40, 60, 4, 1, 7}, DType::kF32, DType::kF32, ++seed);
    check_pursuit(kind, Shape{9, 40, 61, 4, 1, 7}, DType::kBF16, DType::kI8, ++seed);
  }
}

TEST(a_call_that_cannot_run_says_why) {
  Operands o(Shape{2, 16, 20, 3, 4, 0});
  daco::SteerPursuit op = o.pursuit(PursuitSign::kNonNegative, false);
  daco::cuda::Plan plan;
  CHECK_STATUS(daco::cuda::plan(op, device(), &plan), daco::Code::kUnsupported, "nnls");
  op.sign = PursuitSign::kPositive;
  CHECK_OK(daco::cuda::plan(op, device(), &plan));
  op.out = o.z.data();
  std::vector<float> doses(4);
  op.doses = doses.data();
  CHECK_STATUS(daco::cuda::steer(op, plan, nullptr, nullptr), daco::Code::kWorkspace, "aligned to 256");
  op.coder = PursuitCoder::kElasticNet;
  CHECK_STATUS(daco::cuda::steer(op, plan, nullptr, nullptr), daco::Code::kUnsupported, "gram");
}

int main() { return check::run_all(); }
