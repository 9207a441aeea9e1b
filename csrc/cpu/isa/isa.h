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
// Returns the highest target that both this machine and this build support.
Isa detected_isa();
// Returns detected_isa(), lowered by MOE_OPS_CPU_ISA if that is set, and to a target that passes
// its self-test; decided once.
Isa active_isa();
// Returns the names of all targets up to the detected one.
MOE_OPS_API std::vector<std::string> supported_isas();
// Returns an empty string, or a message about a value of MOE_OPS_CPU_ISA that is not supported or a
// target that failed its self-test.
std::string isa_warning();
// Returns nullptr, or the name of a kernel of this target whose results differ from the portable
// one's. For tests, entry number `broken` of its tables does nothing.
MOE_OPS_API const char* failing_kernel(Isa isa, int64_t broken = -1);
// Returns the numbers of the table entries that are functions which affect results.
MOE_OPS_API std::vector<int64_t> kernel_entries(Isa isa);

}  // namespace moe_ops::cpu
