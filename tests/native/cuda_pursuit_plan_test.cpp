// Planning of pursuits for devices that are not there, and the arithmetic of the fit that planning relies on.
#include <cmath>
#include <cstdlib>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/layout.h"
#include "cuda/pursuit_plan.h"

namespace {

using namespace daco;
using namespace daco::cuda;

Device device(int compute, int multiprocessors, int64_t shared) {
  Device d;
  d.index = -1;
  d.compute = compute;
  d.multiprocessors = multiprocessors;
  d.shared_bytes = shared;
  d.l2_bytes = int64_t{50} << 20;
  return d;
}

std::vector<Device> devices() {
  return {device(90, 132, 227 * 1024), device(80, 108, 163 * 1024), device(89, 128, 99 * 1024),
          device(100, 148, 227 * 1024), device(120, 170, 99 * 1024)};
}

SteerPursuit pursuit(int64_t rows, int64_t m, int64_t d, int32_t k, DType gram) {
  SteerPursuit op;
  op.rows = rows;
  static_cast<Rows&>(op).atoms = m;
  op.dim = d;
  op.policies = 3;
  op.k = k;
  op.gram_dtype = gram;
  op.activation = op.weight = DType::kBF16;
  return op;
}

TEST(resident_plans_cover_every_atom_within_the_device) {
  for (const Device& where : devices()) {
    for (const int64_t rows : {1, 2, 8, 9, 16, 64, 65, 2048, 100000}) {
      for (const int64_t m : {1, 7, 8, 300, 4096, 15000, 16384, 60001, 300000}) {
        for (const int32_t k : {1, 32, 64}) {
          for (const DType gram : {DType::kF32, DType::kF16}) {
            if (k > m) continue;
            const SteerPursuit op = pursuit(rows, m, 4096, k, gram);
            for (const int asked : {0, 1, 4, 16}) {
              const PursuitLayout l = lay_out(op, where, true, asked);
              CHECK(static_cast<int64_t>(l.shared_bytes) <= where.shared_bytes);
              if (l.path != PursuitPath::kResident) {
                CHECK(m > 4 * kChunk * kPursuitThreads);  // only a dictionary too large for registers
                continue;
              }
              CHECK(l.chunks * l.cluster * kChunk >= m);
              CHECK(l.chunks <= static_cast<int64_t>(l.chunks_a_thread) * kPursuitThreads);
              CHECK(l.cached >= 0 && l.cached < k);
              CHECK(where.compute >= 90 || l.cluster == 1);
              CHECK(l.cluster <= (where.compute == 120 ? 8 : 16) && kSegments % l.cluster == 0);
            }
          }
        }
      }
    }
  }
}

TEST(few_rows_take_large_clusters) {
  const Device h200 = devices()[0];
  const auto cluster = [&](int64_t rows) {
    return lay_out(pursuit(rows, 15000, 4096, 32, DType::kF16), h200, true).cluster;
  };
  CHECK(cluster(1) == 16);
  CHECK(cluster(8) == 16);
  CHECK(cluster(9) == 8);
  CHECK(cluster(33) == 4);
  CHECK(cluster(64) == 2);
  CHECK(cluster(2048) == 2);
  const PursuitLayout one = lay_out(pursuit(1, 15000, 4096, 32, DType::kF16), h200, true);
  CHECK(one.cached == 31 && one.chunks_a_thread == 1);  // no row of G is read twice
}

TEST(pieces_of_the_workspace_do_not_overlap) {
  for (const Device& where : devices()) {
    for (const bool has_gram : {true, false}) {
      for (const PursuitCoder coder : {PursuitCoder::kOmp, PursuitCoder::kElasticNet}) {
        for (const int32_t k_out : {0, 5}) {
          SteerPursuit op = pursuit(37, 1003, 130, 12, DType::kF16);
          op.coder = coder;
          op.k_out = k_out;
          const PursuitLayout l = lay_out(op, where, has_gram);
          alignas(kAlignment) static char base[1];
          const PursuitBuffers b = carve(op, l, base);
          std::vector<std::pair<char*, size_t>> pieces;
          const auto add = [&](void* p, size_t bytes) {
            if (p != nullptr) pieces.emplace_back(static_cast<char*>(p), bytes);
          };
          const size_t matrix = 37 * 1004 * sizeof(float);
          add(b.start, matrix);
          add(b.alpha, matrix);
          add(b.code, 37 * 1003 * sizeof(float));
          add(b.dense, 37 * 1003 * sizeof(float));
          add(b.residual, 37 * 130 * sizeof(float));
          add(b.diagonal, 1003 * sizeof(float));
          add(b.length, 1003 * sizeof(float));
          add(b.state, static_cast<size_t>(37 * l.state_bytes));
          add(b.codes, codes_bytes(37, b.capacity, k_out));
          char* end = base;
          for (const auto& [at, bytes] : pieces) {
            CHECK(at >= end);
            CHECK((at - base) % static_cast<int64_t>(kAlignment) == 0);
            end = at + bytes;
          }
          CHECK(static_cast<size_t>(end - base) <= b.bytes);
          CHECK(b.start != nullptr && b.codes != nullptr && b.scratch != nullptr);
          CHECK((l.path == PursuitPath::kStepped) == (b.state != nullptr));
        }
      }
    }
  }
}

TEST(the_workspace_is_bounded_by_the_pass) {
  const Device h200 = devices()[0];
  for (const bool has_gram : {true, false}) {
    const SteerPursuit few = pursuit(2048, 15000, 4096, 32, DType::kF16);
    const SteerPursuit many = pursuit(1 << 20, 15000, 4096, 32, DType::kF16);
    CHECK(carve(many, lay_out(many, h200, has_gram), nullptr).bytes ==
          carve(few, lay_out(few, h200, has_gram), nullptr).bytes);
  }
}

TEST(what_is_not_served_is_refused) {
  SteerPursuit op = pursuit(1, 100, 64, 8, DType::kF16);
  op.sign = PursuitSign::kNonNegative;
  CHECK_STATUS(check_supported(op), Code::kUnsupported, "nnls");
  op.coder = PursuitCoder::kElasticNet;  // means what positive means there
  CHECK(check_supported(op).ok());
}

TEST(a_forced_cluster_is_a_power_of_two_up_to_sixteen) {
  setenv("DACO_RT_CUDA_CLUSTER", "4", 1);
  CHECK(asked_cluster() == 4);
  for (const char* text : {"3", "32", "-1", "", "four"}) {
    setenv("DACO_RT_CUDA_CLUSTER", text, 1);
    CHECK(asked_cluster() == 0);
  }
  unsetenv("DACO_RT_CUDA_CLUSTER");
  CHECK(asked_cluster() == 0);
}

// The bordered inverse against Gaussian elimination, on a Gram matrix of nearly parallel atoms that is not
// quite symmetric.
TEST(the_bordered_inverse_solves_the_system) {
  std::mt19937 draw(7);
  std::normal_distribution<double> normal;
  for (const int k : {1, 5, 33, 64}) {
    const int d = 96, stride = inverse_stride(k);
    std::vector<double> atoms(static_cast<size_t>(k * d)), gram(static_cast<size_t>(k * k));
    std::vector<double> common(d), target(static_cast<size_t>(k));
    for (double& x : common) x = normal(draw);
    for (int i = 0; i < k; ++i) {
      for (int e = 0; e < d; ++e)
        atoms[static_cast<size_t>(i * d + e)] = 2 * common[static_cast<size_t>(e)] + normal(draw);
      target[static_cast<size_t>(i)] = normal(draw);
    }
    for (int i = 0; i < k; ++i) {
      for (int j = 0; j < k; ++j) {
        double sum = 0;
        for (int e = 0; e < d; ++e)
          sum += atoms[static_cast<size_t>(i * d + e)] * atoms[static_cast<size_t>(j * d + e)];
        gram[static_cast<size_t>(i * k + j)] = sum * (1 + 1e-7 * normal(draw));
      }
    }
    std::vector<double> inverse(static_cast<size_t>(inverse_entries(k)), NAN);
    std::vector<double> u(static_cast<size_t>(k)), v(u.size()), column(u.size()), row(u.size()),
        code(u.size());
    for (int n = 0; n < k; ++n) {
      double pivot = gram[static_cast<size_t>(n * k + n)], moved = 0;
      for (int i = 0; i < n; ++i) {
        column[static_cast<size_t>(i)] = gram[static_cast<size_t>(i * k + n)];
        row[static_cast<size_t>(i)] = gram[static_cast<size_t>(n * k + i)];
      }
      for (int i = 0; i < n; ++i) {
        u[static_cast<size_t>(i)] = inverse_times(inverse.data(), stride, n, i, column.data());
        v[static_cast<size_t>(i)] = times_inverse(inverse.data(), stride, n, i, row.data());
        pivot -= row[static_cast<size_t>(i)] * u[static_cast<size_t>(i)];
        moved += row[static_cast<size_t>(i)] * code[static_cast<size_t>(i)];
      }
      CHECK(judge(pivot, gram[static_cast<size_t>(n * k + n)], n, false, 0, 1) == Verdict::kTaken);
      code[static_cast<size_t>(n)] = (target[static_cast<size_t>(n)] - moved) / pivot;
      for (int i = 0; i < n; ++i)
        code[static_cast<size_t>(i)] -= u[static_cast<size_t>(i)] * code[static_cast<size_t>(n)];
      for (int e = (n + 1) * (n + 1); e-- > 0;) {
        border_inverse(inverse.data(), stride, n, e / (n + 1), e % (n + 1), u.data(), v.data(), 1 / pivot);
      }
    }
    double largest = 0;
    for (int i = 0; i < k; ++i) {
      double left = target[static_cast<size_t>(i)];
      for (int j = 0; j < k; ++j) left -= gram[static_cast<size_t>(i * k + j)] * code[static_cast<size_t>(j)];
      largest = std::max(largest, std::fabs(left));
    }
    CHECK(largest < 1e-8);
  }
}

TEST(ties_go_to_the_lower_atom_and_nan_never_wins) {
  CHECK(beats({key_of(2.f, false), 3}, {key_of(2.f, false), 4}));
  CHECK(!beats({key_of(2.f, false), 4}, {key_of(2.f, false), 3}));
  CHECK(beats({key_of(2.f, false), 9}, {key_of(1.f, false), 3}));
  CHECK(key_of(NAN, false) == 0 && key_of(NAN, true) == 0 && key_of(-1.f, false) == 0 &&
        key_of(0.f, true) == 0);
  CHECK(value_of(key_of(-3.f, true)) == 3.f);
  CHECK(judge(0.00009, 1, 1, true, 1, 1) == Verdict::kSkipped);
  CHECK(judge(0.00011, 1, 1, true, 1, 1) == Verdict::kTaken);
  CHECK(judge(0.00009, 1, 0, true, 1, 1) == Verdict::kTaken);
  CHECK(judge(NAN, 1, 1, true, 1, 1) == Verdict::kSkipped);
  CHECK(judge(1, 0, 0, true, 1, 1) == Verdict::kSkipped);
  CHECK(judge(1, 1, 1, true, 0.9e-5, 1) == Verdict::kOver);
  CHECK(judge(1, 1, 1, false, 0.9e-5, 1) == Verdict::kTaken);
}

}  // namespace

int main() { return check::run_all(); }
