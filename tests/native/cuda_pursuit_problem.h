// Random pursuits on the kernels' own operands, and the answer by definition in float64.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/omp.cuh"
#include "cuda/pursuit_plan.h"

namespace pursuit_problem {

using namespace daco;
using namespace daco::cuda;

constexpr double kEpsilon = 1e-5;

struct Case {
  int64_t m = 300, d = 96;
  int k = 6;
  int rows = 2;
  bool both_signs = false;
  bool metric = false;  // E is not A, and there is a bias
  bool bias_apart = false;
  float tol = 0;
  DType gram = DType::kF16;
  int64_t cached = 3;
  int duplicate = 0;  // atoms that repeat an earlier one
};

struct Problem {
  explicit Problem(const Case& c, unsigned seed) : shape(c) {
    std::mt19937 draw(seed);
    std::normal_distribution<float> normal;
    auto half = [](float x) { return __float2half_rn(x); };
    std::vector<float> common(static_cast<size_t>(c.d));
    for (float& x : common) x = normal(draw);
    a.resize(static_cast<size_t>(c.m * c.d));
    for (int64_t i = 0; i < c.m; ++i) {
      float norm = 0;
      for (int64_t e = 0; e < c.d; ++e) {
        float x = normal(draw) + 0.5f * common[static_cast<size_t>(e)];
        if (i > 0 && i <= c.duplicate) x = __half2float(a[static_cast<size_t>(e)]);
        a[static_cast<size_t>(i * c.d + e)] = half(x);
        norm += x * x;
      }
      norm = std::sqrt(norm);
      if (i > 0 && i <= c.duplicate) norm = 1;
      for (int64_t e = 0; e < c.d; ++e) {
        __half& x = a[static_cast<size_t>(i * c.d + e)];
        x = half(__half2float(x) / norm);
      }
    }
    e = a;
    bias.assign(static_cast<size_t>(c.m), 0.f);
    if (c.metric) {
      // E = A M for a diagonal M near one; its rounding makes G unsymmetric in the last bits.
      for (int64_t i = 0; i < c.m; ++i) {
        for (int64_t q = 0; q < c.d; ++q) {
          __half& x = e[static_cast<size_t>(i * c.d + q)];
          x = half(__half2float(x) * (1.f + 0.5f * std::sin(static_cast<float>(q))));
        }
        bias[static_cast<size_t>(i)] = 0.05f * normal(draw);
      }
    }
    z.resize(static_cast<size_t>(c.rows * c.d));
    for (int t = 0; t < c.rows; ++t) {
      for (int64_t q = 0; q < c.d; ++q) z[static_cast<size_t>(t * c.d + q)] = 0.1f * normal(draw);
      for (int s = 0; s < c.k; ++s) {
        const auto atom = static_cast<int64_t>(draw() % static_cast<unsigned>(c.m));
        const float weight = (0.5f + std::fabs(normal(draw))) * (c.both_signs && s % 2 == 1 ? -1.f : 1.f);
        for (int64_t q = 0; q < c.d; ++q) {
          z[static_cast<size_t>(t * c.d + q)] +=
              weight * __half2float(a[static_cast<size_t>(atom * c.d + q)]);
        }
      }
    }
    gram.resize(static_cast<size_t>(c.m * c.m));
    gram16.resize(gram.size());
    for (int64_t i = 0; i < c.m; ++i) {
      for (int64_t j = 0; j < c.m; ++j) {
        double sum = 0;
        for (int64_t q = 0; q < c.d; ++q) sum += value(e, i, q) * value(a, j, q);
        gram[static_cast<size_t>(i * c.m + j)] = static_cast<float>(sum);
        gram16[static_cast<size_t>(i * c.m + j)] = half(static_cast<float>(sum));
      }
    }
    start.resize(static_cast<size_t>(c.rows * c.m));
    for (int t = 0; t < c.rows; ++t) {
      for (int64_t j = 0; j < c.m; ++j) {
        double sum = c.bias_apart ? 0.0 : bias[static_cast<size_t>(j)];
        for (int64_t q = 0; q < c.d; ++q) sum += value(e, j, q) * z[static_cast<size_t>(t * c.d + q)];
        start[static_cast<size_t>(t * c.m + j)] = static_cast<float>(sum);
      }
    }
    slots.assign(static_cast<size_t>(c.rows), 2);
    count.assign(static_cast<size_t>(c.rows), -7);
    index.assign(static_cast<size_t>(c.rows * c.m), -7);
    code.assign(index.size(), -7.f);
  }

  double value(const std::vector<__half>& matrix, int64_t i, int64_t q) const {
    return __half2float(matrix[static_cast<size_t>(i * shape.d + q)]);
  }

  OmpArgs args() {
    OmpArgs x{};
    x.dictionary.analysis = shape.metric ? e.data() : a.data();
    x.dictionary.atoms = a.data();
    x.dictionary.weight = DType::kF16;
    x.dictionary.dim = shape.d;
    x.dictionary.size = shape.m;
    x.dictionary.segment = ((shape.d + kSegments - 1) / kSegments + 15) / 16 * 16;
    x.dictionary.vectors = shape.d % 8 == 0;
    x.dictionary.same_matrix = !shape.metric;
    x.z = z.data();
    x.z_stride = shape.d;
    x.activation = DType::kF32;
    x.slots = slots.data();
    x.policies = 3;
    x.k = shape.k;
    x.tol = shape.tol;
    x.both_signs = shape.both_signs;
    x.start = start.data();
    x.stride = shape.m;
    x.bias = shape.bias_apart ? bias.data() : nullptr;
    x.count = count.data();
    x.index = index.data();
    x.value = code.data();
    x.capacity = shape.k;
    return x;
  }

  Case shape;
  std::vector<__half> a, e, gram16;
  std::vector<float> gram, z, start, bias, code;
  std::vector<int32_t> slots, count, index;
};

// c of A x = b by Gaussian elimination.
inline std::vector<double> solve(std::vector<double> matrix, std::vector<double> b) {
  const size_t n = b.size();
  for (size_t i = 0; i < n; ++i) {
    for (size_t r = i + 1; r < n; ++r) {
      const double f = matrix[r * n + i] / matrix[i * n + i];
      for (size_t c = i; c < n; ++c) matrix[r * n + c] -= f * matrix[i * n + c];
      b[r] -= f * b[i];
    }
  }
  for (size_t i = n; i-- > 0;) {
    for (size_t c = i + 1; c < n; ++c) b[i] -= matrix[i * n + c] * b[c];
    b[i] /= matrix[i * n + i];
  }
  return b;
}

struct Plain {
  std::vector<int64_t> support;
  std::vector<double> code;
};

// Pursuit by definition, in float64 on the operands as they are stored.
inline Plain plain_pursuit(const Problem& p, int t) {
  const Case& c = p.shape;
  double norm = 0;
  for (int64_t q = 0; q < c.d; ++q) norm += std::pow(p.z[static_cast<size_t>(t * c.d + q)], 2);
  norm = std::sqrt(norm);
  auto gram = [&](int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t q = 0; q < c.d; ++q) sum += p.value(p.e, i, q) * p.value(p.a, j, q);
    return sum;
  };
  std::vector<double> start(static_cast<size_t>(c.m)), alpha;
  for (int64_t j = 0; j < c.m; ++j) {
    double sum = p.bias[static_cast<size_t>(j)];
    for (int64_t q = 0; q < c.d; ++q) sum += p.value(p.e, j, q) * p.z[static_cast<size_t>(t * c.d + q)];
    start[static_cast<size_t>(j)] = sum;
  }
  alpha = start;
  std::vector<bool> usable(static_cast<size_t>(c.m), true);
  Plain found;
  while (found.support.size() < static_cast<size_t>(c.k)) {
    if (c.tol > 0) {
      double left = 0;
      for (int64_t q = 0; q < c.d; ++q) {
        double r = p.z[static_cast<size_t>(t * c.d + q)];
        for (size_t i = 0; i < found.support.size(); ++i)
          r -= found.code[i] * p.value(p.a, found.support[i], q);
        left += r * r;
      }
      if (std::sqrt(left) <= c.tol * norm) break;
    }
    int64_t best = -1;
    double most = kEpsilon * norm;
    for (int64_t j = 0; j < c.m; ++j) {
      const double x =
          c.both_signs ? std::fabs(alpha[static_cast<size_t>(j)]) : alpha[static_cast<size_t>(j)];
      if (usable[static_cast<size_t>(j)] && x > most) {
        most = x;
        best = j;
      }
    }
    if (best < 0) break;
    usable[static_cast<size_t>(best)] = false;
    const size_t n = found.support.size();
    auto grown = found.support;
    grown.push_back(best);
    std::vector<double> inner((n + 1) * (n + 1)), target(n + 1);
    for (size_t i = 0; i <= n; ++i) {
      for (size_t j = 0; j <= n; ++j) inner[i * (n + 1) + j] = gram(grown[i], grown[j]);
      target[i] = start[static_cast<size_t>(grown[i])];
    }
    if (n > 0) {
      std::vector<double> block(n * n), column(n);
      for (size_t i = 0; i < n; ++i) {
        for (size_t j = 0; j < n; ++j) block[i * n + j] = inner[i * (n + 1) + j];
        column[i] = inner[i * (n + 1) + n];
      }
      const auto w = solve(block, column);
      double pivot = inner[n * (n + 1) + n];
      for (size_t i = 0; i < n; ++i) pivot -= inner[n * (n + 1) + i] * w[i];
      if (pivot < 1e-4 * inner[n * (n + 1) + n]) continue;
    }
    found.support = grown;
    found.code = solve(inner, target);
    for (int64_t j = 0; j < c.m; ++j) {
      double x = start[static_cast<size_t>(j)];
      for (size_t i = 0; i <= n; ++i) x -= found.code[i] * gram(j, grown[i]);
      alpha[static_cast<size_t>(j)] = x;
    }
  }
  Plain kept;
  for (size_t i = 0; i < found.support.size(); ++i) {
    if (!counts(static_cast<float>(found.code[i]), c.both_signs)) continue;
    kept.support.push_back(found.support[i]);
    kept.code.push_back(found.code[i]);
  }
  return kept;
}

inline std::vector<Case> cases() {
  std::vector<Case> all(1);
  Case c;
  c.gram = DType::kF32;
  all.push_back(c);
  c = Case{};
  c.m = 301;  // rows of G that cannot be read 16 bytes at a time
  c.d = 90;
  c.both_signs = true;
  all.push_back(c);
  c = Case{};
  c.metric = true;
  c.bias_apart = true;
  all.push_back(c);
  c.gram = DType::kF32;
  c.bias_apart = false;
  all.push_back(c);
  c = Case{};
  c.tol = 0.5f;
  all.push_back(c);
  c = Case{};
  c.duplicate = 40;
  c.k = 9;
  c.cached = 8;
  all.push_back(c);
  return all;
}

}  // namespace pursuit_problem
