// What planning and running must agree on.
#pragma once

#include "core/steer.h"

namespace daco {
namespace cpu {

constexpr int32_t kMaxThreads = 256;

int clamp_threads(int threads);  // into [1, kMaxThreads]

// Refuses valid requests that these kernels do not serve.
Status check_supported(const SteerSae& op);
Status check_supported(const SteerPursuit& op);

// Refuses dtypes of weights that have no CPU kernel.
Status check_weights(const char* op, DType weight);

size_t workspace_bytes(const SteerSae& op, int threads);
size_t workspace_bytes(const SteerPursuit& op, int threads);

}  // namespace cpu
}  // namespace daco
