// Which target, or instruction set, the CPU kernels use: the best one that this machine has, or a
// lower one named by the environment variable MOE_OPS_CPU_ISA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/isa/targets.h"
#include "moe_ops/platform.h"

namespace moe_ops::cpu {

enum class Isa : int {
#define MOE_ENUMERATOR(name, enumerator, has) enumerator,
  MOE_FOR_EACH_TARGET(MOE_ENUMERATOR)
#undef MOE_ENUMERATOR
};

const char* isa_name(Isa isa);
// The highest target that both this machine and this build have.
Isa detected_isa();
// detected_isa(), lowered by MOE_OPS_CPU_ISA if that is set, and to one that passes its
// self-test. Decided once.
Isa active_isa();
// Names of all targets up to the detected one.
MOE_OPS_API std::vector<std::string> supported_isas();
// Empty, or a sentence about a value of MOE_OPS_CPU_ISA that could not be followed or a target
// that failed its self-test.
std::string isa_warning();
// nullptr, or the kernel of this target that does not compute what the portable one does.
// For tests, entry number `broken` of its tables does nothing.
MOE_OPS_API const char* failing_kernel(Isa isa, int64_t broken = -1);
// The numbers of the entries that are functions without which numbers would be wrong.
MOE_OPS_API std::vector<int64_t> kernel_entries(Isa isa);

}  // namespace moe_ops::cpu
