#include "adapters/operands.h"

#include <cstdio>
#include <initializer_list>
#include <limits>

namespace daco::adapters {
namespace {

// A named axis; `size` is -1 while any size is good.
struct Axis {
  const char* letter;
  int64_t size;
};

// Fixed text that truncates instead of growing: a status holds no more anyway.
struct Text {
  char data[160] = {};
  size_t used = 0;

  template <class... Args>
  void add(const char* format, Args... args) {
    if (used >= sizeof(data)) return;
    const int n = std::snprintf(data + used, sizeof(data) - used, format, args...);
    if (n > 0) used += static_cast<size_t>(n);
  }
};

Text text_of_shape(const Operand& x) {
  Text t;
  t.add("%s", "(");
  for (size_t i = 0; i < x.rank; ++i) t.add(i == 0 ? "%lld" : ", %lld", static_cast<long long>(x.shape[i]));
  t.add("%s", x.rank == 1 ? ",)" : ")");
  return t;
}

Status wrong_shape(const char* op, const char* name, std::initializer_list<Axis> axes, const Operand& x) {
  Text want, known;
  want.add("%s", "(");
  const char* comma = "";
  for (const Axis& a : axes) {
    want.add("%s%s", comma, a.letter);
    comma = ", ";
    if (a.size >= 0 && a.letter[0] > '9')
      known.add("%s%s=%lld", known.used ? ", " : " with ", a.letter, static_cast<long long>(a.size));
  }
  want.add("%s", axes.size() == 1 ? ",)" : ")");
  return make_status(Code::kInvalidArgument, "%s: %s must have shape %s%s, got %s", op, name, want.data,
                     known.data, text_of_shape(x).data);
}

Status check_shape(const char* op, const char* name, const Operand& x, std::initializer_list<Axis> axes) {
  bool ok = x.rank == axes.size();
  size_t i = 0;
  for (const Axis& a : axes) {
    if (!ok) break;
    ok = a.size < 0 ? x.shape[i] > 0 : x.shape[i] == a.size;
    ++i;
  }
  return ok ? Status{} : wrong_shape(op, name, axes, x);
}

Status wrong_type(const char* op, const char* name, const char* want, const Operand& x) {
  return make_status(Code::kInvalidArgument, "%s: %s must be %s, got %s", op, name, want, x.element_name);
}

bool float_type(Element e, DType* out) {
  switch (e) {
    case Element::kF32: *out = DType::kF32; return true;
    case Element::kF16: *out = DType::kF16; return true;
    case Element::kBF16: *out = DType::kBF16; return true;
    default: return false;
  }
}

bool weight_type(Element e, DType* out) {
  if (float_type(e, out)) return true;
  *out = e == Element::kI8 ? DType::kI8 : DType::kF8E4M3;
  return e == Element::kI8 || e == Element::kF8E4M3;
}

#define DACO_TRY(expression)                        \
  do {                                              \
    if (Status s = (expression); !s.ok()) return s; \
  } while (false)

Status check_rows(const char* op, const Operand& z, const Operand& slots, Rows* rows) {
  if (!float_type(z.element, &rows->activation)) return wrong_type(op, "z", "fp32, fp16 or bf16", z);
  if (z.rank < 1 || z.shape[z.rank - 1] < 1)
    return make_status(Code::kInvalidArgument, "%s: z must have shape (..., d) with d >= 1, got %s", op,
                       text_of_shape(z).data);
  rows->dim = z.shape[z.rank - 1];
  rows->rows = z.count() / rows->dim;
  rows->z = z.data;
  rows->z_stride = rows->out_stride = rows->dim;
  if (slots.element != Element::kI32) return wrong_type(op, "slots", "int32", slots);
  bool same = slots.rank + 1 == z.rank;
  for (size_t i = 0; same && i < slots.rank; ++i) same = slots.shape[i] == z.shape[i];
  if (!same)
    return make_status(Code::kInvalidArgument,
                       "%s: slots must have the shape of z without its last axis, got %s for z %s", op,
                       text_of_shape(slots).data, text_of_shape(z).data);
  rows->slots = static_cast<const int32_t*>(slots.data);
  return {};
}

// The two matrices [m, d] that carry the weight dtype.
Status check_weights(const char* op, const char* first_name, const Operand& first, const char* second_name,
                     const Operand& second, int64_t d, DType* weight, int64_t* m) {
  if (!weight_type(first.element, weight))
    return wrong_type(op, first_name, "fp32, fp16, bf16, int8 or fp8 (e4m3)", first);
  DACO_TRY(check_shape(op, first_name, first, {{"m", -1}, {"d", d}}));
  *m = first.shape[0];
  DACO_TRY(check_shape(op, second_name, second, {{"m", *m}, {"d", first.shape[1]}}));
  if (second.element != first.element) {
    char want[64];
    std::snprintf(want, sizeof(want), "%s like %s", name_of(*weight), first_name);
    return wrong_type(op, second_name, want, second);
  }
  return {};
}

Status check_floats(const char* op, const char* name, const Operand& x, std::initializer_list<Axis> axes,
                    const float** out) {
  if (x.element != Element::kF32) return wrong_type(op, name, "fp32", x);
  DACO_TRY(check_shape(op, name, x, axes));
  *out = static_cast<const float*>(x.data);
  return {};
}

// Quantised weights have scales [2, m], others have none.
Status check_scales(const char* op, const Operand& scales, DType weight, int64_t m, const float** out) {
  const bool quantised = weight == DType::kI8 || weight == DType::kF8E4M3;
  if (scales.count() == 0) {
    if (!quantised) return {};
    return make_status(Code::kInvalidArgument, "%s: scales must be given with %s weights, shape (2, m)", op,
                       name_of(weight));
  }
  if (!quantised)
    return make_status(Code::kInvalidArgument, "%s: scales must be absent with %s weights, got shape %s", op,
                       name_of(weight), text_of_shape(scales).data);
  return check_floats(op, "scales", scales, {{"2", 2}, {"m", m}}, out);
}

// Everything from gain on, which the operators with a code share.
Status check_policies(const char* op, const Operand* from_gain, Rows* rows) {
  const Operand &gain = from_gain[0], &boost = from_gain[1], &undesirable = from_gain[2],
                &shift = from_gain[3], &limits = from_gain[4], &scales = from_gain[5];
  const int64_t m = rows->atoms, d = rows->dim;
  DACO_TRY(check_floats(op, "gain", gain, {{"P", -1}, {"m", m}}, &rows->gain));
  const int64_t p = rows->policies = gain.shape[0];
  if (boost.count() > 0) DACO_TRY(check_floats(op, "boost", boost, {{"P", p}, {"m", m}}, &rows->boost));
  if (undesirable.element != Element::kBool) return wrong_type(op, "undesirable", "bool", undesirable);
  DACO_TRY(check_shape(op, "undesirable", undesirable, {{"P", p}, {"m", m}}));
  rows->undesirable = static_cast<const uint8_t*>(undesirable.data);
  DACO_TRY(check_floats(op, "shift", shift, {{"P", p}, {"d", d}}, &rows->shift));
  DACO_TRY(check_floats(op, "limits", limits, {{"P", p}, {"4", 4}}, &rows->limits));
  return check_scales(op, scales, rows->weight, m, &rows->scales);
}

Status check_support(const char* op, int32_t k, int64_t m) {
  if (k <= m) return {};
  return make_status(Code::kInvalidArgument, "%s: k must be at most the number of atoms m=%lld, got %d", op,
                     static_cast<long long>(m), k);
}

template <class T>
Status parse_or_refuse(const char* op, const char* name, const char* text, const char* known, T* out) {
  if (parse(text, out)) return {};
  return make_status(Code::kInvalidArgument, "%s: %s must be one of %s, got '%s'", op, name, known, text);
}

}  // namespace

Status bind(const Operand (&in)[kSaeInputs], SteerSae* op) {
  const char* name = "steer_sae";
  DACO_TRY(check_rows(name, in[kSaeZ], in[kSaeSlots], op));
  DACO_TRY(check_weights(name, "enc", in[kSaeEnc], "dec", in[kSaeDec], op->dim, &op->weight, &op->atoms));
  op->enc = in[kSaeEnc].data;
  op->dec = in[kSaeDec].data;
  DACO_TRY(check_floats(name, "enc_bias", in[kSaeEncBias], {{"m", op->atoms}}, &op->enc_bias));
  if (in[kSaeThreshold].count() > 0)
    DACO_TRY(check_floats(name, "threshold", in[kSaeThreshold], {{"m", op->atoms}}, &op->threshold));
  if (op->coder == SaeCoder::kTopK) DACO_TRY(check_support(name, op->k, op->atoms));
  return check_policies(name, &in[kSaeGain], op);
}

Status bind(const Operand (&in)[kPursuitInputs], SteerPursuit* op) {
  const char* name = "steer_pursuit";
  DACO_TRY(check_rows(name, in[kPursuitZ], in[kPursuitSlots], op));
  // SteerPursuit::atoms, the matrix, hides Rows::atoms, the count.
  int64_t& m = op->Rows::atoms;
  DACO_TRY(check_weights(name, "analysis", in[kPursuitAnalysis], "atoms", in[kPursuitAtoms], op->dim,
                         &op->weight, &m));
  op->analysis = in[kPursuitAnalysis].data;
  op->atoms = in[kPursuitAtoms].data;
  DACO_TRY(check_floats(name, "bias", in[kPursuitBias], {{"m", m}}, &op->bias));
  const Operand& gram = in[kPursuitGram];
  if (gram.count() > 0) {
    if (!float_type(gram.element, &op->gram_dtype) || op->gram_dtype == DType::kBF16)
      return wrong_type(name, "gram", "fp32 or fp16", gram);
    DACO_TRY(check_shape(name, "gram", gram, {{"m", m}, {"m", m}}));
    op->gram = gram.data;
  }
  if (op->coder == PursuitCoder::kOmp) DACO_TRY(check_support(name, op->k, m));
  return check_policies(name, &in[kPursuitGain], op);
}

Status bind(const Operand (&in)[kAffineInputs], SteerAffine* op) {
  const char* name = "steer_affine";
  DACO_TRY(check_rows(name, in[kAffineZ], in[kAffineSlots], op));
  const Operand &a = in[kAffineA], &b = in[kAffineB];
  if (!float_type(a.element, &op->weight)) return wrong_type(name, "a", "fp32, fp16 or bf16", a);
  DACO_TRY(check_shape(name, "a", a, {{"P", -1}, {"r", -1}, {"d", op->dim}}));
  const int64_t p = op->policies = a.shape[0];
  const int64_t r = op->atoms = a.shape[1];
  op->a = a.data;
  DACO_TRY(check_floats(name, "a_bias", in[kAffineABias], {{"P", p}, {"r", r}}, &op->a_bias));
  DACO_TRY(check_shape(name, "b", b, {{"P", p}, {"d", op->dim}, {"r", r}}));
  if (b.element != a.element) {
    char want[64];
    std::snprintf(want, sizeof(want), "%s like a", name_of(op->weight));
    return wrong_type(name, "b", want, b);
  }
  op->b = b.data;
  DACO_TRY(check_floats(name, "shift", in[kAffineShift], {{"P", p}, {"d", op->dim}}, &op->shift));
  return check_floats(name, "limits", in[kAffineLimits], {{"P", p}, {"4", 4}}, &op->limits);
}

Status bind_gram(const Operand& analysis, const Operand& atoms, const Operand& scales, GramOperands* gram) {
  const char* name = "build_gram";
  gram->scales = nullptr;
  DACO_TRY(check_weights(name, "analysis", analysis, "atoms", atoms, -1, &gram->weight, &gram->m));
  gram->analysis = analysis.data;
  gram->atoms = atoms.data;
  gram->d = analysis.shape[1];
  return check_scales(name, scales, gram->weight, gram->m, &gram->scales);
}

Status parse_attribute(const char* op, const char* text, SaeCoder* coder) {
  return parse_or_refuse(op, "coder", text, "topk, relu, jumprelu, none", coder);
}

Status parse_attribute(const char* op, const char* text, PursuitCoder* coder) {
  return parse_or_refuse(op, "coder", text, "omp, elastic_net", coder);
}

Status parse_attribute(const char* op, const char* text, PursuitSign* sign) {
  return parse_or_refuse(op, "sign", text, "positive, signed, nnls", sign);
}

Status parse_attribute(const char* op, const char* text, AffinePhi* phi) {
  return parse_or_refuse(op, "phi", text, "identity, relu, clamp", phi);
}

Status check_count(const char* op, const char* name, int64_t value, int32_t low, int32_t* out) {
  if (value < low || value > std::numeric_limits<int32_t>::max())
    return make_status(Code::kInvalidArgument, "%s: %s must be at least %d, got %lld", op, name, low,
                       static_cast<long long>(value));
  *out = static_cast<int32_t>(value);
  return {};
}

#undef DACO_TRY

}  // namespace daco::adapters
