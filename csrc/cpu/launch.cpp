#include "cpu/launch.h"

#include <limits>

#include "cpu/edit.h"
#include "cpu/plan.h"

namespace daco {
namespace cpu {

bool needs_code(const Rows& op, const Kernels& kernels, bool coded, int64_t t) {
  const int32_t slot = op.slots[t];
  if (slot < 0 || slot >= op.policies) {
    fill_row_with_nan(op, t);
    report_nothing(op, t, std::numeric_limits<float>::quiet_NaN());
    return false;
  }
  float dose = 0;
  if (slot != kSlotOff) {
    if (kernels.of(op.activation).all_finite(row_of(op, t), op.dim)) {
      if (coded || slot >= kFirstPolicy) return true;
    } else {
      dose = std::numeric_limits<float>::quiet_NaN();
    }
  }
  copy_row(op, t);
  report_nothing(op, t, dose);
  return false;
}

Status check_plan(const char* op, const Plan& plan) {
  if (plan.isa < Isa::kScalar || !has(plan.isa)) {
    return make_status(Code::kUnsupported, "%s: the plan's instruction set %s does not run on this machine",
                       op, name_of(plan.isa));
  }
  if (plan.threads < 1 || plan.threads > kMaxThreads) {
    return make_status(Code::kInvalidArgument, "%s: the plan's threads: expected 1 to %d, got %d", op,
                       static_cast<int>(kMaxThreads), plan.threads);
  }
  return {};
}

Status check_workspace(const char* op, const Plan& plan, size_t needed, const void* workspace) {
  if (plan.workspace_bytes < needed) {
    return make_status(Code::kWorkspace,
                       "%s: workspace: this call needs %zu bytes, its plan has %zu; plan again", op, needed,
                       plan.workspace_bytes);
  }
  if (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % 64 != 0) {
    return make_status(Code::kWorkspace,
                       "%s: workspace: expected %zu bytes aligned to 64, got the pointer %p", op, needed,
                       workspace);
  }
  return {};
}

}  // namespace cpu
}  // namespace daco
