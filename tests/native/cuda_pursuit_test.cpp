// The pursuit kernels themselves, compiled for the CPU and run by a scheduler of fibers, against a plain
// float64 pursuit: every cluster size, Gram type and weight type, several orders of execution.
#include <vector>

#include "check.h"
#include "cuda_pursuit_problem.h"

namespace {

using namespace pursuit_problem;

void run_resident(Problem* p, int cluster, unsigned seed) {
  const Case& c = p->shape;
  const OmpArgs args = p->args();
  ResidentArgs r{};
  r.gram = c.gram == DType::kF16 ? static_cast<const void*>(p->gram16.data()) : p->gram.data();
  r.vectors = c.m % kChunk == 0;
  r.chunks = ((c.m + kChunk - 1) / kChunk + cluster - 1) / cluster;
  r.cached = static_cast<int32_t>(c.cached);
  const size_t shared = padded(sizeof(PursuitState)) + inverse_bytes(c.k) +
                        static_cast<size_t>(c.cached * r.chunks) * kChunk * size_of(c.gram);
  const auto blocks = static_cast<unsigned>(cluster);
  simt::launch(c.rows * cluster, cluster, kPursuitThreads, shared, seed, [&] {
    if (c.gram == DType::kF16) {
      pursue_resident<__half, 1>(args, r, blocks);
    } else {
      pursue_resident<float, 1>(args, r, blocks);
    }
  });
}

void compare(const Problem& p, double close) {
  for (int t = 0; t < p.shape.rows; ++t) {
    const Plain expected = plain_pursuit(p, t);
    CHECK(p.count[static_cast<size_t>(t)] == static_cast<int32_t>(expected.support.size()));
    if (p.count[static_cast<size_t>(t)] != static_cast<int32_t>(expected.support.size())) continue;
    for (size_t i = 0; i < expected.support.size(); ++i) {
      const size_t at = static_cast<size_t>(t * p.shape.k) + i;
      CHECK(p.index[at] == expected.support[i]);
      CHECK(std::fabs(p.code[at] - expected.code[i]) <= close * (1 + std::fabs(expected.code[i])));
    }
  }
}

TEST(resident_pursuit_is_the_plain_one) {
  unsigned seed = 1;
  for (const Case& c : cases()) {
    Problem p(c, seed);
    run_resident(&p, 1, ++seed);
    compare(p, 2e-4);
  }
}

TEST(results_do_not_depend_on_the_cluster_or_the_order_of_execution) {
  unsigned seed = 11;
  for (const Case& c : cases()) {
    Problem one(c, seed), other(c, seed);
    run_resident(&one, 1, 1);
    for (const int cluster : {2, 4}) {
      run_resident(&other, cluster, ++seed);
      CHECK(one.count == other.count);
      CHECK(one.index == other.index);
      CHECK(std::memcmp(one.code.data(), other.code.data(), one.code.size() * sizeof(float)) == 0);
    }
  }
  Case c;
  c.rows = 1;
  Problem one(c, seed), other(c, seed);
  run_resident(&one, 1, 1);
  run_resident(&other, 16, 2);
  CHECK(one.index == other.index && one.code == other.code);
}

TEST(rows_without_a_code_say_so) {
  Case c;
  c.rows = 6;
  Problem p(c, 5);
  p.slots = {0, 1, 2, 3, -1, 2};
  for (int64_t q = 0; q < c.d; ++q) p.z[static_cast<size_t>(2 * c.d + q)] = 0;
  p.z[static_cast<size_t>(5 * c.d + 3)] = std::numeric_limits<float>::infinity();
  run_resident(&p, 2, 3);
  CHECK(p.count[0] == -1 && p.count[1] > 0 && p.count[2] == 0 && p.count[3] == -1 && p.count[4] == -1);
  CHECK(p.count[5] == -1);
}

void run_stepped(Problem* p, unsigned seed) {
  const Case& c = p->shape;
  const OmpArgs args = p->args();
  std::vector<float> residual(p->z.size(), NAN), alpha;
  SteppedArgs t{};
  t.residual = residual.data();
  t.state_bytes = static_cast<int64_t>(padded(sizeof(SteppedState)) +
                                       padded(sizeof(double) * static_cast<size_t>(inverse_entries(c.k)) +
                                              sizeof(uint32_t) * static_cast<size_t>(barred_words(c.m))));
  std::vector<double> state(static_cast<size_t>(c.rows * t.state_bytes) / 8, NAN);
  t.state = reinterpret_cast<unsigned char*>(state.data());
  for (int step = 0; step < c.k; ++step) {
    t.first = step == 0;
    t.alpha = step == 0 ? args.start : alpha.data();
    t.bias = step == 0 ? args.bias : nullptr;
    const size_t shared = padded(sizeof(PursuitState)) + inverse_bytes(c.k);
    simt::launch(c.rows, 1, kPursuitThreads, shared, ++seed, [&] { pursue_stepped(args, t); });
    alpha.assign(p->start.size(), 0.f);
    for (int row = 0; row < c.rows; ++row) {
      for (int64_t j = 0; j < c.m; ++j) {
        double sum = p->bias[static_cast<size_t>(j)];
        for (int64_t q = 0; q < c.d; ++q) {
          sum += p->value(p->e, j, q) * residual[static_cast<size_t>(row * c.d + q)];
        }
        alpha[static_cast<size_t>(row * c.m + j)] = static_cast<float>(sum);
      }
    }
  }
}

TEST(stepped_pursuit_is_the_plain_one) {
  unsigned seed = 21;
  for (const Case& c : cases()) {
    Problem p(c, seed);
    run_stepped(&p, ++seed);
    compare(p, 2e-4);
  }
}

}  // namespace

int main() { return check::run_all(); }
