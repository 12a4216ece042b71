#include "adapters/tensorrt/operators.h"

#include <algorithm>
#include <cstring>

namespace daco::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginFieldType;

#define DACO_TRY(expression)                        \
  do {                                              \
    if (Status s = (expression); !s.ok()) return s; \
  } while (false)

Status read_count(const FieldReader& fields, const char* op, const char* name, int32_t low, int32_t* out) {
  int64_t value = 0;
  DACO_TRY(fields.integer(name, &value));
  return adapters::check_count(op, name, value, low, out);
}

template <class T>
Status read_choice(const FieldReader& fields, const char* op, const char* name, T* out) {
  std::string text;
  DACO_TRY(fields.text(name, &text));
  return adapters::parse_attribute(op, text.c_str(), out);
}

}  // namespace

const Input Spec<SteerSae>::kInput[] = {
    {"z", Kind::kActivation, false},   {"slots", Kind::kSlots, false},  {"enc", Kind::kWeight, false},
    {"enc_bias", Kind::kFloat, false}, {"dec", Kind::kWeight, false},   {"threshold", Kind::kFloat, true},
    {"gain", Kind::kFloat, false},     {"boost", Kind::kFloat, true},   {"undesirable", Kind::kFlag, false},
    {"shift", Kind::kFloat, false},    {"limits", Kind::kFloat, false}, {"scales", Kind::kFloat, true},
};

const Input Spec<SteerPursuit>::kInput[] = {
    {"z", Kind::kActivation, false}, {"slots", Kind::kSlots, false},  {"analysis", Kind::kWeight, false},
    {"bias", Kind::kFloat, false},   {"gram", Kind::kGram, true},     {"atoms", Kind::kWeight, false},
    {"gain", Kind::kFloat, false},   {"boost", Kind::kFloat, true},   {"undesirable", Kind::kFlag, false},
    {"shift", Kind::kFloat, false},  {"limits", Kind::kFloat, false}, {"scales", Kind::kFloat, true},
};

const Input Spec<SteerAffine>::kInput[] = {
    {"z", Kind::kActivation, false}, {"slots", Kind::kSlots, false}, {"a", Kind::kWeight, false},
    {"a_bias", Kind::kFloat, false}, {"b", Kind::kWeight, false},    {"shift", Kind::kFloat, false},
    {"limits", Kind::kFloat, false},
};

Status read(const FieldReader& fields, SteerSae* op) {
  const char* name = Spec<SteerSae>::kName;
  DACO_TRY(read_choice(fields, name, "coder", &op->coder));
  DACO_TRY(read_count(fields, name, "k", op->coder == SaeCoder::kTopK ? 1 : 0, &op->k));
  return read_count(fields, name, "k_out", 0, &op->k_out);
}

Status read(const FieldReader& fields, SteerPursuit* op) {
  const char* name = Spec<SteerPursuit>::kName;
  DACO_TRY(read_choice(fields, name, "coder", &op->coder));
  DACO_TRY(read_choice(fields, name, "sign", &op->sign));
  DACO_TRY(read_count(fields, name, "k", op->coder == PursuitCoder::kOmp ? 1 : 0, &op->k));
  DACO_TRY(read_count(fields, name, "k_out", 0, &op->k_out));
  DACO_TRY(fields.number("tol", &op->tol));
  DACO_TRY(fields.number("tau", &op->tau));
  return fields.number("alpha", &op->alpha);
}

Status read(const FieldReader& fields, SteerAffine* op) {
  DACO_TRY(read_choice(fields, Spec<SteerAffine>::kName, "phi", &op->phi));
  if (op->phi != AffinePhi::kClamp && !fields.has("clamp")) return {};
  float bounds[2] = {};
  DACO_TRY(fields.numbers("clamp", bounds, 2));
  op->low = bounds[0];
  op->high = bounds[1];
  return {};
}

void write(const SteerSae& op, FieldWriter* fields) {
  fields->text("coder", daco::name_of(op.coder));
  fields->integer("k", op.k);
  fields->integer("k_out", op.k_out);
}

void write(const SteerPursuit& op, FieldWriter* fields) {
  fields->text("coder", daco::name_of(op.coder));
  fields->text("sign", daco::name_of(op.sign));
  fields->integer("k", op.k);
  fields->integer("k_out", op.k_out);
  fields->numbers("tol", {op.tol});
  fields->numbers("tau", {op.tau});
  fields->numbers("alpha", {op.alpha});
}

void write(const SteerAffine& op, FieldWriter* fields) {
  fields->text("phi", daco::name_of(op.phi));
  fields->numbers("clamp", {op.low, op.high});
}

void declare(const SteerSae&, FieldWriter* fields) {
  fields->declare("coder", PluginFieldType::kCHAR);
  fields->declare("k", PluginFieldType::kINT32);
  fields->declare("k_out", PluginFieldType::kINT32);
}

void declare(const SteerPursuit&, FieldWriter* fields) {
  fields->declare("coder", PluginFieldType::kCHAR);
  fields->declare("sign", PluginFieldType::kCHAR);
  fields->declare("k", PluginFieldType::kINT32);
  fields->declare("k_out", PluginFieldType::kINT32);
  for (const char* name : {"tol", "tau", "alpha"}) fields->declare(name, PluginFieldType::kFLOAT32);
}

void declare(const SteerAffine&, FieldWriter* fields) {
  fields->declare("phi", PluginFieldType::kCHAR);
  fields->declare("clamp", PluginFieldType::kFLOAT32);
}

Layout Layout::positional(const Input* contract, size_t size) {
  Layout layout;
  for (size_t i = 0; i < size; ++i) {
    layout.places_.push_back(static_cast<uint8_t>(i));
    if (!contract[i].optional) layout.required_ = i + 1;
  }
  return layout;
}

Status Layout::parse(const char* op, const std::string& names, const Input* contract, size_t size,
                     Layout* out) {
  out->places_.clear();
  out->names_ = names;
  for (size_t start = 0; start <= names.size();) {
    const size_t end = std::min(names.find(',', start), names.size());
    const std::string name = names.substr(start, end - start);
    const Input* found =
        std::find_if(contract, contract + size, [&](const Input& input) { return name == input.name; });
    if (found == contract + size)
      return make_status(Code::kInvalidArgument, "%s: attribute operands names '%s', which is no operand", op,
                         name.c_str());
    const auto place = static_cast<uint8_t>(found - contract);
    if (std::find(out->places_.begin(), out->places_.end(), place) != out->places_.end())
      return make_status(Code::kInvalidArgument, "%s: attribute operands names %s twice", op, name.c_str());
    out->places_.push_back(place);
    start = end + 1;
  }
  // Output shapes and types follow the first input, so z must be that.
  if (out->places_.front() != 0)
    return make_status(Code::kInvalidArgument, "%s: attribute operands must begin with z", op);
  for (size_t i = 0; i < size; ++i)
    if (!contract[i].optional && std::find(out->places_.begin(), out->places_.end(), i) == out->places_.end())
      return make_status(Code::kInvalidArgument, "%s: attribute operands leaves out %s, which is required",
                         op, contract[i].name);
  return {};
}

bool Layout::accepts(int32_t inputs) const {
  if (inputs < 0) return false;
  const auto count = static_cast<size_t>(inputs);
  return names_.empty() ? count >= required_ && count <= places_.size() : count == places_.size();
}

adapters::Element element_of(DataType type) {
  using adapters::Element;
  switch (type) {
    case DataType::kFLOAT: return Element::kF32;
    case DataType::kHALF: return Element::kF16;
    case DataType::kBF16: return Element::kBF16;
    case DataType::kINT32: return Element::kI32;
    case DataType::kBOOL: return Element::kBool;
    case DataType::kINT8: return Element::kI8;
    case DataType::kFP8: return Element::kF8E4M3;
    default: return Element::kOther;
  }
}

const char* name_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return "fp32";
    case DataType::kHALF: return "fp16";
    case DataType::kBF16: return "bf16";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    case DataType::kBOOL: return "bool";
    case DataType::kINT8: return "int8";
    case DataType::kUINT8: return "uint8";
    case DataType::kFP8: return "fp8";
    default: return "another type";
  }
}

bool allows(Kind kind, DataType type) {
  const bool wide = type == DataType::kFLOAT || type == DataType::kHALF;
  switch (kind) {
    case Kind::kActivation: return wide || type == DataType::kBF16;
    case Kind::kSlots: return type == DataType::kINT32;
    case Kind::kWeight:
      return wide || type == DataType::kBF16 || type == DataType::kINT8 || type == DataType::kFP8;
    case Kind::kGram: return wide;
    case Kind::kFloat: return type == DataType::kFLOAT;
    case Kind::kFlag: return type == DataType::kBOOL;
  }
  return false;
}

#undef DACO_TRY

}  // namespace daco::tensorrt
