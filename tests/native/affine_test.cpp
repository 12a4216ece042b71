// Affine edits: what is copied, what is never touched, and that nothing depends on threads, dirt or place.
#include <sys/mman.h>

#include "problem.h"

using namespace daco;
using problem::AffineOperands;
using problem::Result;

namespace {

const AffinePhi kPhis[] = {AffinePhi::kIdentity, AffinePhi::kRelu, AffinePhi::kClamp};

float at(const std::vector<unsigned char>& bytes, size_t i) {
  float x;
  std::memcpy(&x, bytes.data() + 4 * i, 4);
  return x;
}

template <class F>
void for_each_op(AffineOperands& operands, F&& f) {
  for (Isa isa : problem::isas()) {
    for (AffinePhi phi : kPhis) f(operands.op(phi), isa);
  }
}

}  // namespace

TEST(nothing_depends_on_threads_dirt_place_or_alignment) {
  for (const int64_t rows : {1, 5, 70}) {
    for (const int64_t dim : {1, 17, 64}) {
      for (const int64_t rank : {1, 3, 8, 40}) {
        AffineOperands operands(rows, dim, rank);
        for_each_op(operands, [&](const SteerAffine& op, Isa isa) {
          const Result first = problem::run(op, isa, 1);
          CHECK(problem::run(op, isa, 1, false, 0x00) == first);
          CHECK(problem::run(op, isa, 3, false, 0x7f) == first);
          CHECK(problem::run(op, isa, 3, true) == first);
          CHECK(problem::run(op, isa, 1, true, 0xff, 4) == first);
        });
      }
    }
  }
}

TEST(equals_the_formula) {
  AffineOperands operands(10, 33, 4);
  for_each_op(operands, [&](const SteerAffine& op, Isa isa) {
    const Result got = problem::run(op, isa, 1);
    for (int64_t t = 0; t < 10; ++t) {
      const int64_t p = operands.slots[t];
      if (p < 2) continue;
      double delta[33], edited[33], norm = 0, length = 0;
      double inner[4];
      for (int64_t i = 0; i < 4; ++i) {
        inner[i] = operands.a_bias[p * 4 + i];
        for (int64_t c = 0; c < 33; ++c)
          inner[i] += operands.a[(p * 4 + i) * 33 + c] * operands.z[t * 33 + c];
        if (op.phi == AffinePhi::kRelu) inner[i] = std::max(inner[i], 0.0);
        if (op.phi == AffinePhi::kClamp) inner[i] = std::min(std::max(inner[i], -0.1), 0.5);
      }
      for (int64_t c = 0; c < 33; ++c) {
        delta[c] = operands.shift[p * 33 + c];
        for (int64_t i = 0; i < 4; ++i) delta[c] += operands.b[(p * 33 + c) * 4 + i] * inner[i];
        norm += operands.z[t * 33 + c] * operands.z[t * 33 + c];
        length += delta[c] * delta[c];
      }
      const double share = p == 3 ? std::min(1.0, 0.2 * std::sqrt(norm / length)) : 1.0;
      double size = 0, moved = 0;
      for (int64_t c = 0; c < 33; ++c) {
        edited[c] = operands.z[t * 33 + c] + share * delta[c];
        size += edited[c] * edited[c];
      }
      for (int64_t c = 0; c < 33; ++c) {
        if (p == 4) edited[c] *= std::sqrt(norm / size);
        const double step = edited[c] - operands.z[t * 33 + c];
        moved += step * step;
        CHECK(std::fabs(at(got.out, t * 33 + c) - edited[c]) < 1e-4);
      }
      CHECK(at(got.doses, 2 * t) == 0);
      CHECK(std::fabs(at(got.doses, 2 * t + 1) - std::sqrt(moved / norm)) < 1e-5);
    }
  });
}

TEST(rows_that_are_off_observed_or_broken_are_copied_bit_for_bit) {
  AffineOperands operands(8, 19, 3);
  operands.slots = {0, 1, 0, 2, 3, 1, -1, 5};
  const uint32_t odd_nan = 0x7fa12345u;
  std::memcpy(&operands.z[2 * 19 + 3], &odd_nan, 4);
  std::memcpy(&operands.z[3 * 19 + 18], &odd_nan, 4);
  operands.z[4 * 19] = INFINITY;
  operands.z[5 * 19] = INFINITY;
  operands.z[1 * 19] = -0.f;
  for_each_op(operands, [&](const SteerAffine& op, Isa isa) {
    const Result got = problem::run(op, isa, 2);
    CHECK(std::memcmp(got.out.data(), operands.z.data(), 6 * 19 * 4) == 0);
    for (size_t i = 6 * 19; i < 8 * 19; ++i) CHECK(std::isnan(at(got.out, i)));
    for (size_t i : {0, 1, 2, 3, 4, 5}) CHECK(at(got.doses, i) == 0);
    for (size_t i = 6; i < 16; ++i) CHECK(std::isnan(at(got.doses, i)));
  });
}

TEST(an_edit_of_nothing_copies_bit_for_bit) {
  AffineOperands operands(5, 21, 2);
  operands.slots = {2, 3, 4, 4, 2};
  std::fill(operands.a.begin(), operands.a.end(), 0.f);
  std::fill(operands.a_bias.begin(), operands.a_bias.end(), 0.f);
  std::fill(operands.shift.begin(), operands.shift.end(), 0.f);
  operands.z[0] = -0.f;
  for_each_op(operands, [&](const SteerAffine& op, Isa isa) {
    const Result got = problem::run(op, isa, 1);
    CHECK(std::memcmp(got.out.data(), operands.z.data(), got.out.size()) == 0);
  });
}

TEST(matrices_are_not_touched_when_no_row_is_edited) {
  AffineOperands operands(4, 17, 3);
  operands.slots = {0, 1, -1, 7};
  void* wall = mmap(nullptr, 1 << 16, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  for_each_op(operands, [&](SteerAffine op, Isa isa) {
    op.a = op.b = wall;
    op.a_bias = op.shift = op.limits = static_cast<float*>(wall);
    problem::run(op, isa, 1);
  });
  munmap(wall, 1 << 16);
}

TEST(edits_beyond_the_range_saturate) {
  AffineOperands operands(3, 16, 1);
  operands.slots = {2, 2, 2};
  std::fill(operands.shift.begin(), operands.shift.end(), 3e38f);
  std::fill(operands.z.begin(), operands.z.end(), 3e38f);
  std::fill(operands.a.begin(), operands.a.end(), 0.f);
  std::fill(operands.limits.begin(), operands.limits.end(), 0.f);
  for_each_op(operands, [&](const SteerAffine& op, Isa isa) {
    const Result got = problem::run(op, isa, 1);
    for (size_t i = 0; i < 48; ++i) CHECK(at(got.out, i) == 3.402823466e38f);
  });
}

int main() { return check::run_all(); }
