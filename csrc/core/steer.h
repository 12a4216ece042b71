// The public face of the core: the operands of the steering operators, how a call is planned and
// checked, and the launchers. Adapters fill these structs and nothing else.
//
// Letters: T rows, d width, m atoms (SAE latents or dictionary atoms), P policies, k support size.
// All matrices are row-major with contiguous rows. Sizes and strides are 64-bit, counted in elements.
// The meaning of every operand, and of the result for every kind of row, is defined by the float64
// reference in python/daco_rt/ops/reference.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/executor.h"
#include "core/status.h"

namespace daco {

// Slots with a fixed meaning; from kFirstPolicy on a slot is a loaded policy.
constexpr int32_t kSlotOff = 0;
constexpr int32_t kSlotObserve = 1;
constexpr int32_t kFirstPolicy = 2;

// Columns of `limits` [P, 4].
enum Limit : int { kDeadband = 0, kMaxDose = 1, kKeepNorm = 2, kReserved = 3, kLimits = 4 };

// Largest support of the pursuit coders: the k x k Cholesky factor stays in a thread's cache.
constexpr int32_t kMaxPursuit = 64;

// Rows in, rows out, and everything that does not depend on the coder.
struct Rows {
  int64_t rows = 0;      // T
  int64_t dim = 0;       // d
  int64_t atoms = 0;     // m
  int64_t policies = 0;  // P, slots 0 and 1 included
  int32_t k_out = 0;     // width of the reported support; 0 reports none

  DType activation = DType::kF32;
  const void* z = nullptr;  // [T, d], row stride z_stride
  int64_t z_stride = 0;
  void* out = nullptr;  // [T, d], row stride out_stride; may be z itself, must not overlap it otherwise
  int64_t out_stride = 0;
  const int32_t* slots = nullptr;  // [T]

  DType weight = DType::kF32;  // of the two big matrices
  // [2, m] per-atom scales of int8 and fp8 weights, else null: row 0 multiplies the rows of the encoder or
  // analysis matrix, row 1 those of the decoder or atoms.
  const float* scales = nullptr;
  const float* gain = nullptr;           // [P, m]
  const float* boost = nullptr;          // [P, m] or null (all zero)
  const uint8_t* undesirable = nullptr;  // [P, m], 0 or 1
  const float* shift = nullptr;          // [P, d]
  const float* limits = nullptr;         // [P, 4]

  float* doses = nullptr;            // [T, 2] removed, applied
  int32_t* support_index = nullptr;  // [T, k_out], null when k_out is 0
  float* support_value = nullptr;    // [T, k_out], null when k_out is 0
};

enum class SaeCoder : int32_t { kTopK = 0, kRelu = 1, kJumpRelu = 2, kNone = 3 };

struct SteerSae : Rows {
  SaeCoder coder = SaeCoder::kTopK;
  int32_t k = 0;                     // topk only
  const void* enc = nullptr;         // [m, d]
  const float* enc_bias = nullptr;   // [m]
  const void* dec = nullptr;         // [m, d]
  const float* threshold = nullptr;  // [m], jumprelu only
};

enum class PursuitCoder : int32_t { kOmp = 0, kElasticNet = 1 };
enum class PursuitSign : int32_t { kPositive = 0, kSigned = 1, kNonNegative = 2 };

struct SteerPursuit : Rows {
  PursuitCoder coder = PursuitCoder::kOmp;
  PursuitSign sign = PursuitSign::kPositive;
  int32_t k = 0;
  float tol = 0.f;                 // relative residual norm at which pursuit stops; 0 is off
  float tau = 0.95f;               // elastic net: share of the L1 term
  float alpha = 0.05f;             // elastic net: strength
  const void* analysis = nullptr;  // E [m, d]
  const float* bias = nullptr;     // [m]
  const void* gram = nullptr;      // G = E A' [m, m], or null: correlations are recomputed at each step
  DType gram_dtype = DType::kF32;  // fp32 or fp16
  const void* atoms = nullptr;     // A [m, d]
};

enum class AffinePhi : int32_t { kIdentity = 0, kRelu = 1, kClamp = 2 };

// z' = z + B[p] phi(A[p] z + a[p]) + shift[p]: the dose cap and norm keeping of `limits` apply, the deadband
// does not. Of Rows it has no atoms, tables of codes, scales or support: atoms is r, k_out is 0, the pointers
// are null.
struct SteerAffine : Rows {
  AffinePhi phi = AffinePhi::kIdentity;
  float low = 0.f;                // clamp only: phi(x) = min(max(x, low), high)
  float high = 0.f;               // clamp only
  const void* a = nullptr;        // [P, r, d]
  const float* a_bias = nullptr;  // [P, r]
  const void* b = nullptr;        // [P, d, r]
};

// Instruction sets of the CPU kernels, in rising order. kAuto takes the best that the machine has.
enum class Isa : int32_t { kAuto = -1, kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// How a call will run: decided from sizes and dtypes alone, so it can be kept while they stay the same.
struct Plan {
  size_t workspace_bytes = 0;  // aligned to 64; 0 needs none
  Isa isa = Isa::kScalar;
  int threads = 1;
  const char* variant = "";  // static string: which algorithm runs
  const char* reason = "";   // static string: why that one
};

// Checks sizes, dtypes, attributes and pointers; never reads an operand. The message names the operand,
// what was expected and what came.
Status validate(const SteerSae& op);
Status validate(const SteerPursuit& op);
Status validate(const SteerAffine& op);

const char* name_of(SaeCoder coder);
const char* name_of(PursuitCoder coder);
const char* name_of(PursuitSign sign);
const char* name_of(AffinePhi phi);
const char* name_of(Isa isa);
// Parse an attribute's text; return false if it names no coder, sign or phi.
bool parse(const char* text, SaeCoder* coder);
bool parse(const char* text, PursuitCoder* coder);
bool parse(const char* text, PursuitSign* sign);
bool parse(const char* text, AffinePhi* phi);

namespace cpu {

Isa best_isa();  // of this machine, after the environment variable DACO_RT_ISA (scalar, avx2, avx512)

// Pure functions of sizes, dtypes, attributes and thread count. Refuse what validate() refuses, pointers
// apart.
Status plan(const SteerSae& op, int threads, Plan* plan, Isa isa = Isa::kAuto);
Status plan(const SteerPursuit& op, int threads, Plan* plan, Isa isa = Isa::kAuto);
Status plan(const SteerAffine& op, int threads, Plan* plan, Isa isa = Isa::kAuto);

// Run a planned call. No allocation, no global state; the workspace is the caller's, 64-byte aligned, at
// least plan.workspace_bytes, and may be dirty. Results do not depend on the number of threads.
Status steer(const SteerSae& op, const Plan& plan, void* workspace, const Executor& executor);
Status steer(const SteerPursuit& op, const Plan& plan, void* workspace, const Executor& executor);
Status steer(const SteerAffine& op, const Plan& plan, void* workspace, const Executor& executor);

// gram[i, j] = sum_d analysis[i, d] * atoms[j, d] (times scales, [2, m], of int8 weights, else null),
// accumulated in fp32, stored as fp32 or fp16. [m, m]
Status build_gram(const void* analysis, const void* atoms, DType weight, const float* scales, int64_t m,
                  int64_t d, void* gram, DType gram_dtype, const Executor& executor, Isa isa = Isa::kAuto);

}  // namespace cpu
}  // namespace daco
