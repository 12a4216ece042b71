// Refusals. Every message reads "<operator>: <operand or attribute>: expected ..., got ...".
#include "core/validate.h"

#include <cmath>
#include <initializer_list>

namespace daco {
namespace {

constexpr int64_t kMaxIndex = INT32_MAX;  // supports are reported as int32

Status refuse_size(const char* op, const char* what, const char* expected, int64_t got) {
  return make_status(Code::kInvalidArgument, "%s: %s: expected %s, got %lld", op, what, expected,
                     static_cast<long long>(got));
}

bool is_activation(DType t) { return t == DType::kF32 || t == DType::kF16 || t == DType::kBF16; }

bool is_quantised(DType t) { return t == DType::kI8 || t == DType::kF8E4M3; }

Status check_rows(const char* op, const Rows& r) {
  if (r.rows < 0) return refuse_size(op, "z", "at least 0 rows", r.rows);
  if (r.dim < 1 || r.dim > kMaxIndex) return refuse_size(op, "z", "a width d of 1 to 2^31 - 1", r.dim);
  if (r.atoms < 1 || r.atoms > kMaxIndex) {
    return refuse_size(op, "atoms m", "1 to 2^31 - 1 (coder none takes a placeholder of 1)", r.atoms);
  }
  if (r.policies < kFirstPolicy) {
    return refuse_size(op, "policies P", "at least 2 (slots 0 and 1 are counted)", r.policies);
  }
  if (r.policies > kMaxIndex) return refuse_size(op, "policies P", "at most 2^31 - 1", r.policies);
  if (r.k_out < 0) return refuse_size(op, "k_out", "0 or more", r.k_out);
  if (!is_activation(r.activation)) {
    return make_status(Code::kInvalidArgument, "%s: z: expected fp32, fp16 or bf16, got %s", op,
                       name_of(r.activation));
  }
  if (!is_activation(r.weight) && !is_quantised(r.weight)) {
    return make_status(Code::kInvalidArgument,
                       "%s: weights: expected fp32, fp16, bf16, int8 or fp8, got type %d", op,
                       static_cast<int>(r.weight));
  }
  return {};
}

struct Operand {
  const char* name;
  const void* data;
  size_t alignment;
};

Status check_operands(const char* op, std::initializer_list<Operand> operands) {
  for (const Operand& o : operands) {
    if (o.data == nullptr) {
      return make_status(Code::kInvalidArgument, "%s: %s: expected a buffer, got a null pointer", op, o.name);
    }
    if (reinterpret_cast<uintptr_t>(o.data) % o.alignment != 0) {
      return make_status(Code::kInvalidArgument,
                         "%s: %s: expected a pointer aligned to its %d-byte elements, got %p", op, o.name,
                         static_cast<int>(o.alignment), o.data);
    }
  }
  return {};
}

// True when `out` shares memory with `z` in any way but being the very same rows.
bool overlaps(const Rows& r) {
  const auto size = static_cast<int64_t>(size_of(r.activation));
  const int64_t z_stride = r.rows > 1 ? r.z_stride : r.dim;
  const int64_t out_stride = r.rows > 1 ? r.out_stride : r.dim;
  if (r.out == r.z) return z_stride != out_stride;
  const auto z = static_cast<int64_t>(reinterpret_cast<uintptr_t>(r.z));
  const auto out = static_cast<int64_t>(reinterpret_cast<uintptr_t>(r.out));
  const int64_t z_end = z + ((r.rows - 1) * z_stride + r.dim) * size;
  const int64_t out_end = out + ((r.rows - 1) * out_stride + r.dim) * size;
  if (out >= z_end || z >= out_end) return false;
  if (z_stride != out_stride) return true;
  // Equal strides: two column ranges of one buffer may interleave without meeting.
  const int64_t stride = z_stride * size;
  const int64_t offset = ((out - z) % stride + stride) % stride;
  return offset < r.dim * size || stride - offset < r.dim * size;
}

Status check_buffers(const char* op, const Rows& r) {
  if (r.rows > 0) {
    const size_t activation = size_of(r.activation);
    Status status = check_operands(op, {{"z", r.z, activation},
                                        {"the output z'", r.out, activation},
                                        {"slots", r.slots, sizeof(int32_t)},
                                        {"doses", r.doses, sizeof(float)}});
    if (!status.ok()) return status;
    if (r.k_out > 0) {
      status = check_operands(op, {{"support_index", r.support_index, sizeof(int32_t)},
                                   {"support_value", r.support_value, sizeof(float)}});
      if (!status.ok()) return status;
    }
    if (r.rows > 1 && r.z_stride < r.dim) {
      return refuse_size(op, "z", "a row stride of at least d elements", r.z_stride);
    }
    if (r.rows > 1 && r.out_stride < r.dim) {
      return refuse_size(op, "the output z'", "a row stride of at least d elements", r.out_stride);
    }
    if (overlaps(r)) {
      return make_status(
          Code::kInvalidArgument,
          "%s: the output z': expected z itself or memory apart from it, got a partial overlap", op);
    }
  }
  return check_operands(op, {{"shift", r.shift, sizeof(float)}, {"limits", r.limits, sizeof(float)}});
}

// The tables that are looked up by slot and atom.
Status check_tables(const char* op, const Rows& r) {
  Status status =
      check_operands(op, {{"gain", r.gain, sizeof(float)}, {"undesirable", r.undesirable, sizeof(uint8_t)}});
  if (status.ok() && r.boost != nullptr) status = check_operands(op, {{"boost", r.boost, sizeof(float)}});
  return status;
}

Status check_scales(const char* op, const Rows& r) {
  if (is_quantised(r.weight)) return check_operands(op, {{"scales", r.scales, sizeof(float)}});
  if (r.scales != nullptr) {
    return make_status(Code::kInvalidArgument, "%s: scales: expected none with %s weights, got some", op,
                       name_of(r.weight));
  }
  return {};
}

bool is_fraction(float x) { return x >= 0.f && x <= 1.f; }

constexpr char kSae[] = "SteerSae";
constexpr char kPursuit[] = "SteerPursuit";
constexpr char kAffine[] = "SteerAffine";

}  // namespace

Status validate_shape(const SteerSae& op) {
  Status status = check_rows(kSae, op);
  if (!status.ok()) return status;
  switch (op.coder) {
    case SaeCoder::kTopK:
      if (op.k < 1 || op.k > op.atoms) return refuse_size(kSae, "k", "1 to m with coder topk", op.k);
      return {};
    case SaeCoder::kRelu:
    case SaeCoder::kJumpRelu:
    case SaeCoder::kNone: return {};
  }
  return refuse_size(kSae, "coder", "topk, relu, jumprelu or none (0 to 3)", static_cast<int>(op.coder));
}

Status validate_shape(const SteerPursuit& op) {
  Status status = check_rows(kPursuit, op);
  if (!status.ok()) return status;
  if (op.sign < PursuitSign::kPositive || op.sign > PursuitSign::kNonNegative) {
    return refuse_size(kPursuit, "sign", "positive, signed or nnls (0 to 2)", static_cast<int>(op.sign));
  }
  switch (op.coder) {
    case PursuitCoder::kOmp:
      if (op.k < 1 || op.k > kMaxPursuit || op.k > static_cast<const Rows&>(op).atoms) {
        return refuse_size(kPursuit, "k", "1 to 64, at most m, with coder omp", op.k);
      }
      if (!(op.tol >= 0.f) || !std::isfinite(op.tol)) {
        return make_status(Code::kInvalidArgument, "%s: tol: expected a finite number, 0 or more, got %g",
                           kPursuit, static_cast<double>(op.tol));
      }
      break;
    case PursuitCoder::kElasticNet:
      if (!is_fraction(op.tau)) {
        return make_status(Code::kInvalidArgument, "%s: tau: expected 0 to 1, got %g", kPursuit,
                           static_cast<double>(op.tau));
      }
      if (!(op.alpha > 0.f) || !std::isfinite(op.alpha)) {
        return make_status(Code::kInvalidArgument, "%s: alpha: expected a finite number above 0, got %g",
                           kPursuit, static_cast<double>(op.alpha));
      }
      break;
    default: return refuse_size(kPursuit, "coder", "omp or elastic_net (0 or 1)", static_cast<int>(op.coder));
  }
  if (op.gram_dtype != DType::kF32 && op.gram_dtype != DType::kF16) {
    return make_status(Code::kInvalidArgument, "%s: gram: expected fp32 or fp16, got %s", kPursuit,
                       name_of(op.gram_dtype));
  }
  return {};
}

Status validate_shape(const SteerAffine& op) {
  if (op.atoms < 1) return refuse_size(kAffine, "a", "[P, r, d] with a rank r of at least 1", op.atoms);
  Status status = check_rows(kAffine, op);
  if (!status.ok()) return status;
  if (op.k_out != 0) return refuse_size(kAffine, "k_out", "0: it reports no support", op.k_out);
  if (!is_activation(op.weight)) {
    return make_status(Code::kInvalidArgument, "%s: a: expected fp32, fp16 or bf16, got %s", kAffine,
                       name_of(op.weight));
  }
  switch (op.phi) {
    case AffinePhi::kIdentity:
    case AffinePhi::kRelu: return {};
    case AffinePhi::kClamp:
      if (op.low <= op.high) return {};
      return make_status(Code::kInvalidArgument, "%s: clamp: expected low <= high, got [%g, %g]", kAffine,
                         static_cast<double>(op.low), static_cast<double>(op.high));
  }
  return refuse_size(kAffine, "phi", "identity, relu or clamp (0 to 2)", static_cast<int>(op.phi));
}

Status validate(const SteerSae& op) {
  Status status = validate_shape(op);
  if (status.ok()) status = check_buffers(kSae, op);
  if (status.ok()) status = check_tables(kSae, op);
  if (!status.ok() || op.coder == SaeCoder::kNone) return status;
  const size_t weight = size_of(op.weight);
  status = check_operands(
      kSae, {{"enc", op.enc, weight}, {"enc_bias", op.enc_bias, sizeof(float)}, {"dec", op.dec, weight}});
  if (status.ok()) status = check_scales(kSae, op);
  if (status.ok() && op.coder == SaeCoder::kJumpRelu) {
    status = check_operands(kSae, {{"threshold", op.threshold, sizeof(float)}});
  }
  return status;
}

Status validate(const SteerPursuit& op) {
  Status status = validate_shape(op);
  if (status.ok()) status = check_buffers(kPursuit, op);
  if (status.ok()) status = check_tables(kPursuit, op);
  if (!status.ok()) return status;
  const size_t weight = size_of(op.weight);
  status = check_operands(
      kPursuit,
      {{"analysis", op.analysis, weight}, {"bias", op.bias, sizeof(float)}, {"atoms", op.atoms, weight}});
  if (status.ok()) status = check_scales(kPursuit, op);
  if (status.ok() && op.gram != nullptr) {
    status = check_operands(kPursuit, {{"gram", op.gram, size_of(op.gram_dtype)}});
  }
  return status;
}

Status validate(const SteerAffine& op) {
  Status status = validate_shape(op);
  if (status.ok()) status = check_buffers(kAffine, op);
  if (status.ok()) status = check_scales(kAffine, op);
  if (!status.ok()) return status;
  const size_t weight = size_of(op.weight);
  return check_operands(kAffine,
                        {{"a", op.a, weight}, {"a_bias", op.a_bias, sizeof(float)}, {"b", op.b, weight}});
}

}  // namespace daco
