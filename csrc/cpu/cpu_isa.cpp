#include "cpu/cpu_isa.h"

#include <cstdlib>
#include <cstring>

namespace moe_ops::cpu {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};
constexpr int kNumIsas = 4;

struct Choice {
  Isa isa;
  std::string warning;
};

Choice choose() {
  const Isa best = detected_isa();
  const char* wanted = std::getenv("MOE_OPS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return {best, ""};
  for (int i = 0; i < kNumIsas; ++i) {
    if (std::strcmp(wanted, kNames[i]) != 0) continue;
    if (i <= static_cast<int>(best)) return {static_cast<Isa>(i), ""};
    return {best, std::string("MOE_OPS_CPU_ISA=") + wanted + " is not available here; using " +
                      isa_name(best) + "."};
  }
  return {best, std::string("MOE_OPS_CPU_ISA=") + wanted +
                    " is not one of portable, avx2, avx512, avx512_bf16; using " + isa_name(best) +
                    "."};
}

const Choice& choice() {
  static const Choice c = choose();
  return c;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa detected_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    // __builtin_cpu_supports also asks the operating system (XGETBV) about the wide registers.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (!avx2) return Isa::kPortable;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx512) return Isa::kAvx2;
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }();
  return isa;
#else
  return Isa::kPortable;
#endif
}

Isa active_isa() { return choice().isa; }

std::string isa_warning() { return choice().warning; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(detected_isa()); ++i) names.emplace_back(kNames[i]);
  return names;
}

}  // namespace moe_ops::cpu
