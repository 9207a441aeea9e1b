#include "cpu/isa/isa.h"

#include <cstdlib>
#include <cstring>
#include <limits>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(MOE_OPS_HAS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#endif

namespace moe_ops::cpu {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr int kNumIsas = 5;

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
                    " is not one of portable, avx2, avx512, avx512_bf16, amx; using " +
                    isa_name(best) + "."};
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
// Two features that __builtin_cpu_supports of Clang 14 does not know by name. Their registers are
// those of AVX2 and of AVX-512.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & 1u << 29) != 0;
}

bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1u << 5) != 0;
}
#endif

// AMX with bfloat16, and the leave to use its 8 KiB of registers, which Linux grants a process on
// request.
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
    // Every processor with the former has the latter; a virtual machine may hide it.
    const bool bf16 = has_avx512_bf16() && __builtin_cpu_supports("avx512vnni");
    if (!bf16) return Isa::kAvx512;
    return has_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
  }();
  return isa;
#else
  return Isa::kPortable;
#endif
}

namespace {

bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
}

// Below 1.5 MiB.
bool has_small_l2() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return l2 > 0 && l2 < (int64_t{3} << 19);
#else
  return false;
#endif
}

}  // namespace

const Tuning& tuning() {
  static const Tuning t = [] {
    const bool intel = is_intel();
    Tuning r = {};
    // Intel's cores start one every other cycle: 16 multiply-adds a cycle, where two fp32 FMAs are
    // 32 (measured on Sapphire Rapids: 76 and 142 GFLOP/s). AMD's (Zen 4) do 32, where an fp32 FMA
    // is 16. Up to 8 rows memory is the limit, and pairs need no widening.
    r.pairs_max_rows = intel ? 8 : std::numeric_limits<int64_t>::max();
    // Sapphire Rapids: 1.05 to 1.2 times as fast with 4 KiB; from L3 1 to 4 % slower, but the banks
    // of a model's other layers are not there then. Zen 4, huge pages: 1.05 to 1.15 times as fast
    // with 1 KiB (2 KiB 0.75 to 0.95), from its L3 of 32 MiB 0.9.
    r.stream_ahead = intel ? 4096 : 1024;
    r.stream_ahead_bank = int64_t{intel ? 8 : 32} << 20;
    // Zen 4: fp32 1.07 with one row, 0.96 with more; bfloat16 0.95.
    r.avx2_streams_ahead = intel;
    // Sapphire Rapids: 1.03 to 1.1 times as fast. Zen 4 with 10 rows an expert: 0.75.
    r.fetch_halves = intel;
    // Zen 4 with 4 rows an expert: 1.27 times as fast as tiles that ask ahead, with 5 1.08, with 6
    // 0.85. Not measured on Intel's, whose streams ask ahead themselves.
    r.stream_rows = intel ? 3 : 5;
    // 128 tokens of 2048 features are 1 MiB of fp32. Zen 4, an L2 of 1 MiB, 128 rows an expert: 72
    // rows at once 1.05 times as fast in fp32, 1.03 to 1.09 in bfloat16.
    r.panel_rows = has_small_l2() ? 72 : 128;
    // Zen 4, fp32, AVX-512: 4 KiB 1.15 and 8 KiB 1.2 times as fast as 2 with 6 and 8 rows an
    // expert, and level with fewer.
    r.dot_ahead = intel ? 2048 : 8192;
    // Zen 4, AVX2, 5 to 8 rows: strips are 1.3 to 1.45 times as fast.
    r.dot_rows_by_two = intel ? 8 : 4;
    // Zen 4, K = 768 to 2048: 32 rows 1.02 to 1.19 times as fast as transposed, AVX-512 level from
    // 64 to 96 on, AVX2 from 48. Sapphire Rapids: level at 28.
    r.strip_max_rows = intel ? 28 : std::numeric_limits<int64_t>::max();
    // Zen 4, AVX-512: 2048 are 1.01 to 1.06 times as fast as 512; AVX2: 768 1.0 to 1.03, 1024 0.97.
    r.strip_block = intel ? 512 : std::numeric_limits<int64_t>::max();
    // Zen 4, fp32 from memory: one pass of strips instead of two of dot, K = 512 1.08 to 1.19, K =
    // 768 to 2048 1.12 to 1.3 times as fast; from L3 K = 512 0.94 to 1.0, 256 0.8 to 0.95.
    r.strip_one_pass_depth = intel ? std::numeric_limits<int64_t>::max() : 512;
    // Zen 4: tiles on weight rows as they lie are 1.1 to 1.45 times as fast in fp32 with AVX2 and 3
    // to 8 rows, 1.05 to 1.25 with AVX-512 and 5 to 7. Not measured on Intel's.
    r.rank_one_pass = !intel;
    return r;
  }();
  return t;
}

Isa active_isa() { return choice().isa; }

std::string isa_warning() { return choice().warning; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(detected_isa()); ++i) names.emplace_back(kNames[i]);
  return names;
}

}  // namespace moe_ops::cpu
