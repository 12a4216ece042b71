// The elastic net over a working set against its optimality conditions, and working sets beyond the table.
#include <numeric>

#include "cpu/small_net.h"
#include "problem.h"

using namespace daco;
using namespace daco::cpu;

namespace {

struct Problem {
  int64_t n;
  std::vector<float> column = std::vector<float>(kSmallNet * kSmallNet, NAN);
  std::vector<float> length;
  std::vector<double> start, left, code, factor = std::vector<double>(kSmallSolve * kSmallSolve, NAN);

  // Unit atoms of width d around a common direction; t has parts of them.
  Problem(int64_t n, int64_t d, unsigned seed, bool both_signs) : n(n) {
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal;
    std::vector<double> atoms(static_cast<size_t>(n * d)), row(static_cast<size_t>(d));
    for (int64_t i = 0; i < n; ++i) {
      double size = 0;
      for (int64_t c = 0; c < d; ++c) {
        atoms[i * d + c] = normal(engine) + (c < d / 4 ? 1.0 : 0.0);
        size += atoms[i * d + c] * atoms[i * d + c];
      }
      const double part = i % 3 == 0 ? (both_signs && i % 2 == 0 ? -0.3 : 0.4) : 0.0;
      for (int64_t c = 0; c < d; ++c) {
        atoms[i * d + c] /= std::sqrt(size);
        row[c] += part * atoms[i * d + c];
      }
    }
    if (n > 5) std::copy_n(&atoms[0], d, &atoms[4 * d]);  // a duplicate
    for (int64_t i = 0; i < n; ++i) {
      start.push_back(std::inner_product(row.begin(), row.end(), &atoms[i * d], 0.0));
      length.push_back(1.f);
      for (int64_t j = 0; j < n; ++j) {
        column[j * kSmallNet + i] =
            static_cast<float>(std::inner_product(&atoms[i * d], &atoms[i * d] + d, &atoms[j * d], 0.0));
      }
    }
    left = start;
    code.assign(static_cast<size_t>(n), 0.0);
  }

  SmallNet net(double l1, double l2, bool both_signs) {
    SmallNet small;
    small.n = n;
    small.column = column.data();
    small.length = length.data();
    small.left = left.data();
    small.code = code.data();
    small.factor = factor.data();
    small.l1 = l1;
    small.l2 = l2;
    small.both_signs = both_signs;
    small.tolerance = 1e-6;
    return small;
  }
};

}  // namespace

TEST(meets_its_optimality_conditions) {
  for (unsigned seed = 0; seed < 30; ++seed) {
    for (bool both_signs : {false, true}) {
      for (const double l1 : {0.3, 0.05, 0.002}) {
        const int64_t n = 1 + static_cast<int64_t>(seed * 11 % 300);
        Problem problem(n, 60, seed, both_signs);
        problem.net(l1, 0.0025, both_signs).solve();
        for (int64_t i = 0; i < n; ++i) {
          double left = problem.start[i];
          for (int64_t j = 0; j < n; ++j) {
            left -= static_cast<double>(problem.column[j * kSmallNet + i]) * problem.code[j];
          }
          CHECK(std::fabs(left - problem.left[i]) < 1e-9);
          const double c = problem.code[i];
          const double pull = left - 0.0025 * c;
          CHECK(both_signs || c >= 0);
          CHECK(c != 0 ? std::fabs(pull - std::copysign(l1, c)) < 2e-6
                       : (both_signs ? std::fabs(pull) : pull) < l1 + 2e-6);
        }
      }
    }
  }
}

TEST(a_dependent_set_without_a_ridge_is_still_optimal) {
  Problem problem(9, 6, 3, true);
  problem.net(0.01, 0.0, true).solve();
  for (int64_t i = 0; i < 9; ++i) {
    const double c = problem.code[i];
    CHECK(c != 0 ? std::fabs(problem.left[i] - std::copysign(0.01, c)) < 1e-5
                 : std::fabs(problem.left[i]) < 0.01 + 1e-5);
  }
}

TEST(codes_beyond_the_table_are_found_by_descent) {
  // Hardly any L1 term: nearly all of 700 atoms are on, more than the table holds.
  problem::Operands operands({3, 800, 700, 3, 4, 700});
  operands.slots = {2, 1, 2};
  for (float& x : operands.bias) x = 0;
  for (Isa isa : problem::isas()) {
    for (bool with_gram : {true, false}) {
      SteerPursuit op = operands.pursuit(PursuitSign::kSigned, with_gram);
      op.coder = PursuitCoder::kElasticNet;
      op.tau = 1e-4f;
      op.alpha = 0.5f;
      const problem::Result got = problem::run(op, isa, 1);
      CHECK(problem::run(op, isa, 2, true) == got);
      std::vector<int32_t> index(3 * 700);
      std::vector<float> value(3 * 700);
      std::memcpy(index.data(), got.index.data(), got.index.size());
      std::memcpy(value.data(), got.value.data(), got.value.size());
      for (int64_t t = 0; t < 3; ++t) {
        const float* z = &operands.z[t * 800];
        const double norm = std::sqrt(std::inner_product(z, z + 800, z, 0.0));
        std::vector<double> left(z, z + 800), code(700);
        int64_t on = 0;
        for (int64_t i = 0; i < 700 && index[t * 700 + i] >= 0; ++i, ++on) {
          const int64_t j = index[t * 700 + i];
          code[j] = value[t * 700 + i];
          for (int64_t c = 0; c < 800; ++c) left[c] -= code[j] * operands.atoms[j * 800 + c];
        }
        CHECK(on > kSmallNet);
        const double l1 = 0.5 * 1e-4 * norm, l2 = 0.5 * (1 - 1e-4);
        for (int64_t j = 0; j < 700; ++j) {
          const double pull =
              std::inner_product(left.begin(), left.end(), &operands.atoms[j * 800], 0.0) - l2 * code[j];
          const double wrong =
              code[j] != 0 ? std::fabs(pull - std::copysign(l1, code[j])) : std::fabs(pull) - l1;
          CHECK(wrong < 2e-5 * norm);
        }
      }
    }
  }
}

int main() { return check::run_all(); }
