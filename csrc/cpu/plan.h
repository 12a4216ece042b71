// What planning and running must agree on.
#pragma once

#include "core/steer.h"

namespace daco {
namespace cpu {

// Refuses valid requests that these kernels do not serve.
Status check_supported(const SteerSae& op);
Status check_supported(const SteerPursuit& op);

size_t workspace_bytes(const SteerSae& op, int threads);
size_t workspace_bytes(const SteerPursuit& op, int threads);

}  // namespace cpu
}  // namespace daco
