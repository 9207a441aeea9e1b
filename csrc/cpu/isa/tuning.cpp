#include "cpu/isa/tuning.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace moe_ops::cpu {

namespace {

// Sapphire Rapids; for all of Intel's. The measurements are in NOTES.md.
constexpr Tuning kIntel = {
    // A vdpbf16ps starts every other cycle: 16 multiply-adds a cycle, where two fp32 FMAs are 32.
    // Up to 8 rows memory is the limit, and pairs need no widening.
    .bf16_max_rows = 8,
    // A DRAM latency is longer than the core's window of loads, and the L3 is a mesh away.
    .stream_distance = 4096,
    .stream_min_bytes = int64_t{8} << 20,
    .avx2_prefetches_streams = true,
    // Memory delivers two runs of lines faster than one.
    .prefetch_halves = true,
    .stream_rows = 3,
    // 128 rows of 2048 features are 1 MiB of fp32, half of its L2.
    .packed_max_rows = 128,
    .gemv_distance = 2048,
    .avx2_gemv_max_rows = 8,
    .blocked_max_rows = 28,
    // 512 steps of six tokens and four weight rows are 20 KiB of an L1 of 48.
    .blocked_k = 512,
    .blocked_one_pass_min_depth = Tuning::kNoLimit,
    .outer_one_pass = false,
};

// Zen 4; for all others as well.
constexpr Tuning kZen4 = {
    // vdpbf16ps does 32 multiply-adds a cycle, an fp32 FMA 16.
    .bf16_max_rows = Tuning::kNoLimit,
    // Its prefetchers follow a stream well; only weights beyond the L3 of 32 MiB gain.
    .stream_distance = 1024,
    .stream_min_bytes = int64_t{32} << 20,
    .avx2_prefetches_streams = false,
    .prefetch_halves = false,
    .stream_rows = 5,
    .packed_max_rows = 128,
    // A second pass hits the L2, and memory waits for the first pass of the next weight rows.
    .gemv_distance = 8192,
    .avx2_gemv_max_rows = 4,
    .blocked_max_rows = Tuning::kNoLimit,
    .blocked_k = Tuning::kNoLimit,
    .blocked_one_pass_min_depth = 512,
    .outer_one_pass = true,
};

bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
}

// Returns whether the L2 is smaller than 1.5 MiB.
bool has_small_l2() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return l2 > 0 && l2 < (int64_t{3} << 19);
#else
  return false;
#endif
}

}  // namespace

const Tuning& tuning_of(bool intel) { return intel ? kIntel : kZen4; }

const Tuning& tuning() {
  static const Tuning t = [] {
    Tuning r = tuning_of(is_intel());
    if (has_small_l2()) r.packed_max_rows = 72;  // of 2048 features: 576 KiB of an L2 of 1 MiB
    return r;
  }();
  return t;
}

}  // namespace moe_ops::cpu
