#include "cpu/isa/limits.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "moe_ops/common.h"
#include "moe_ops/platform.h"

namespace moe_ops::cpu {

namespace {

using Clock = std::chrono::steady_clock;
// Writes of results that nobody reads: the loops must not be optimized away.
volatile float float_sink;
volatile uint64_t int_sink;
// Read at run time: of a constant the compiler would see that the chain that starts at 1 stays
// there, and would drop it.
volatile float decay = 0.999f;
// Prefetch distance, in bytes.
constexpr size_t kReadAhead = 1024;
constexpr size_t kHugePage = size_t{2} << 20;

// kChains independent sums: at least latency x units, 4 x 2, and few enough to stay in registers.
#define MOE_FMA_LOOP(name, target, vec_bytes, chains)                                          \
  target int64_t name(int64_t steps) {                                                         \
    typedef float Vec __attribute__((vector_size(vec_bytes)));                                 \
    const Vec a = Vec{} + decay, b = 1.0f - a;                                                 \
    Vec sums[chains];                                                                          \
    for (int c = 0; c < chains; ++c) sums[c] = Vec{} + static_cast<float>(c);                  \
    for (int64_t i = 0; i < steps; ++i) {                                                      \
      _Pragma("GCC unroll 32") for (int c = 0; c < chains; ++c) { sums[c] = sums[c] * a + b; } \
    }                                                                                          \
    for (int c = 0; c < chains; ++c) float_sink = sums[c][0];                                  \
    return steps * chains * (vec_bytes / 4) * 2;                                               \
  }

// Four interleaved streams, a line of each at a time: one stream alone leaves a fifth of the
// bandwidth unused. `ahead`: prefetch distance, which helps some processors and hinders others.
#define MOE_READ_LOOP(name, target, vec_bytes)                                 \
  template <size_t ahead>                                                      \
  target uint64_t name(const char* data, size_t bytes) {                       \
    typedef uint64_t Vec __attribute__((vector_size(vec_bytes), may_alias));   \
    const size_t part = bytes / 4;                                             \
    Vec sums[4] = {};                                                          \
    for (size_t i = 0; i < part; i += 64) {                                    \
      _Pragma("GCC unroll 4") for (size_t s = 0; s < 4; ++s) {                 \
        if (ahead != 0) __builtin_prefetch(data + s * part + i + ahead, 0, 2); \
        _Pragma("GCC unroll 4") for (size_t v = 0; v < 64; v += vec_bytes) {   \
          sums[s] |= *reinterpret_cast<const Vec*>(data + s * part + i + v);   \
        }                                                                      \
      }                                                                        \
    }                                                                          \
    const Vec all = sums[0] | sums[1] | sums[2] | sums[3];                     \
    return all[0];                                                             \
  }

#define MOE_NO_TARGET
MOE_FMA_LOOP(fma_portable, MOE_NO_TARGET, 16, 13)
MOE_READ_LOOP(read_portable, MOE_NO_TARGET, 16)

#if defined(__x86_64__)
#define MOE_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)  // does not know the width here, and does not narrow vectors of 64 bytes
#define MOE_AVX512 __attribute__((target("avx512f,avx512bw")))
#else
#define MOE_AVX512 __attribute__((target("avx512f,avx512bw,prefer-vector-width=512")))
#endif
#define MOE_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512bf16")))
namespace avx2 {
MOE_FMA_LOOP(fma, MOE_AVX2, 32, 12)
MOE_READ_LOOP(read, MOE_AVX2, 32)
}  // namespace avx2
namespace avx512 {
MOE_FMA_LOOP(fma, MOE_AVX512, 64, 24)
MOE_READ_LOOP(read, MOE_AVX512, 64)
}  // namespace avx512

namespace avx512_bf16 {
// Runs instructions of 32 products per vector, each with its addition.
MOE_AVX512_BF16 int64_t dot(int64_t steps) {
  constexpr int kChains = 24;
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00), b = (__m512bh)_mm512_set1_epi16(0x3a00);
  __m512 sums[kChains];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < steps; ++i) {
    _Pragma("GCC unroll 32") for (int c = 0; c < kChains; ++c) {
      sums[c] = _mm512_dpbf16_ps(sums[c], a, b);
    }
  }
  for (const auto& sum : sums) float_sink = sum[0];
  return steps * kChains * 32 * 2;
}
}  // namespace avx512_bf16

#if defined(MOE_OPS_HAS_AMX)
namespace amx {
// Four 16 x 16 tiles of sums, each step a product with a depth of 32.
__attribute__((target("amx-tile,amx-bf16"))) int64_t dot(int64_t steps) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const config;
  alignas(64) static const char zeros[1024] = {};
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return steps * 4 * 16 * 16 * 32 * 2;
}
}  // namespace amx
#endif
#endif

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Rates of passes of about a millisecond.
std::vector<double> flop_rates(int64_t (*loop)(int64_t), double seconds) {
  int64_t steps = 1000;
  for (;;) {
    const auto start = Clock::now();
    loop(steps);
    if (seconds_since(start) > 1e-3) break;
    steps *= 2;
  }
  std::vector<double> rates;
  for (const auto begin = Clock::now(); rates.size() < 3 || seconds_since(begin) < seconds;) {
    const auto start = Clock::now();
    const int64_t operations = loop(steps);
    rates.push_back(static_cast<double>(operations) / seconds_since(start));
  }
  return rates;
}

// Returns the rates of the faster of two loops, which alternate.
using ReadLoop = uint64_t (*)(const char*, size_t);
std::vector<double> read_rates(std::array<ReadLoop, 2> loops, size_t bytes, double seconds) {
  const size_t mapped = round_up(bytes, kHugePage);
  bytes = round_up<size_t>(bytes, 256);  // four streams of whole lines
  char* data = static_cast<char*>(allocate_aligned(kHugePage, mapped));
  if (data == nullptr) return {};
#if defined(__linux__)
  madvise(data, mapped, MADV_HUGEPAGE);
#endif
  std::memset(data, 1, bytes);
  std::array<std::vector<double>, 2> rates;
  const auto begin = Clock::now();
  for (size_t i = 0; i < 6 || seconds_since(begin) < seconds; ++i) {
    const auto start = Clock::now();
    int_sink = loops[i % 2](data, bytes);
    rates[i % 2].push_back(static_cast<double>(bytes) / seconds_since(start));
  }
  free_aligned(data);
  const auto median = [](std::vector<double> v) {
    std::nth_element(v.begin(), v.begin() + v.size() / 2, v.end());
    return v[v.size() / 2];
  };
  return rates[median(rates[1]) > median(rates[0])];
}

}  // namespace

Limits measure_limits(Isa isa, size_t bytes, double seconds) {
  auto fma = fma_portable;
  std::array<ReadLoop, 2> read = {read_portable<0>, read_portable<kReadAhead>};
  int64_t (*dot)(int64_t) = nullptr;
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) {
    fma = avx512::fma;
    read = {avx512::read<0>, avx512::read<kReadAhead>};
  } else if (isa == Isa::kAvx2) {
    fma = avx2::fma;
    read = {avx2::read<0>, avx2::read<kReadAhead>};
  }
  if (isa >= Isa::kAvx512Bf16) dot = avx512_bf16::dot;
#if defined(MOE_OPS_HAS_AMX)
  if (isa == Isa::kAmx) dot = amx::dot;
#endif
#endif
  Limits limits;
  limits.fp32_flops = flop_rates(fma, seconds);
  // Without pairs, halves are widened and multiplied in fp32.
  limits.bf16_flops = dot == nullptr ? limits.fp32_flops : flop_rates(dot, seconds);
  limits.read_bytes = read_rates(read, bytes, seconds);
  return limits;
}

}  // namespace moe_ops::cpu
