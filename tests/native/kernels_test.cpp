// The primitives of every instruction set against plain loops in fp64, and number formats exhaustively.
#include "cpu/kernels.h"

#include <limits>

#include "cpu/least_squares.h"
#include "cpu/select.h"
#include "problem.h"

using namespace daco;
using namespace daco::cpu;

namespace {

// Meaning of a 16-bit float with `exponent_bits`, by definition.
double meaning(uint16_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
}

struct Format {
  DType dtype;
  int exponent_bits;
  double largest;
};
constexpr Format kFormats[] = {{DType::kF16, 5, 65504.0}, {DType::kBF16, 8, 3.3895313892515355e38}};

// Nearest representable value, ties to even, saturating.
uint16_t rounded(float x, const Format& format) {
  if (x != x) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double target = std::fabs(static_cast<double>(x));
  uint16_t low = 0;
  uint16_t high = static_cast<uint16_t>(((1 << format.exponent_bits) - 1) << (15 - format.exponent_bits));
  high = static_cast<uint16_t>(high - 1);  // the largest finite value
  if (target >= format.largest) return sign | high;
  while (high - low > 1) {
    const auto middle = static_cast<uint16_t>((low + high) / 2);
    (meaning(middle, format.exponent_bits) <= target ? low : high) = middle;
  }
  const double below = target - meaning(low, format.exponent_bits);
  const double above = meaning(high, format.exponent_bits) - target;
  const bool up = above < below || (above == below && (low & 1) != 0);
  return sign | (up ? high : low);
}

std::vector<float> random_floats(size_t n, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(engine);
  return x;
}

}  // namespace

TEST(widening_is_exact_for_all_bit_patterns) {
  for (Isa isa : problem::isas()) {
    for (const Format& format : kFormats) {
      std::vector<uint16_t> bits(65536 + 3);
      for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
      std::vector<float> got(bits.size());
      kernels(isa).of(format.dtype).widen(bits.data(), got.data(), static_cast<int64_t>(bits.size()));
      int wrong = 0;
      for (size_t i = 0; i < bits.size(); ++i) {
        const double expected = meaning(bits[i], format.exponent_bits);
        const bool same = std::isnan(expected)
                              ? std::isnan(got[i])
                              : got[i] == expected && std::signbit(got[i]) == std::signbit(expected);
        wrong += !same;
      }
      CHECK(wrong == 0);
    }
  }
}

TEST(narrowing_rounds_to_even_and_saturates) {
  std::vector<float> x = random_floats(2000, 3);
  for (int exponent = -150; exponent < 128; ++exponent) {
    for (int step = 0; step < 64; ++step)
      x.push_back(std::ldexp(1.f + static_cast<float>(step) / 64.f, exponent));
  }
  // Halfway cases around every fp16 value of a few binades, subnormal ones included.
  for (int bits = 1; bits < 0x7bff; bits += 7) {
    x.push_back(static_cast<float>(
        (meaning(static_cast<uint16_t>(bits), 5) + meaning(static_cast<uint16_t>(bits + 1), 5)) / 2));
  }
  for (float special : {0.f, 65504.f, 65519.f, 65520.f, 1e6f, 3.3895e38f, 3.4e38f, INFINITY})
    x.push_back(special);
  const size_t n = x.size();
  for (size_t i = 0; i < n; ++i) x.push_back(-x[i]);
  x.push_back(NAN);
  for (Isa isa : problem::isas()) {
    for (const Format& format : kFormats) {
      std::vector<uint16_t> got(x.size());
      kernels(isa).of(format.dtype).narrow(x.data(), got.data(), static_cast<int64_t>(x.size()));
      int wrong = 0;
      for (size_t i = 0; i + 1 < x.size(); ++i) wrong += got[i] != rounded(x[i], format);
      CHECK(wrong == 0);
      CHECK(std::isnan(meaning(got.back(), format.exponent_bits)));
    }
    std::vector<float> same(x.size());
    kernels(isa).of(DType::kF32).narrow(x.data(), same.data(), static_cast<int64_t>(x.size()));
    for (size_t i = 0; i + 1 < x.size(); ++i) {
      CHECK(same[i] == x[i] || (std::isinf(x[i]) && std::fabs(same[i]) == std::numeric_limits<float>::max()));
    }
    CHECK(std::isnan(same.back()));
  }
}

TEST(finds_what_is_not_finite_wherever_it_is) {
  for (Isa isa : problem::isas()) {
    for (int64_t n : {1, 3, 16, 33, 100}) {
      for (DType t : {DType::kF32, DType::kF16, DType::kBF16}) {
        const size_t size = size_of(t);
        const uint32_t infinity = t == DType::kF32 ? 0x7f800000u : t == DType::kF16 ? 0x7c00u : 0x7f80u;
        for (uint32_t pattern : {infinity, infinity + 1, infinity | 0x80000000u >> (size == 4 ? 0 : 16)}) {
          for (int64_t at = 0; at < n; ++at) {
            std::vector<unsigned char> x(static_cast<size_t>(n) * size, 0x11);
            CHECK(kernels(isa).of(t).all_finite(x.data(), n));
            std::memcpy(x.data() + static_cast<size_t>(at) * size, &pattern, size);
            CHECK(!kernels(isa).of(t).all_finite(x.data(), n));
          }
        }
      }
    }
  }
}

TEST(a_dot_product_has_the_same_bits_alone_and_in_any_block) {
  const int64_t m = 37, d = 61, rows = 9;
  const std::vector<float> w = random_floats(m * d, 5), x = random_floats(rows * d, 6),
                           bias = random_floats(m, 7);
  for (Isa isa : problem::isas()) {
    for (DType t : {DType::kF32, DType::kF16, DType::kBF16}) {
      const TypedKernels& k = kernels(isa).of(t);
      std::vector<unsigned char> stored(static_cast<size_t>(m * d) * size_of(t));
      k.narrow(w.data(), stored.data(), m * d);
      std::vector<float> wide(w.size());
      k.widen(stored.data(), wide.data(), m * d);
      std::vector<float> together(rows * m);
      std::vector<const float*> xs;
      std::vector<float*> ys;
      for (int64_t r = 0; r < rows; ++r) {
        xs.push_back(&x[r * d]);
        ys.push_back(&together[r * m]);
      }
      k.dots(stored.data(), nullptr, 0, m, d, bias.data(), xs.data(), rows, ys.data());
      for (int64_t r = 0; r < rows; ++r) {
        for (int32_t i = 0; i < m; ++i) {
          float alone = 0;
          float* const y[] = {&alone};
          const float* const row[] = {&x[r * d]};
          k.dots(stored.data(), &i, 0, 1, d, bias.data(), row, 1, y);
          CHECK(alone == together[r * m + i]);
          double exact = bias[i], size = std::fabs(bias[i]);
          for (int64_t c = 0; c < d; ++c) {
            exact += static_cast<double>(wide[i * d + c]) * x[r * d + c];
            size += std::fabs(static_cast<double>(wide[i * d + c]) * x[r * d + c]);
          }
          CHECK(std::fabs(alone - exact) <= 4e-7 * size);
        }
      }
    }
  }
}

TEST(the_peak_is_the_lowest_index_and_never_a_nan) {
  for (Isa isa : problem::isas()) {
    const Kernels& k = kernels(isa);
    for (int64_t n : {1, 2, 7, 16, 31, 129}) {
      std::vector<float> x(static_cast<size_t>(n), NAN);
      CHECK(k.peak(x.data(), n, false).index == -1);
      CHECK(k.peak(x.data(), n, true).index == -1);
      for (int64_t at = 0; at < n; ++at) {
        std::fill(x.begin(), x.end(), 1.f);
        x[at] = -3.f;
        CHECK(k.peak(x.data(), n, true).index == at);
        CHECK(k.peak(x.data(), n, false).index == (n == 1 ? 0 : at == 0 ? 1 : 0));
        std::fill(x.begin(), x.begin() + at, NAN);
        x[at] = 1.f;
        CHECK(k.peak(x.data(), n, false).index == at);
      }
    }
  }
}

TEST(keeps_the_k_largest_with_ties_to_the_lower_index) {
  for (Isa isa : problem::isas()) {
    for (int64_t m : {1, 7, 255, 256, 257, 1000, 5000}) {
      for (int kind = 0; kind < 5; ++kind) {
        std::vector<float> a = random_floats(static_cast<size_t>(m), static_cast<unsigned>(m));
        for (int64_t i = 0; i < m; ++i) {
          if (kind == 1) a[i] = static_cast<float>(i);                // rising: the threshold never helps
          if (kind == 2) a[i] = std::round(a[i] * 2);                 // many ties
          if (kind == 3) a[i] = 1.f;                                  // nothing but ties
          if (kind == 4) a[i] = i % 3 == 0 ? NAN : -std::fabs(a[i]);  // nothing to keep
        }
        for (int64_t k : {int64_t{1}, std::min<int64_t>(m, 32), std::max<int64_t>(1, m - 1), m}) {
          std::vector<int32_t> order;
          for (int32_t i = 0; i < m; ++i) {
            if (a[i] > 0) order.push_back(i);
          }
          std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return a[i] > a[j]; });
          order.resize(std::min<size_t>(order.size(), static_cast<size_t>(k)));
          std::sort(order.begin(), order.end());
          const auto room = static_cast<size_t>(selection_capacity(m, k));
          std::vector<int32_t> index(room);
          std::vector<float> value(room), scratch(room);
          SparseCode code{index.data(), value.data(), 0};
          keep_largest(kernels(isa), a.data(), m, k, &code, scratch.data());
          CHECK(code.count == static_cast<int64_t>(order.size()));
          for (size_t i = 0; i < order.size(); ++i) CHECK(index[i] == order[i] && value[i] == a[order[i]]);
        }
      }
    }
  }
}

TEST(non_negative_least_squares_meets_its_optimality_conditions) {
  for (unsigned seed = 0; seed < 40; ++seed) {
    const int32_t n = 2 + static_cast<int32_t>(seed % 30), d = 40;
    const std::vector<float> a = random_floats(static_cast<size_t>(n * d), seed),
                             t = random_floats(n, seed + 100);
    std::vector<float> gram(static_cast<size_t>(n * n));
    for (int32_t i = 0; i < n; ++i) {
      for (int32_t j = 0; j < n; ++j) {
        double sum = 0;
        for (int32_t c = 0; c < d; ++c)
          sum += a[i * d + c] * a[j * d + c] + 4.0;  // a strong common direction
        gram[i * n + j] = static_cast<float>(sum / d);
      }
    }
    std::vector<double> memory(static_cast<size_t>(LeastSquares::doubles(n, true)), -1e30);
    LeastSquares fit;
    fit.reset(memory.data(), n);
    std::vector<int32_t> members;
    for (int32_t j = 0; j < n; ++j) {
      std::vector<float> cross;
      for (int32_t i : members) cross.push_back(gram[j * n + i]);
      if (!fit.append(cross.data(), cross.data(), gram[j * n + j], t[j], true)) continue;
      members.push_back(j);
      fit.solve_non_negative();
    }
    for (size_t i = 0; i < members.size(); ++i) {
      double gradient = t[members[i]];
      for (size_t j = 0; j < members.size(); ++j)
        gradient -= gram[members[i] * n + members[j]] * fit.code()[j];
      CHECK(fit.code()[i] >= 0);
      CHECK(fit.code()[i] > 0 ? std::fabs(gradient) < 1e-9 : gradient < 1e-9);
    }
  }
}

int main() { return check::run_all(); }
