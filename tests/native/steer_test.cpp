// Whole calls: what is copied, what is never touched, and that nothing depends on threads, dirt or place.
#include <sys/mman.h>

#include <limits>

#include "problem.h"

using namespace daco;
using problem::Operands;
using problem::Result;
using problem::Shape;

namespace {

const SaeCoder kCoders[] = {SaeCoder::kTopK, SaeCoder::kRelu, SaeCoder::kJumpRelu, SaeCoder::kNone};
const PursuitSign kSigns[] = {PursuitSign::kPositive, PursuitSign::kSigned, PursuitSign::kNonNegative};

// Calls f(op) for every operator, coder and sign over these operands.
template <class F>
void for_each_op(Operands& operands, F&& f) {
  for (SaeCoder coder : kCoders) {
    f(operands.sae(coder));
    f(operands.quantise(operands.sae(coder)));
  }
  for (PursuitSign sign : kSigns) {
    for (bool with_gram : {true, false}) {
      SteerPursuit op = operands.pursuit(sign, with_gram);
      f(op);
      f(operands.quantise(op));
      op.tol = 0.5f;
      f(op);
      op.coder = PursuitCoder::kElasticNet;
      f(op);
      f(operands.quantise(op));
    }
  }
}

// Memory that faults when it is read.
class Unreadable {
 public:
  Unreadable() : data_(mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {}
  ~Unreadable() { munmap(data_, kBytes); }
  void* data() { return data_; }

 private:
  static constexpr size_t kBytes = 1 << 16;
  void* data_;
};

float at(const std::vector<unsigned char>& bytes, size_t i) {
  float x;
  std::memcpy(&x, bytes.data() + 4 * i, 4);
  return x;
}

}  // namespace

TEST(nothing_depends_on_threads_dirt_place_or_alignment) {
  for (const Shape shape : {Shape{5, 17, 33, 4, 6, 3}, Shape{1, 1, 1, 3, 1, 1}, Shape{67, 64, 129, 5, 12, 0},
                            Shape{3, 100, 300, 4, 40, 50}}) {
    Operands operands(shape);
    for (Isa isa : problem::isas()) {
      for_each_op(operands, [&](auto op) {
        const Result first = problem::run(op, isa, 1);
        CHECK(problem::run(op, isa, 1, false, 0x00) == first);
        CHECK(problem::run(op, isa, 3, false, 0x7f) == first);
        CHECK(problem::run(op, isa, 3, true) == first);
        CHECK(problem::run(op, isa, 1, true, 0xff, 4) == first);
      });
    }
  }
}

TEST(a_row_has_the_same_bits_alone_and_in_a_batch) {
  Operands operands({70, 33, 65, 4, 5, 4});
  for (Isa isa : problem::isas()) {
    for_each_op(operands, [&](auto op) {
      const Result together = problem::run(op, isa, 2);
      for (int64_t t : {0, 13, 69}) {
        auto one = op;
        one.rows = 1;
        one.z = operands.z.data() + t * op.dim;
        one.slots = operands.slots.data() + t;
        const Result alone = problem::run(one, isa, 1);
        const size_t bytes = static_cast<size_t>(op.dim) * 4;
        CHECK(std::memcmp(alone.out.data(), together.out.data() + t * bytes, bytes) == 0);
        CHECK(std::memcmp(alone.doses.data(), together.doses.data() + t * 8, 8) == 0);
        CHECK(std::memcmp(alone.index.data(), together.index.data() + t * 16, 16) == 0);
      }
    });
  }
}

TEST(rows_that_are_off_observed_or_broken_are_copied_bit_for_bit) {
  Operands operands({8, 19, 33, 4, 6, 2});
  operands.slots = {0, 1, 0, 2, 3, 1, -1, 4};
  const uint32_t odd_nan = 0x7fa12345u;
  std::memcpy(&operands.z[2 * 19 + 3], &odd_nan, 4);  // off: even a NaN keeps its payload
  std::memcpy(&operands.z[3 * 19 + 18], &odd_nan, 4);
  operands.z[4 * 19] = INFINITY;
  operands.z[1 * 19] = -0.f;
  for (Isa isa : problem::isas()) {
    for_each_op(operands, [&](auto op) {
      const Result got = problem::run(op, isa, 2);
      const auto* z = reinterpret_cast<const unsigned char*>(operands.z.data());
      CHECK(std::memcmp(got.out.data(), z, 6 * 19 * 4) == 0);
      for (size_t i = 6 * 19; i < 8 * 19; ++i) CHECK(std::isnan(at(got.out, i)));
      CHECK(at(got.doses, 0) == 0 && at(got.doses, 1) == 0);
      CHECK(at(got.doses, 2) >= 0 && at(got.doses, 3) == 0);
      for (size_t t : {3, 4, 6, 7})
        CHECK(std::isnan(at(got.doses, 2 * t)) && std::isnan(at(got.doses, 2 * t + 1)));
      int32_t index[16];
      std::memcpy(index, got.index.data(), sizeof(index));
      for (size_t t : {0, 2, 3, 4, 6, 7}) CHECK(index[2 * t] == -1 && index[2 * t + 1] == -1);
    });
  }
}

TEST(a_policy_that_changes_nothing_copies_bit_for_bit) {
  Operands operands({6, 21, 33, 4, 6, 2});
  operands.slots = {2, 2, 3, 3, 2, 3};
  std::fill(operands.gain.begin(), operands.gain.begin() + 3 * 33, 1.f);
  std::fill(operands.boost.begin(), operands.boost.end(), 0.f);
  std::fill(operands.shift.begin(), operands.shift.end(), 0.f);
  operands.limits[2 * kLimits + kKeepNorm] = 1;     // gain 1 everywhere, norm keeping on
  operands.limits[3 * kLimits + kDeadband] = 1e9f;  // gain 0 somewhere, but no code is on
  operands.limits[3 * kLimits + kKeepNorm] = 1;
  operands.z[0] = -0.f;
  for (Isa isa : problem::isas()) {
    for_each_op(operands, [&](auto op) {
      const Result got = problem::run(op, isa, 1);
      CHECK(std::memcmp(got.out.data(), operands.z.data(), got.out.size()) == 0);
      for (size_t t = 0; t < 6; ++t) CHECK(at(got.doses, 2 * t + 1) == 0);
    });
  }
}

TEST(weights_are_not_touched_when_no_row_needs_a_code) {
  Operands operands({5, 17, 33, 4, 6, 3});
  operands.slots = {0, 0, -1, 2, 9};
  operands.z[3 * 17] = NAN;
  Unreadable wall;
  for (Isa isa : problem::isas()) {
    for (SaeCoder coder : kCoders) {
      SteerSae op = operands.sae(coder);
      op.enc = op.dec = wall.data();
      op.gain = op.boost = op.shift = op.limits = op.enc_bias = op.threshold =
          static_cast<float*>(wall.data());
      op.undesirable = static_cast<uint8_t*>(wall.data());
      problem::run(op, isa, 1);
    }
    SteerPursuit op = operands.pursuit(PursuitSign::kPositive, false);
    op.analysis = op.atoms = op.gram = wall.data();
    problem::run(op, isa, 1);
    op.coder = PursuitCoder::kElasticNet;
    problem::run(op, isa, 1);
  }
}

TEST(coder_none_never_reads_the_matrices) {
  Operands operands({5, 17, 33, 4, 6, 3});
  Unreadable wall;
  SteerSae op = operands.sae(SaeCoder::kNone);
  op.enc = op.dec = wall.data();
  op.gain = op.boost = op.enc_bias = op.threshold = static_cast<float*>(wall.data());
  for (Isa isa : problem::isas()) problem::run(op, isa, 2);
}

TEST(only_watched_latents_are_coded) {
  Operands operands({4, 1024, 64, 3, 1, 2});
  operands.slots = {1, 2, 2, 1};
  std::fill(operands.gain.begin(), operands.gain.end(), 1.f);
  std::fill(operands.boost.begin(), operands.boost.end(), 0.f);
  std::fill(operands.undesirable.begin(), operands.undesirable.end(), 0);
  operands.gain[2 * 64 + 5] = 0.f;
  operands.undesirable[1 * 64 + 9] = 1;
  operands.gain[1 * 64 + 20] = 0.f;  // rows 0 and 1 of gain mean nothing
  // Every atom but 5 and 9 would have a large code: coding one would show in the support.
  for (float& x : operands.z) x = std::fabs(x);
  for (int64_t i = 0; i < 64; ++i) {
    if (i != 5 && i != 9) std::fill(&operands.atoms[i * 1024], &operands.atoms[i * 1024] + 1024, 10.f);
  }
  for (Isa isa : problem::isas()) {
    for (SaeCoder coder : {SaeCoder::kRelu, SaeCoder::kJumpRelu}) {
      const Result got = problem::run(operands.sae(coder), isa, 2);
      for (size_t i = 0; i < got.out.size() / 4; ++i) CHECK(std::isfinite(at(got.out, i)));
      for (size_t i = 0; i < 8; ++i) CHECK(std::isfinite(at(got.doses, i)));
      int32_t index[8];
      std::memcpy(index, got.index.data(), sizeof(index));
      for (int32_t i : index) CHECK(i == -1 || i == 5 || i == 9);
    }
  }
}

TEST(more_rows_than_a_window_and_strided_rows) {
  Shape shape{9000, 8, 12, 4, 3, 1};
  Operands operands(shape);
  for (int64_t t = 0; t < shape.rows; ++t) operands.slots[t] = t % 97 == 5 ? 2 : t % 1000 == 7 ? -3 : 0;
  const SteerSae op = operands.sae(SaeCoder::kTopK);
  const Result plain = problem::run(op, Isa::kAuto, 1);
  CHECK(problem::run(op, Isa::kAuto, 4) == plain);

  std::vector<float> wide(static_cast<size_t>(shape.rows * 11), 7.f), out(wide.size(), 7.f);
  for (int64_t t = 0; t < shape.rows; ++t) std::copy_n(&operands.z[t * 8], 8, &wide[t * 11 + 1]);
  SteerSae strided = op;
  std::vector<float> doses(2 * 9000), value(9000);
  std::vector<int32_t> index(9000);
  strided.z = wide.data() + 1;
  strided.z_stride = strided.out_stride = 11;
  strided.out = out.data() + 1;
  strided.doses = doses.data();
  strided.support_index = index.data();
  strided.support_value = value.data();
  Plan plan;
  CHECK_OK(cpu::plan(strided, 1, &plan));
  problem::Fenced workspace(plan.workspace_bytes, 0xff);
  CHECK_OK(cpu::steer(strided, plan, workspace.as<>(), Executor::serial()));
  for (int64_t t = 0; t < shape.rows; ++t) {
    CHECK(std::memcmp(&out[t * 11 + 1], plain.out.data() + t * 32, 32) == 0);
    CHECK(out[t * 11] == 7.f && out[t * 11 + 9] == 7.f && out[t * 11 + 10] == 7.f);
  }
}

TEST(no_rows_is_no_work) {
  Operands operands({0, 17, 33, 4, 6, 3});
  for_each_op(operands, [&](auto op) {
    Plan plan;
    CHECK_OK(cpu::plan(op, 4, &plan));
    op.z = op.slots = nullptr;
    CHECK_OK(cpu::steer(op, plan, nullptr, Executor::serial()));
  });
}

TEST(large_rows_stay_finite) {
  Operands operands({6, 64, 129, 4, 6, 3});
  operands.slots = {1, 2, 3, 2, 3, 1};
  for (float& x : operands.z) x *= 3e17f;
  for (Isa isa : problem::isas()) {
    for_each_op(operands, [&](auto op) {
      const Result got = problem::run(op, isa, 1);
      for (size_t i = 0; i < got.out.size() / 4; ++i) CHECK(std::isfinite(at(got.out, i)));
      for (size_t i = 0; i < 12; ++i) CHECK(std::isfinite(at(got.doses, i)));
    });
  }
}

TEST(the_gram_matrix_of_a_dictionary_is_symmetric_to_the_bit) {
  Operands operands({1, 77, 150, 3, 1, 0});
  for (Isa isa : problem::isas()) {
    for (DType t : {DType::kF32, DType::kF16}) {
      problem::Fenced gram(150 * 150 * size_of(t), 0xff), again(150 * 150 * size_of(t), 0x00);
      problem::Threads pool{3};
      CHECK_OK(cpu::build_gram(operands.atoms.data(), operands.atoms.data(), DType::kF32, nullptr, 150, 77,
                               gram.as<>(), t, Executor::serial(), isa));
      CHECK_OK(cpu::build_gram(operands.atoms.data(), operands.atoms.data(), DType::kF32, nullptr, 150, 77,
                               again.as<>(), t, pool.executor(), isa));
      CHECK(std::memcmp(gram.as<>(), again.as<>(), gram.bytes()) == 0);
      const size_t size = size_of(t);
      int wrong = 0;
      for (size_t i = 0; i < 150; ++i) {
        for (size_t j = 0; j < i; ++j) {
          wrong += std::memcmp(gram.as<char>() + (i * 150 + j) * size, gram.as<char>() + (j * 150 + i) * size,
                               size) != 0;
        }
      }
      CHECK(wrong == 0);
    }
  }
}

int main() { return check::run_all(); }
