// What every launcher does before and around its work.
#pragma once

#include "cpu/kernels.h"

namespace daco {
namespace cpu {

inline const char* row_of(const Rows& op, int64_t t) {
  return static_cast<const char*>(op.z) + t * op.z_stride * static_cast<int64_t>(size_of(op.activation));
}

// Settles rows that are off, broken, out of range, or only observed where nothing is `coded`, and says
// whether this is not one of them.
bool needs_code(const Rows& op, const Kernels& kernels, bool coded, int64_t t);

Status check_plan(const char* op, const Plan& plan);
Status check_workspace(const char* op, const Plan& plan, size_t needed, const void* workspace);

}  // namespace cpu
}  // namespace daco
