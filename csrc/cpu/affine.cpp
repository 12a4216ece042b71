// Affine edits: two small products a row, with the matrices of the row's policy. Rows are independent and go
// to threads one by one; a policy's matrices stay in the cache between rows.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/validate.h"
#include "cpu/edit.h"
#include "cpu/launch.h"
#include "cpu/plan.h"

namespace daco {
namespace cpu {
namespace {

struct Scratch {
  float* x;       // [d]
  float* inner;   // [r]
  float* delta;   // [d]
  float* edited;  // [d]
};

constexpr int64_t kLineFloats = 16;

int64_t padded(int64_t n) { return (n + kLineFloats - 1) / kLineFloats * kLineFloats; }
int64_t scratch_floats(const SteerAffine& op) { return 3 * padded(op.dim) + padded(op.atoms); }
int64_t workers_of(const SteerAffine& op, int threads) {
  return std::min<int64_t>(std::max(threads, 1), op.rows);
}

const void* policy_of(const void* matrices, DType t, int64_t p, int64_t elements) {
  return static_cast<const char*>(matrices) + p * elements * static_cast<int64_t>(size_of(t));
}

float apply(const SteerAffine& op, float v) {
  switch (op.phi) {
    case AffinePhi::kIdentity: return v;
    case AffinePhi::kRelu: return v > 0 ? v : 0.f;
    case AffinePhi::kClamp: return std::min(std::max(v, op.low), op.high);
  }
  return v;
}

// y[i] = row i of w [n, width] . x, for all n rows.
void product(const Kernels& kernels, DType t, const void* w, int64_t n, int64_t width, const float* bias,
             const float* x, float* y) {
  const float* const xs[] = {x};
  float* const ys[] = {y};
  kernels.of(t).dots(w, nullptr, 0, n, width, bias, xs, 1, ys);
}

void edit_row(const SteerAffine& op, const Kernels& kernels, int64_t t, const Scratch& scratch) {
  const int64_t p = op.slots[t], d = op.dim, r = op.atoms;
  kernels.of(op.activation).widen(row_of(op, t), scratch.x, d);
  const double norm = std::sqrt(kernels.of(DType::kF32).sum_squares(scratch.x, d));
  product(kernels, op.weight, policy_of(op.a, op.weight, p, r * d), r, d, op.a_bias + p * r, scratch.x,
          scratch.inner);
  bool moves = false;
  for (int64_t i = 0; i < r; ++i) {
    scratch.inner[i] = apply(op, scratch.inner[i]);
    moves = moves || scratch.inner[i] != 0;
  }
  const float* shift = op.shift + p * d;
  double moved = 0;
  if (!moves && kernels.of(DType::kF32).sum_squares(shift, d) == 0) {
    copy_row(op, t);
  } else {
    product(kernels, op.weight, policy_of(op.b, op.weight, p, r * d), d, r, shift, scratch.inner,
            scratch.delta);
    moved = add_delta(op, kernels, t, scratch.x, norm, scratch.delta, scratch.edited);
  }
  op.doses[2 * t] = 0;
  op.doses[2 * t + 1] = norm > 0 ? static_cast<float>(moved / norm) : 0.f;
}

}  // namespace

Status plan(const SteerAffine& op, int threads, Plan* plan, Isa isa) {
  Status status = validate_shape(op);
  if (status.ok()) status = resolve(isa, &plan->isa);
  if (!status.ok()) return status;
  plan->threads = clamp_threads(threads);
  plan->workspace_bytes =
      static_cast<size_t>(workers_of(op, plan->threads) * scratch_floats(op)) * sizeof(float);
  plan->variant = "two products a row";
  plan->reason = "an affine edit has no code";
  return status;
}

Status steer(const SteerAffine& op, const Plan& plan, void* workspace, const Executor& executor) {
  constexpr char kName[] = "SteerAffine";
  Status status = validate(op);
  if (status.ok()) status = check_plan(kName, plan);
  if (!status.ok() || op.rows == 0) return status;
  const int64_t workers = workers_of(op, plan.threads), floats = scratch_floats(op);
  status = check_workspace(kName, plan, static_cast<size_t>(workers * floats) * sizeof(float), workspace);
  if (!status.ok()) return status;
  const Kernels& table = kernels(plan.isa);
  std::atomic<int64_t> next{0};
  parallel_for(executor, workers, [&](int64_t worker) {
    float* memory = static_cast<float*>(workspace) + worker * floats;
    const Scratch scratch{memory, memory + padded(op.dim), memory + padded(op.dim) + padded(op.atoms),
                          memory + 2 * padded(op.dim) + padded(op.atoms)};
    for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < op.rows;) {
      if (needs_code(op, table, false, t)) edit_row(op, table, t, scratch);
    }
  });
  return status;
}

}  // namespace cpu
}  // namespace daco
