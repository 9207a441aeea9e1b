#include "cpu/isa/isa.h"

#include <cstdlib>
#include <cstring>
#include <iterator>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(MOE_OPS_HAS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moe_ops::cpu {

namespace {

constexpr const char* kNames[] = {
#define MOE_NAME(name, enumerator, has) #name,
    MOE_FOR_EACH_TARGET(MOE_NAME)
#undef MOE_NAME
};

struct Choice {
  Isa isa;
  std::string warning;
};

Choice choose() {
  const Isa best = detected_isa();
  const char* wanted = std::getenv("MOE_OPS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return {best, ""};
  std::string problem = " is not one of ";
  for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i) {
    if (std::strcmp(wanted, kNames[i]) == 0) {
      if (i <= static_cast<int>(best)) return {static_cast<Isa>(i), ""};
      problem = " is not available here";
      break;
    }
    problem += std::string(i > 0 ? ", " : "") + kNames[i];
  }
  return {best,
          std::string("MOE_OPS_CPU_ISA=") + wanted + problem + "; using " + isa_name(best) + "."};
}

Choice choose_working() {
  Choice c = choose();
  while (c.isa != Isa::kPortable) {
    const char* kernel = failing_kernel(c.isa);
    if (kernel == nullptr) break;
    const Isa lower = static_cast<Isa>(static_cast<int>(c.isa) - 1);
    if (!c.warning.empty()) c.warning += " ";
    c.warning += std::string("The ") + isa_name(c.isa) + " kernels fail their self-test here (" +
                 kernel + "); using " + isa_name(lower) + ".";
    c.isa = lower;
  }
  return c;
}

const Choice& choice() {
  static const Choice c = choose_working();
  return c;
}

#if defined(__x86_64__)
// Return two features that __builtin_cpu_supports of Clang 14 does not support. Their registers are
// those of AVX2 and of AVX-512.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & 1u << 29) != 0;
}

bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1u << 5) != 0;
}

// Returns whether the processor has AMX with bfloat16, and requests permission to use its 8 KiB of
// registers from Linux.
bool has_amx() {
#if defined(MOE_OPS_HAS_AMX) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa detected_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    // __builtin_cpu_supports also asks the operating system (XGETBV) about the wide registers.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (!avx2) return Isa::kPortable;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx512) return Isa::kAvx2;
    // All processors with the first but Cooper Lake have the others; a virtual machine may hide
    // one.
    const bool bf16 = has_avx512_bf16() && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512vbmi");
    if (!bf16) return Isa::kAvx512;
    return has_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
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
