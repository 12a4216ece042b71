// Binds the tensors of a host framework to the core's structs. Adapters describe each tensor by an
// Operand, in the order of the operator contract; what its shape and element type must be is said here
// once, so that every framework refuses the same mistakes in the same words.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/steer.h"

namespace daco::adapters {

enum class Element : uint8_t { kF32, kF16, kBF16, kI8, kF8E4M3, kI32, kBool, kOther };

// One tensor, contiguous unless the adapter sets a stride afterwards. An absent tensor is one without
// elements.
struct Operand {
  const void* data = nullptr;
  Element element = Element::kOther;
  const int64_t* shape = nullptr;
  size_t rank = 0;
  const char* element_name = "?";  // as the framework spells it, for messages

  int64_t count() const {
    if (shape == nullptr) return 0;
    int64_t n = 1;
    for (size_t i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
};

enum SaeInput : size_t {
  kSaeZ,
  kSaeSlots,
  kSaeEnc,
  kSaeEncBias,
  kSaeDec,
  kSaeThreshold,
  kSaeGain,
  kSaeBoost,
  kSaeUndesirable,
  kSaeShift,
  kSaeLimits,
  kSaeScales,
  kSaeInputs
};

enum PursuitInput : size_t {
  kPursuitZ,
  kPursuitSlots,
  kPursuitAnalysis,
  kPursuitBias,
  kPursuitGram,
  kPursuitAtoms,
  kPursuitGain,
  kPursuitBoost,
  kPursuitUndesirable,
  kPursuitShift,
  kPursuitLimits,
  kPursuitScales,
  kPursuitInputs
};

enum AffineInput : size_t {
  kAffineZ,
  kAffineSlots,
  kAffineA,
  kAffineABias,
  kAffineB,
  kAffineShift,
  kAffineLimits,
  kAffineInputs
};

// Whether an input may be left out; the same answer for the schema of every framework.
constexpr bool is_optional(SaeInput i) { return i == kSaeThreshold || i == kSaeBoost || i == kSaeScales; }
constexpr bool is_optional(PursuitInput i) {
  return i == kPursuitGram || i == kPursuitBoost || i == kPursuitScales;
}
constexpr bool is_optional(AffineInput) { return false; }

// Checks shapes and element types and fills sizes, dtypes and pointers of the inputs. The caller sets the
// attributes before (k is checked against m) and the outputs after.
Status bind(const Operand (&inputs)[kSaeInputs], SteerSae* op);
Status bind(const Operand (&inputs)[kPursuitInputs], SteerPursuit* op);
Status bind(const Operand (&inputs)[kAffineInputs], SteerAffine* op);

// What a Gram matrix is made of: two matrices of equal shape [m, d] and element type, and the scales [2, m]
// of quantised ones.
struct GramOperands {
  const void* analysis;
  const void* atoms;
  DType weight;
  const float* scales;
  int64_t m;
  int64_t d;
};
Status bind_gram(const Operand& analysis, const Operand& atoms, const Operand& scales, GramOperands* gram);

// Read attributes that are text; the message lists what is known.
Status parse_attribute(const char* op, const char* text, SaeCoder* coder);
Status parse_attribute(const char* op, const char* text, PursuitCoder* coder);
Status parse_attribute(const char* op, const char* text, PursuitSign* sign);
Status parse_attribute(const char* op, const char* text, AffinePhi* phi);
// Attributes that count: in [low, int32 max].
Status check_count(const char* op, const char* name, int64_t value, int32_t low, int32_t* out);

}  // namespace daco::adapters
