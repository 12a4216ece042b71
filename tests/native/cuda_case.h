// Calls of the GPU's launchers on the CPU, where a scheduler of fibers runs their kernels, and of the CPU
// kernels on the same numbers: operands in every type, broken rows, poisoned and fenced buffers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/layout.h"
#include "cuda/steer_cuda.h"
#include "problem.h"

namespace cuda_case {

using daco::DType;
using problem::Operands;
using problem::Shape;

constexpr DType kFloats[] = {DType::kF32, DType::kF16, DType::kBF16};
constexpr DType kWeights[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kI8, DType::kF8E4M3};

inline daco::cuda::Device device(int multiprocessors = 4) {
  daco::cuda::Device d;
  d.index = -1;
  d.compute = 90;
  d.multiprocessors = multiprocessors;
  d.shared_bytes = 227 * 1024;
  d.l2_bytes = 50 << 20;
  return d;
}

// A matrix in some type, and what its numbers are.
struct Matrix {
  std::vector<unsigned char> raw;
  std::vector<float> exact;
};

inline void put(DType type, float x, unsigned char* to, float* exact) {
  switch (type) {
    case DType::kF32: std::memcpy(to, &x, 4), *exact = x; break;
    case DType::kF16: {
      const __half h = __float2half_rn(x);
      std::memcpy(to, &h, 2), *exact = __half2float(h);
      break;
    }
    case DType::kBF16: {
      const __nv_bfloat16 b = __float2bfloat16_rn(x);
      std::memcpy(to, &b, 2), *exact = __bfloat162float(b);
      break;
    }
    case DType::kI8: {
      const auto q = static_cast<int8_t>(std::lrint(x));
      std::memcpy(to, &q, 1), *exact = q;
      break;
    }
    case DType::kF8E4M3: {
      const __nv_fp8_e4m3 f(x);
      std::memcpy(to, &f, 1), *exact = static_cast<float>(f);
      break;
    }
  }
}

inline float get(DType type, const unsigned char* from) {
  if (type == DType::kF16) {
    __half h;
    std::memcpy(&h, from, 2);
    return __half2float(h);
  }
  if (type == DType::kBF16) {
    __nv_bfloat16 b;
    std::memcpy(&b, from, 2);
    return __bfloat162float(b);
  }
  float x;
  std::memcpy(&x, from, 4);
  return x;
}

// Rows of quantised types fill their range; `scale` [rows] takes it back.
inline Matrix matrix(DType type, const std::vector<float>& x, int64_t width, std::vector<float>* scale) {
  Matrix m;
  m.raw.resize(x.size() * daco::size_of(type));
  m.exact.resize(x.size());
  const float top = type == DType::kI8 ? 127.f : type == DType::kF8E4M3 ? 448.f : 0.f;
  for (size_t row = 0; row < x.size() / static_cast<size_t>(width); ++row) {
    const size_t first = row * static_cast<size_t>(width);
    float largest = 0;
    for (int64_t i = 0; i < width; ++i) largest = std::max(largest, std::fabs(x[first + i]));
    const float s = top > 0 && largest > 0 ? largest / top : 1.f;
    if (scale != nullptr) scale->push_back(s);
    for (int64_t i = 0; i < width; ++i) {
      const size_t at = first + static_cast<size_t>(i);
      put(type, x[at] / s, m.raw.data() + at * daco::size_of(type), &m.exact[at]);
      m.exact[at] *= s;
    }
  }
  return m;
}

struct Results {
  std::vector<float> out, doses, value;
  std::vector<int32_t> index;
};

// Runs an operator by the GPU's launchers on poisoned, fenced buffers.
template <class Op>
Results run_cuda(Op op, const daco::cuda::Device& on, bool in_place) {
  const size_t size = daco::size_of(op.activation);
  const auto row = static_cast<size_t>(op.dim), rows = static_cast<size_t>(op.rows);
  const size_t supports = rows * static_cast<size_t>(op.k_out);
  problem::Fenced out(rows * row * size, 0x7b), doses(rows * 8, 0x7b), index(supports * 4, 0x7b),
      value(supports * 4, 0x7b);
  if (in_place) {
    std::memcpy(out.as<>(), op.z, rows * row * size);
    op.z = out.as<>();
  }
  op.out = out.as<>();
  op.doses = doses.as<float>();
  op.support_index = op.k_out > 0 ? index.as<int32_t>() : nullptr;
  op.support_value = op.k_out > 0 ? value.as<float>() : nullptr;
  daco::cuda::Plan plan;
  CHECK_OK(daco::cuda::plan(op, on, &plan));
  CHECK(plan.workspace_bytes % daco::cuda::kAlignment == 0);
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, plan.workspace_bytes + 256) != 0) std::abort();
  std::memset(memory, 0xff, plan.workspace_bytes + 256);
  CHECK_OK(daco::cuda::steer(op, plan, memory, nullptr));
  for (size_t i = 0; i < 256; ++i) {
    CHECK(static_cast<unsigned char*>(memory)[plan.workspace_bytes + i] == 0xff);
  }
  std::free(memory);
  Results r;
  for (size_t i = 0; i < rows * row; ++i) {
    r.out.push_back(get(op.activation, out.as<unsigned char>() + i * size));
  }
  r.doses.assign(doses.as<float>(), doses.as<float>() + rows * 2);
  r.index.assign(index.as<int32_t>(), index.as<int32_t>() + supports);
  r.value.assign(value.as<float>(), value.as<float>() + supports);
  return r;
}

template <class Op>
Results run_cpu(const Op& op) {
  const problem::Result bytes = problem::run(op, daco::Isa::kScalar, 1);
  Results r;
  const auto copy = [](const std::vector<unsigned char>& from, auto* to) {
    to->resize(from.size() / 4);
    if (!from.empty()) std::memcpy(to->data(), from.data(), from.size());
  };
  copy(bytes.out, &r.out), copy(bytes.doses, &r.doses), copy(bytes.index, &r.index),
      copy(bytes.value, &r.value);
  return r;
}

inline bool near(float a, float b, float relative, float floor) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::fabs(a - b) <= relative * std::fabs(b) + floor;
}

inline void compare(const Results& got, const Results& want, const daco::Rows& op, const std::string& what) {
  const float rounding = op.activation == DType::kF32 ? 1e-6f : op.activation == DType::kF16 ? 1e-3f : 8e-3f;
  for (int64_t t = 0; t < op.rows; ++t) {
    float largest = 0;
    for (int64_t i = 0; i < op.dim; ++i) {
      const float x = want.out[t * op.dim + i];
      if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
    }
    bool same = true;
    for (int64_t i = 0; i < op.dim; ++i) {
      same =
          same && near(got.out[t * op.dim + i], want.out[t * op.dim + i], rounding, 3e-5f * largest + 1e-6f);
    }
    for (int64_t i = 2 * t; i < 2 * t + 2; ++i)
      same = same && near(got.doses[i], want.doses[i], 1e-4f, 1e-5f);
    for (int64_t i = t * op.k_out; i < (t + 1) * op.k_out; ++i) {
      same =
          same && got.index[i] == want.index[i] && near(got.value[i], want.value[i], 2e-5f, 2e-5f * largest);
    }
    if (!same) check::fail(__FILE__, __LINE__, what + ": row " + std::to_string(t) + " differs");
  }
}

// Rows that are broken, zero, huge, or have no slot.
inline void disturb(Operands* o, DType activation) {
  const int64_t d = o->shape.dim;
  for (int64_t t = 0; t < o->shape.rows; ++t) {
    float* z = o->z.data() + t * d;
    switch (t % 8) {
      case 3: std::fill(z, z + d, 0.f); break;
      case 4: z[t % d] = t % 16 == 4 ? NAN : -INFINITY; break;
      case 5:
        o->slots[static_cast<size_t>(t)] = t % 16 == 5 ? -1 : static_cast<int32_t>(o->shape.policies);
        break;
      case 6:
        if (activation != DType::kF16) {
          for (int64_t i = 0; i < d; ++i) z[i] *= 1e16f;
        }
        break;
      default: break;
    }
  }
}

struct Typed {
  Matrix z, weights;
  std::vector<float> scales;
};

// The operator in the asked types, and the same numbers in fp32 for the CPU.
template <class Op, class Set>
void check_types(Op op, Operands* o, DType activation, DType weight, const daco::cuda::Device& on,
                 const std::string& what, Set&& set) {
  Typed typed;
  disturb(o, activation);
  typed.z = matrix(activation, o->z, o->shape.dim, nullptr);
  typed.weights = matrix(weight, o->atoms, o->shape.dim, &typed.scales);
  typed.scales.insert(typed.scales.end(), typed.scales.begin(), typed.scales.end());
  Op exact = op;
  exact.z = typed.z.exact.data();
  set(&exact, typed.weights.exact.data());
  op.activation = activation;
  op.weight = weight;
  op.z = typed.z.raw.data();
  op.scales = daco::size_of(weight) == 1 ? typed.scales.data() : nullptr;
  set(&op, typed.weights.raw.data());
  compare(run_cuda(op, on, o->shape.dim % 2 == 0), run_cpu(exact), op, what);
}

}  // namespace cuda_case
