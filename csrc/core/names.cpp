// The text of attributes, both ways.
#include <cstring>

#include "core/steer.h"

namespace daco {
namespace {

template <class E>
struct Name {
  const char* text;
  E value;
};

constexpr Name<SaeCoder> kSaeCoders[] = {{"topk", SaeCoder::kTopK},
                                         {"relu", SaeCoder::kRelu},
                                         {"jumprelu", SaeCoder::kJumpRelu},
                                         {"none", SaeCoder::kNone}};
constexpr Name<PursuitCoder> kPursuitCoders[] = {{"omp", PursuitCoder::kOmp},
                                                 {"elastic_net", PursuitCoder::kElasticNet}};
constexpr Name<PursuitSign> kPursuitSigns[] = {{"positive", PursuitSign::kPositive},
                                               {"signed", PursuitSign::kSigned},
                                               {"nnls", PursuitSign::kNonNegative}};
constexpr Name<AffinePhi> kAffinePhis[] = {
    {"identity", AffinePhi::kIdentity}, {"relu", AffinePhi::kRelu}, {"clamp", AffinePhi::kClamp}};
constexpr Name<Isa> kIsas[] = {
    {"auto", Isa::kAuto}, {"scalar", Isa::kScalar}, {"avx2", Isa::kAvx2}, {"avx512", Isa::kAvx512}};

template <class E, size_t n>
const char* text_of(const Name<E> (&table)[n], E value) {
  for (const Name<E>& entry : table) {
    if (entry.value == value) return entry.text;
  }
  return "unknown";
}

template <class E, size_t n>
bool value_of(const Name<E> (&table)[n], const char* text, E* value) {
  if (text == nullptr) return false;
  for (const Name<E>& entry : table) {
    if (std::strcmp(entry.text, text) == 0) {
      *value = entry.value;
      return true;
    }
  }
  return false;
}

}  // namespace

const char* name_of(SaeCoder coder) { return text_of(kSaeCoders, coder); }
const char* name_of(PursuitCoder coder) { return text_of(kPursuitCoders, coder); }
const char* name_of(PursuitSign sign) { return text_of(kPursuitSigns, sign); }
const char* name_of(AffinePhi phi) { return text_of(kAffinePhis, phi); }
const char* name_of(Isa isa) { return text_of(kIsas, isa); }

bool parse(const char* text, SaeCoder* coder) { return value_of(kSaeCoders, text, coder); }
bool parse(const char* text, PursuitCoder* coder) { return value_of(kPursuitCoders, text, coder); }
bool parse(const char* text, PursuitSign* sign) { return value_of(kPursuitSigns, text, sign); }
bool parse(const char* text, AffinePhi* phi) { return value_of(kAffinePhis, text, phi); }

}  // namespace daco
