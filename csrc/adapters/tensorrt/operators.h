// What each steering operator is to TensorRT: its inputs by name and kind, its attributes as plugin fields.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "adapters/operands.h"
#include "adapters/tensorrt/fields.h"

namespace daco::tensorrt {

constexpr const char* kNamespace = "ai.daco";
constexpr const char* kVersion = "1";

// Decides which element types an input may have.
enum class Kind : uint8_t { kActivation, kSlots, kWeight, kGram, kFloat, kFlag };

struct Input {
  const char* name;
  Kind kind;
  bool optional;
};

// Outputs, in order; an operator without codes has the first two.
enum Output : int32_t { kOutZ, kOutDoses, kOutIndex, kOutValue };

template <class Op>
struct Spec;

template <>
struct Spec<SteerSae> {
  static constexpr const char* kName = "SteerSae";
  static constexpr size_t kInputs = adapters::kSaeInputs;
  static constexpr int32_t kOutputs = 4;
  static const Input kInput[kInputs];
};

template <>
struct Spec<SteerPursuit> {
  static constexpr const char* kName = "SteerPursuit";
  static constexpr size_t kInputs = adapters::kPursuitInputs;
  static constexpr int32_t kOutputs = 4;
  static const Input kInput[kInputs];
};

template <>
struct Spec<SteerAffine> {
  static constexpr const char* kName = "SteerAffine";
  static constexpr size_t kInputs = adapters::kAffineInputs;
  static constexpr int32_t kOutputs = 2;
  static const Input kInput[kInputs];
};

// Attributes of the three operators; the names are those of the ONNX nodes.
Status read(const FieldReader& fields, SteerSae* op);
Status read(const FieldReader& fields, SteerPursuit* op);
Status read(const FieldReader& fields, SteerAffine* op);
void write(const SteerSae& op, FieldWriter* fields);
void write(const SteerPursuit& op, FieldWriter* fields);
void write(const SteerAffine& op, FieldWriter* fields);
void declare(const SteerSae&, FieldWriter* fields);
void declare(const SteerPursuit&, FieldWriter* fields);
void declare(const SteerAffine&, FieldWriter* fields);

// Which operands of the contract a node's inputs are, in their order. TensorRT hands a plugin a list without
// gaps, so a node that leaves optional operands out names the given ones in its attribute `operands`
// ("z,slots,enc,…"); without that attribute the inputs are the contract's first ones.
class Layout {
 public:
  // All operands of a contract, by position.
  static Layout positional(const Input* contract, size_t size);
  // Refuses unknown and repeated names, and the absence of a required one.
  static Status parse(const char* op, const std::string& names, const Input* contract, size_t size,
                      Layout* out);

  const std::vector<uint8_t>& places() const { return places_; }
  // Empty for a positional layout.
  const std::string& names() const { return names_; }
  bool accepts(int32_t inputs) const;

 private:
  std::vector<uint8_t> places_;
  std::string names_;
  size_t required_ = 0;  // positional: through the last operand that may not be left out
};

// Element types: TensorRT's, as the binder takes them, and whether an input of a kind may have one.
adapters::Element element_of(nvinfer1::DataType type);
const char* name_of(nvinfer1::DataType type);
bool allows(Kind kind, nvinfer1::DataType type);

}  // namespace daco::tensorrt
