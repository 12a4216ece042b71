// Random problems with every buffer fenced: outputs start poisoned and are followed by sentinels, and the
// workspace is dirty, exactly as large as planned, and fenced too.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "core/steer.h"

namespace problem {

constexpr unsigned char kFence = 0xa5;
constexpr size_t kFenceBytes = 128;

// Bytes at any alignment, with a fence on both sides.
class Fenced {
 public:
  Fenced(size_t bytes, unsigned char fill, size_t misalign = 0)
      : memory_(bytes + misalign + 2 * kFenceBytes + 64, kFence), bytes_(bytes) {
    const auto at = reinterpret_cast<uintptr_t>(memory_.data()) + kFenceBytes;
    data_ = memory_.data() + kFenceBytes + (64 - at % 64) % 64 + misalign;
    std::memset(data_, fill, bytes);
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  ~Fenced() {
    for (unsigned char* p = memory_.data(); p < memory_.data() + memory_.size(); ++p) {
      if ((p < data_ || p >= data_ + bytes_) && *p != kFence) {
        check::fail(__FILE__, __LINE__, "a fence was written to");
        return;
      }
    }
  }

  template <class T = void>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  std::vector<unsigned char> memory_;
  size_t bytes_;
  unsigned char* data_;
};

// Runs tasks on threads of its own, taken in falling order: nothing may rely on rising order.
struct Threads {
  int count;

  static void run(void* context, int64_t tasks, void (*body)(void*, int64_t), void* arg) {
    const int count = static_cast<Threads*>(context)->count;
    std::atomic<int64_t> left{tasks};
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i) {
      threads.emplace_back([&] {
        for (int64_t t; (t = left.fetch_sub(1) - 1) >= 0;) body(arg, t);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  daco::Executor executor() { return {this, count, run}; }
};

struct Shape {
  int64_t rows = 5, dim = 17, atoms = 33, policies = 4;
  int32_t k = 6, k_out = 3;
};

// Operands of both operators in fp32, unit atoms (some of them zero or twice there), and mixed slots.
struct Operands {
  Shape shape;
  std::vector<float> z, atoms, bias, threshold, gain, boost, shift, limits, gram;
  std::vector<uint8_t> undesirable;
  std::vector<int32_t> slots;
  std::vector<int8_t> quantised;  // atoms = scales * quantised, both filled by quantise()
  std::vector<float> scales;      // [2, m]

  explicit Operands(Shape s, unsigned seed = 1) : shape(s) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>* v, int64_t n, float scale) {
      v->resize(static_cast<size_t>(n));
      for (float& x : *v) x = normal(engine) * scale;
    };
    fill(&z, s.rows * s.dim, 3.f);
    fill(&atoms, s.atoms * s.dim, 1.f);
    fill(&bias, s.atoms, 0.05f);
    fill(&threshold, s.atoms, 0.1f);
    fill(&shift, s.policies * s.dim, 0.1f);
    gain.assign(static_cast<size_t>(s.policies * s.atoms), 1.f);
    boost.assign(gain.size(), 0.f);
    undesirable.assign(gain.size(), 0);
    for (size_t i = 0; i < gain.size(); ++i) {
      if (engine() % 3 == 0) gain[i] = 0.f;
      if (engine() % 7 == 0) boost[i] = 0.3f;
      undesirable[i] = engine() % 4 == 0;
    }
    limits.assign(static_cast<size_t>(s.policies * daco::kLimits), 0.f);
    for (int64_t p = 2; p < s.policies; ++p) {
      limits[p * daco::kLimits + daco::kDeadband] = p % 2 == 0 ? 0.f : 0.05f;
      limits[p * daco::kLimits + daco::kMaxDose] = p % 3 == 0 ? 0.2f : 0.f;
      limits[p * daco::kLimits + daco::kKeepNorm] = p % 2 == 0 ? 1.f : 0.f;
    }
    for (int64_t t = 0; t < s.rows; ++t) slots.push_back(static_cast<int32_t>(engine() % s.policies));
    normalise();
  }

  void normalise() {
    const int64_t m = shape.atoms, d = shape.dim;
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (int64_t c = 0; c < d; ++c) sum += atoms[i * d + c] * atoms[i * d + c];
      for (int64_t c = 0; c < d; ++c) atoms[i * d + c] /= static_cast<float>(std::sqrt(sum));
    }
    if (m > 4) std::copy(atoms.begin(), atoms.begin() + d, atoms.begin() + 4 * d);
    if (m > 6) std::fill(atoms.begin() + 6 * d, atoms.begin() + 7 * d, 0.f);
  }

  void bind(daco::Rows* op) {
    op->rows = shape.rows;
    op->dim = op->z_stride = op->out_stride = shape.dim;
    op->atoms = shape.atoms;
    op->policies = shape.policies;
    op->k_out = shape.k_out;
    op->z = z.data();
    op->slots = slots.data();
    op->gain = gain.data();
    op->boost = boost.data();
    op->undesirable = undesirable.data();
    op->shift = shift.data();
    op->limits = limits.data();
  }
  daco::SteerSae sae(daco::SaeCoder coder) {
    daco::SteerSae op;
    bind(&op);
    op.coder = coder;
    op.k = shape.k;
    op.enc = op.dec = atoms.data();
    op.enc_bias = bias.data();
    op.threshold = threshold.data();
    return op;
  }
  daco::SteerPursuit pursuit(daco::PursuitSign sign, bool with_gram) {
    daco::SteerPursuit op;
    bind(&op);
    op.sign = sign;
    op.k = shape.k;
    op.analysis = op.atoms = atoms.data();
    op.bias = bias.data();
    if (with_gram) {
      gram.resize(static_cast<size_t>(shape.atoms * shape.atoms));
      CHECK_OK(daco::cpu::build_gram(op.analysis, op.atoms, daco::DType::kF32, nullptr, shape.atoms,
                                     shape.dim, gram.data(), daco::DType::kF32, daco::Executor::serial()));
      op.gram = gram.data();
    }
    return op;
  }

  // The same with int8 weights.
  daco::SteerSae quantise(daco::SteerSae op) {
    quantise();
    op.enc = op.dec = quantised.data();
    op.weight = daco::DType::kI8;
    op.scales = scales.data();
    return op;
  }
  daco::SteerPursuit quantise(daco::SteerPursuit op) {
    quantise();
    op.analysis = op.atoms = quantised.data();
    op.weight = daco::DType::kI8;
    op.scales = scales.data();
    return op;
  }
  void quantise() {
    const int64_t m = shape.atoms, d = shape.dim;
    quantised.resize(atoms.size());
    scales.resize(static_cast<size_t>(2 * m));
    for (int64_t i = 0; i < m; ++i) {
      float largest = 0;
      for (int64_t c = 0; c < d; ++c) largest = std::max(largest, std::fabs(atoms[i * d + c]));
      const float scale = largest > 0 ? largest / 127 : 1.f;
      scales[i] = scales[m + i] = scale;
      for (int64_t c = 0; c < d; ++c) {
        quantised[i * d + c] = static_cast<int8_t>(std::nearbyint(atoms[i * d + c] / scale));
      }
    }
  }
};

// Operands of affine edits of rank r with three policies beside off and observe.
struct AffineOperands {
  int64_t rows, dim, rank;
  std::vector<float> z, a, a_bias, b, shift, limits;
  std::vector<int32_t> slots;

  AffineOperands(int64_t rows, int64_t dim, int64_t rank, unsigned seed = 1)
      : rows(rows), dim(dim), rank(rank) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>* v, int64_t n, float scale) {
      v->resize(static_cast<size_t>(n));
      for (float& x : *v) x = normal(engine) * scale;
    };
    fill(&z, rows * dim, 2.f);
    fill(&a, 5 * rank * dim, 0.3f);
    fill(&a_bias, 5 * rank, 0.2f);
    fill(&b, 5 * dim * rank, 0.3f);
    fill(&shift, 5 * dim, 0.1f);
    limits = {0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0.2f, 0, 0, 0, 0, 1, 0};  // the deadband means nothing
    for (int64_t t = 0; t < rows; ++t) slots.push_back(static_cast<int32_t>(t % 5));
  }

  daco::SteerAffine op(daco::AffinePhi phi) {
    daco::SteerAffine op;
    op.rows = rows;
    op.dim = op.z_stride = op.out_stride = dim;
    op.atoms = rank;
    op.policies = 5;
    op.z = z.data();
    op.slots = slots.data();
    op.shift = shift.data();
    op.limits = limits.data();
    op.phi = phi;
    op.low = -0.1f;
    op.high = 0.5f;
    op.a = a.data();
    op.a_bias = a_bias.data();
    op.b = b.data();
    return op;
  }
};

// What a call wrote, byte for byte.
struct Result {
  std::vector<unsigned char> out, doses, index, value;
  bool operator==(const Result& r) const {
    return out == r.out && doses == r.doses && index == r.index && value == r.value;
  }
};

// Plans and runs `op`. In place: z' is written over a copy of z. `poison` fills outputs and workspace.
template <class Op>
Result run(Op op, daco::Isa isa, int threads, bool in_place = false, unsigned char poison = 0xff,
           size_t misalign = 0) {
  const size_t row = static_cast<size_t>(op.dim) * size_of(op.activation);
  const size_t rows = static_cast<size_t>(op.rows);
  const size_t supports = rows * static_cast<size_t>(op.k_out) * 4;
  Fenced out(rows * row, poison, misalign), doses(rows * 8, poison, misalign);
  Fenced index(supports, poison, misalign), value(supports, poison, misalign);
  if (in_place) {
    if (rows * row > 0) std::memcpy(out.as<>(), op.z, rows * row);
    op.z = out.as<>();
  }
  op.out = out.as<>();
  op.doses = doses.as<float>();
  op.support_index = op.k_out > 0 ? index.as<int32_t>() : nullptr;
  op.support_value = op.k_out > 0 ? value.as<float>() : nullptr;
  daco::Plan plan;
  CHECK_OK(daco::cpu::plan(op, threads, &plan, isa));
  Fenced workspace(plan.workspace_bytes, poison);
  Threads pool{threads};
  CHECK_OK(
      daco::cpu::steer(op, plan, workspace.as<>(), threads > 1 ? pool.executor() : daco::Executor::serial()));
  const auto bytes = [](Fenced& f) {
    return std::vector<unsigned char>(f.as<unsigned char>(), f.as<unsigned char>() + f.bytes());
  };
  return {bytes(out), bytes(doses), bytes(index), bytes(value)};
}

// The instruction sets of this machine.
inline std::vector<daco::Isa> isas() {
  std::vector<daco::Isa> found;
  for (daco::Isa isa : {daco::Isa::kScalar, daco::Isa::kAvx2, daco::Isa::kAvx512}) {
    daco::Plan plan;
    daco::SteerSae op;
    op.dim = op.atoms = 1;
    op.policies = 2;
    op.coder = daco::SaeCoder::kNone;
    if (daco::cpu::plan(op, 1, &plan, isa).ok()) found.push_back(isa);
  }
  return found;
}

}  // namespace problem
