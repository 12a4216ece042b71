// The elastic net's kernels and the Gram matrix's, compiled for the CPU, against sweeps and sums in float64.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/elastic_net.cuh"
#include "cuda/gram.cuh"
#include "cuda_pursuit_problem.h"

namespace {

using namespace pursuit_problem;

constexpr double kStrength = 0.05, kShare = 0.95;

double objective(const Problem& p, int t, const std::vector<double>& code, double norm) {
  // Half c'Gc - c'alpha0 + penalties, on the unit row.
  const Case& c = p.shape;
  double value = 0;
  for (int64_t i = 0; i < c.m; ++i) {
    const double x = code[static_cast<size_t>(i)];
    if (x == 0) continue;
    double start = p.bias[static_cast<size_t>(i)];
    for (int64_t q = 0; q < c.d; ++q) start += p.value(p.e, i, q) * p.z[static_cast<size_t>(t * c.d + q)];
    value += x * (-start / norm) + kStrength * (kShare * std::fabs(x) + 0.5 * (1 - kShare) * x * x);
    for (int64_t j = 0; j < c.m; ++j) {
      value += 0.5 * x * code[static_cast<size_t>(j)] * p.gram[static_cast<size_t>(i * c.m + j)];
    }
  }
  return value;
}

// Sweeps over all coordinates in float64.
std::vector<double> plain_descent(const Problem& p, int t, double norm) {
  const Case& c = p.shape;
  std::vector<double> code(static_cast<size_t>(c.m), 0.0), alpha(code.size());
  for (int64_t j = 0; j < c.m; ++j) {
    double start = p.bias[static_cast<size_t>(j)];
    for (int64_t q = 0; q < c.d; ++q) start += p.value(p.e, j, q) * p.z[static_cast<size_t>(t * c.d + q)];
    alpha[static_cast<size_t>(j)] = start / norm;
  }
  for (int sweep = 0; sweep < 2000; ++sweep) {
    double furthest = 0;
    for (int64_t j = 0; j < c.m; ++j) {
      const double g = p.gram[static_cast<size_t>(j * c.m + j)], old = code[static_cast<size_t>(j)];
      const double pull = alpha[static_cast<size_t>(j)] + g * old;
      double to = (std::fabs(pull) - kStrength * kShare) / (g + kStrength * (1 - kShare));
      if (to < 0 || (pull < 0 && !c.both_signs)) to = 0;
      if (pull < 0) to = -to;
      if (to == old) continue;
      for (int64_t i = 0; i < c.m; ++i) {
        alpha[static_cast<size_t>(i)] -= (to - old) * p.gram[static_cast<size_t>(i * c.m + j)];
      }
      furthest = std::max(furthest, std::fabs(to - old));
      code[static_cast<size_t>(j)] = to;
    }
    if (furthest < 1e-9) break;
  }
  return code;
}

TEST(coordinate_descent_reaches_the_optimum) {
  unsigned seed = 31;
  for (const bool in_shared : {true, false}) {
    for (Case c : cases()) {
      if (c.tol > 0 || c.duplicate > 0) continue;
      c.rows = 1;
      c.d = c.d / 2 * 2;
      Problem p(c, seed);
      double norm = 0;
      for (const float x : p.z) norm += static_cast<double>(x) * x;
      norm = std::sqrt(norm);
      OmpArgs args = p.args();
      args.capacity = c.m;
      const auto m = static_cast<size_t>(c.m);
      std::vector<float> diagonal(m, NAN), length(m, NAN), dense(m, NAN), alpha(m, NAN), code(m, NAN);
      std::vector<float> residual(p.z.size(), NAN);
      ElasticArgs t{};
      t.gram = c.gram == DType::kF16 ? static_cast<const void*>(p.gram16.data()) : p.gram.data();
      t.vectors = c.m % kChunk == 0;
      t.diagonal = diagonal.data();
      t.length = length.data();
      t.l1 = static_cast<float>(kStrength * kShare);
      t.l2 = static_cast<float>(kStrength * (1 - kShare));
      t.dense = dense.data();
      t.alpha = in_shared ? nullptr : alpha.data();
      t.code = in_shared ? nullptr : code.data();
      const size_t fixed = padded(sizeof(PursuitState));
      simt::launch((c.m + kPursuitWarps - 1) / kPursuitWarps, 1, kPursuitThreads, 0, ++seed, [&] {
        if (c.gram == DType::kF16) {
          describe_atoms(args.dictionary, p.gram16.data(), diagonal.data(), length.data());
        } else {
          describe_atoms(args.dictionary, p.gram.data(), diagonal.data(), length.data());
        }
      });
      const int rounds = c.gram == DType::kF16 ? 2 : 1;
      for (int round = 0; round < rounds; ++round) {
        t.first = round == 0;
        t.last = round + 1 == rounds;
        if (!t.first) {
          simt::launch(1, 1, kPursuitThreads, fixed, ++seed,
                       [&] { residual_of_dense(args, dense.data(), residual.data()); });
          for (int64_t j = 0; j < c.m; ++j) {
            double sum = p.bias[static_cast<size_t>(j)];
            for (int64_t q = 0; q < c.d; ++q) sum += p.value(p.e, j, q) * residual[static_cast<size_t>(q)];
            p.start[static_cast<size_t>(j)] = static_cast<float>(sum);
          }
          args.bias = nullptr;
        }
        simt::launch(1, 1, kPursuitThreads, fixed + 2 * m * sizeof(float), ++seed, [&] {
          if (c.gram == DType::kF16) {
            descend<__half>(args, t);
          } else {
            descend<float>(args, t);
          }
        });
      }
      const auto expected = plain_descent(p, 0, norm);
      std::vector<double> found(m, 0.0);
      CHECK(p.count[0] > 0);
      for (int32_t i = 0; i < p.count[0]; ++i) {
        CHECK(i == 0 || p.index[static_cast<size_t>(i)] > p.index[static_cast<size_t>(i - 1)]);
        found[static_cast<size_t>(p.index[static_cast<size_t>(i)])] = p.code[static_cast<size_t>(i)] / norm;
      }
      // Values at the optimum are negative, of the order of the explained energy.
      CHECK(objective(p, 0, found, norm) <= objective(p, 0, expected, norm) + 1e-6);
      // A metric's rounded E and A make rows and columns of G differ in their last bits.
      const double close = c.metric ? 3e-4 : 1e-5;
      for (size_t j = 0; j < m; ++j) CHECK(std::fabs(found[j] - expected[j]) < close);
    }
  }
}

TEST(gram_entries_are_products_of_rows) {
  const int64_t m = 150, d = 37;
  std::mt19937 draw(3);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(m * d)), w(x.size()), out(static_cast<size_t>(m * m), NAN);
  std::vector<__half> small(out.size());
  for (float& v : x) v = normal(draw);
  for (float& v : w) v = normal(draw);
  std::vector<float> scales(static_cast<size_t>(2 * m));
  for (float& v : scales) v = 0.5f + std::fabs(normal(draw));
  const GramArgs g{x.data(), w.data(), scales.data(), DType::kF32, m, d};
  const int64_t tiles = ((m + kTileX - 1) / kTileX) * ((m + kTileW - 1) / kTileW);
  simt::launch(tiles, 1, kGramThreads, kGramShared, 1, [&] { multiply_tile(g, out.data()); });
  simt::launch(tiles, 1, kGramThreads, kGramShared, 2, [&] { multiply_tile(g, small.data()); });
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      double sum = 0;
      for (int64_t q = 0; q < d; ++q)
        sum += static_cast<double>(x[static_cast<size_t>(i * d + q)]) * w[static_cast<size_t>(j * d + q)];
      sum *= static_cast<double>(scales[static_cast<size_t>(i)]) * scales[static_cast<size_t>(m + j)];
      const auto at = static_cast<size_t>(i * m + j);
      CHECK(std::fabs(out[at] - sum) < 1e-4);
      CHECK(std::fabs(__half2float(small[at]) - sum) < 1e-4 + 1e-3 * std::fabs(sum));
    }
  }
}

}  // namespace

int main() { return check::run_all(); }
