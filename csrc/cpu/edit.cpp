// Norms are taken in fp64: rows may be as large as 1e18, whose squares fp32 cannot hold.
#include "cpu/edit.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace daco {
namespace cpu {
namespace {

char* out_row(const Rows& op, int64_t t) {
  return static_cast<char*>(op.out) + t * op.out_stride * static_cast<int64_t>(size_of(op.activation));
}

// What the loop over a row's active codes finds.
struct Summary {
  int64_t edits = 0;   // entries of index and amount
  int64_t active = 0;  // entries of rank; strength runs along the code
  double removed = 0;  // sum of |c| * |A| over undesirable atoms
};

Summary weigh(const Rows& op, const void* atoms, const Kernels& kernels, int32_t slot, const SparseCode& code,
              const EditScratch& scratch) {
  const TypedKernels& weights = kernels.of(op.weight);
  const float* scales = op.scales != nullptr ? op.scales + op.atoms : nullptr;  // of the synthesis rows
  const auto atom_bytes = op.dim * static_cast<int64_t>(size_of(op.weight));
  const int64_t row = static_cast<int64_t>(slot) * op.atoms;
  const bool edits = slot >= kFirstPolicy;
  const float theta = op.limits[slot * kLimits + kDeadband];
  Summary found;
  for (int64_t i = 0; i < code.count; ++i) {
    const float c = code.value[i];
    if (c == 0) continue;
    const int64_t j = code.index[i];
    float amount = 0;
    if (edits) amount = (op.gain[row + j] - 1.f) * c + (op.boost != nullptr ? op.boost[row + j] : 0.f);
    const float scale = scales != nullptr ? scales[j] : 1.f;
    const bool undesirable = op.undesirable[row + j] != 0;
    // Without a deadband an atom on or off at zero strength changes nothing, so its norm is not needed.
    const bool gated = amount != 0 && !(theta <= 0);
    if (op.k_out > 0 || undesirable || gated) {
      const char* atom = static_cast<const char*>(atoms) + j * atom_bytes;
      const double strength =
          std::fabs(static_cast<double>(c) * scale) * std::sqrt(weights.sum_squares(atom, op.dim));
      if (undesirable) found.removed += strength;
      if (gated && !(strength > static_cast<double>(theta))) amount = 0;
      if (op.k_out > 0) {
        scratch.strength[i] = static_cast<float>(strength);
        scratch.rank[found.active++] = static_cast<int32_t>(i);
      }
    }
    if (amount != 0) {
      scratch.index[found.edits] = static_cast<int32_t>(j);
      scratch.amount[found.edits++] = amount * scale;
    }
  }
  return found;
}

void report_support(const Rows& op, int64_t t, const SparseCode& code, int64_t active,
                    const EditScratch& scratch) {
  const int64_t shown = std::min<int64_t>(active, op.k_out);
  const float* strength = scratch.strength;
  std::partial_sort(scratch.rank, scratch.rank + shown, scratch.rank + active, [&](int32_t a, int32_t b) {
    return strength[a] > strength[b] || (strength[a] == strength[b] && code.index[a] < code.index[b]);
  });
  int32_t* index = op.support_index + t * op.k_out;
  float* value = op.support_value + t * op.k_out;
  for (int64_t i = 0; i < shown; ++i) {
    index[i] = code.index[scratch.rank[i]];
    value[i] = code.value[scratch.rank[i]];
  }
  std::fill(index + shown, index + op.k_out, -1);
  std::fill(value + shown, value + op.k_out, 0.f);
}

// Writes z' and returns |z' - z|.
double edit(const Rows& op, const void* atoms, const Kernels& kernels, int32_t slot, int64_t t,
            const float* x, double norm, int64_t edits, const EditScratch& scratch) {
  const TypedKernels& fp32 = kernels.of(DType::kF32);
  const float* shift = op.shift + slot * op.dim;
  const bool shifts = fp32.sum_squares(shift, op.dim) != 0;
  if (edits == 0 && !shifts) {
    copy_row(op, t);
    return 0;
  }
  const size_t bytes = static_cast<size_t>(op.dim) * sizeof(float);
  if (shifts) {
    std::memcpy(scratch.delta, shift, bytes);
  } else {
    std::memset(scratch.delta, 0, bytes);
  }
  kernels.of(op.weight).accumulate(scratch.delta, atoms, op.dim, scratch.index, scratch.amount, edits);
  return add_delta(op, kernels, t, x, norm, scratch.delta, scratch.edited);
}

}  // namespace

double add_delta(const Rows& op, const Kernels& kernels, int64_t t, const float* x, double norm,
                 const float* delta, float* edited) {
  const TypedKernels& fp32 = kernels.of(DType::kF32);
  const float* limits = op.limits + op.slots[t] * kLimits;
  double share = 1;
  if (limits[kMaxDose] > 0) {
    const double length = std::sqrt(fp32.sum_squares(delta, op.dim));
    if (length > 0) share = std::min(1.0, static_cast<double>(limits[kMaxDose]) * norm / length);
  }
  kernels.add_scaled(x, delta, static_cast<float>(share), edited, op.dim);
  if (limits[kKeepNorm] != 0) {
    const double length = std::sqrt(fp32.sum_squares(edited, op.dim));
    if (length > 0) kernels.scale(edited, static_cast<float>(norm / length), op.dim);
  }
  kernels.of(op.activation).narrow(edited, out_row(op, t), op.dim);
  return std::sqrt(kernels.sum_squared_differences(edited, x, op.dim));
}

void copy_row(const Rows& op, int64_t t) {
  const size_t size = size_of(op.activation);
  char* out = out_row(op, t);
  const char* z = static_cast<const char*>(op.z) + t * op.z_stride * static_cast<int64_t>(size);
  if (out != z) std::memcpy(out, z, static_cast<size_t>(op.dim) * size);
}

void fill_row_with_nan(const Rows& op, int64_t t) {
  char* out = out_row(op, t);
  if (op.activation == DType::kF32) {
    const uint32_t nan = 0x7fc00000u;
    for (int64_t i = 0; i < op.dim; ++i) std::memcpy(out + i * 4, &nan, 4);
  } else {
    const uint16_t nan = op.activation == DType::kF16 ? 0x7e00u : 0x7fc0u;
    for (int64_t i = 0; i < op.dim; ++i) std::memcpy(out + i * 2, &nan, 2);
  }
}

void report_nothing(const Rows& op, int64_t t, float dose) {
  op.doses[t * 2] = dose;
  op.doses[t * 2 + 1] = dose;
  for (int64_t i = t * op.k_out; i < (t + 1) * op.k_out; ++i) {
    op.support_index[i] = -1;
    op.support_value[i] = 0;
  }
}

void steer_row(const Rows& op, const void* atoms, const Kernels& kernels, int64_t t, const float* x,
               double norm, const SparseCode& code, const EditScratch& scratch) {
  const int32_t slot = op.slots[t];
  const Summary found = weigh(op, atoms, kernels, slot, code, scratch);
  double moved = 0;
  if (slot >= kFirstPolicy) {
    moved = edit(op, atoms, kernels, slot, t, x, norm, found.edits, scratch);
  } else {
    copy_row(op, t);
  }
  op.doses[t * 2] = norm > 0 ? static_cast<float>(found.removed / norm) : 0.f;
  op.doses[t * 2 + 1] = norm > 0 ? static_cast<float>(moved / norm) : 0.f;
  if (op.k_out > 0) report_support(op, t, code, found.active, scratch);
}

}  // namespace cpu
}  // namespace daco
