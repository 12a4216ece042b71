// Which table of kernels runs: decided at run time from the processor, the system and DACO_RT_ISA.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "cpu/kernels.h"

namespace daco {
namespace cpu {
namespace {

Isa machine_best() {
  if (has(Isa::kAvx512)) return Isa::kAvx512;
  if (has(Isa::kAvx2)) return Isa::kAvx2;
  return Isa::kScalar;
}

// False when the variable is set to something that is no instruction set.
bool from_environment(Isa* isa) {
  *isa = Isa::kAuto;
  const char* text = std::getenv("DACO_RT_ISA");
  if (text == nullptr || text[0] == '\0') return true;
  for (Isa candidate : {Isa::kAuto, Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(text, name_of(candidate)) == 0) {
      *isa = candidate;
      return true;
    }
  }
  return false;
}

}  // namespace

bool has(Isa isa) {
  switch (isa) {
    case Isa::kAuto:
    case Isa::kScalar: return true;
#if defined(__x86_64__)
    // The builtin also asks the operating system whether it saves the wider registers.
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    default: return false;
  }
}

const Kernels& kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return kAvx512Kernels;
  if (isa == Isa::kAvx2) return kAvx2Kernels;
#endif
  (void)isa;
  return kScalarKernels;
}

Isa best_isa() {
  Isa wanted;
  return from_environment(&wanted) && wanted != Isa::kAuto && has(wanted) ? wanted : machine_best();
}

Status resolve(Isa asked, Isa* isa) {
  const char* who = "isa";
  if (asked == Isa::kAuto) {
    who = "DACO_RT_ISA";
    if (!from_environment(&asked)) {
      return make_status(Code::kInvalidArgument,
                         "DACO_RT_ISA: expected auto, scalar, avx2 or avx512, got '%.40s'",
                         std::getenv("DACO_RT_ISA"));
    }
  }
  if (asked < Isa::kAuto || asked > Isa::kAvx512) {
    return make_status(Code::kInvalidArgument, "isa: expected auto, scalar, avx2 or avx512 (-1 to 2), got %d",
                       static_cast<int>(asked));
  }
  if (!has(asked)) {
    return make_status(Code::kUnsupported, "%s: %s was asked for, but this machine's best is %s", who,
                       name_of(asked), name_of(machine_best()));
  }
  *isa = asked == Isa::kAuto ? machine_best() : asked;
  return {};
}

}  // namespace cpu
}  // namespace daco
