// Parts that the TMA and wgmma kernels share: tiles in shared memory, tensor maps, products,
// softmax with base 2.
//
// A tile is rows of q, k, v or of a gradient as TMA boxes of 64 columns write them, with the
// 128-byte swizzle. wgmma reads the same bytes as rows (dense along the head) or as columns.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>

#include "cuda/grouped_gemm/tensor_map_4d.h"
#include "cuda/moa_attention/config.h"
#include "cuda/moa_attention/launch.cuh"
#include "cuda/moa_attention/not_finite.cuh"
#include "cuda/moa_attention/problem.cuh"
#include "cuda/moa_attention/scores.cuh"
#include "cuda/moa_attention/sm90.h"
#include "cuda/quad.cuh"
#include "cuda/runtime.h"

namespace moe_ops::cuda::attention {

template <DType type>
using Sm90Element =
    cute::conditional_t<type == DType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>;

constexpr int kWarpgroup = 128;
// 65536 registers: a producer warpgroup and two of consumers.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
constexpr int kSpan = 64;  // columns of a box: 128 bytes

template <class E, int kLines, int kColumns>
using RowsLayout = decltype(cute::tile_to_shape(
    cute::GMMA::Layout_K_SW128_Atom<E>{}, cute::Shape<cute::Int<kLines>, cute::Int<kColumns>>{},
    cute::Step<cute::_1, cute::_2>{}));
// Layout of a tile as [kColumns][kLines]; one of 32 columns has the 64-byte swizzle.
template <class E, int kLines, int kColumns>
using ColumnsLayout = decltype(cute::tile_to_shape(
    cute::conditional_t<kColumns == 32, cute::GMMA::Layout_MN_SW64_Atom<E>,
                        cute::GMMA::Layout_MN_SW128_Atom<E>>{},
    cute::Shape<cute::Int<kColumns>, cute::Int<kLines>>{}, cute::Step<cute::_2, cute::_1>{}));

template <class E, int kLines, int kColumns>
__device__ auto as_rows(E* tile) {
  return cute::make_tensor(cute::make_smem_ptr(tile), RowsLayout<E, kLines, kColumns>{});
}
template <class E, int kLines, int kColumns>
__device__ auto as_columns(E* tile) {
  return cute::make_tensor(cute::make_smem_ptr(tile), ColumnsLayout<E, kLines, kColumns>{});
}

// Products of one warpgroup: 64 x kN, depth kK.
template <class E, int kN, int kK, cute::GMMA::Major kA, cute::GMMA::Major kB>
using SharedMma = decltype(cute::make_tiled_mma(
    cute::GMMA::ss_op_selector<E, E, float, cute::Shape<cute::_64, cute::Int<kN>, cute::Int<kK>>,
                               kA, kB>()));
// With A in registers.
template <class E, int kN, int kK, cute::GMMA::Major kB>
using RegisterMma = decltype(cute::make_tiled_mma(
    cute::GMMA::rs_op_selector<E, E, float, cute::Shape<cute::_64, cute::Int<kN>, cute::Int<kK>>,
                               cute::GMMA::Major::K, kB>()));

template <class Mma, int kN>
__device__ auto accumulators() {
  return cute::partition_fragment_C(Mma{}, cute::Shape<cute::_64, cute::Int<kN>>{});
}

// Starts acc (+)= a b^T with both in shared memory: a [64][depth], b [kN][depth] as tensors.
template <class Mma, class A, class B, class Acc>
__device__ void start_product(const A& a, const B& b, Acc& acc, cute::GMMA::ScaleOut first) {
  Mma mma;
  auto slice = mma.get_slice(0);  // descriptors only: the same for every thread
  auto ta = slice.make_fragment_A(slice.partition_A(a));
  auto tb = slice.make_fragment_B(slice.partition_B(b));
  mma.accumulate_ = first;
#pragma unroll
  for (int k = 0; k < cute::size<2>(ta); ++k) {
    cute::gemm(mma, ta(cute::_, cute::_, k), tb(cute::_, cute::_, k), acc);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
}
// Starts a product with `a` in registers.
template <class Mma, class A, class B, class Acc>
__device__ void start_product_of_registers(const A& a, const B& b, Acc& acc) {
  Mma mma;
  auto slice = mma.get_slice(0);
  auto tb = slice.make_fragment_B(slice.partition_B(b));
  mma.accumulate_ = cute::GMMA::ScaleOut::One;
#pragma unroll
  for (int k = 0; k < cute::size<2>(a); ++k) {
    cute::gemm(mma, a(cute::_, cute::_, k), tb(cute::_, cute::_, k), acc);
  }
}

// Accumulators as a fragment: element 4 j + 2 i + c of a thread is column 8 j + 2 q + c of row
// g + 8 i.
template <class Acc>
__device__ auto& fragment(Acc& acc) {
  return *reinterpret_cast<
      Fragment<float, static_cast<int>(decltype(cute::size(acc))::value) / 4>*>(acc.data());
}

// Returns scores as the A operand of the next product: k step kk of 16 takes octets 2 kk and 2 kk +
// 1, and its element c + 2 i + 4 h is column c of octet h in row i, which is the order of
// accumulators.
template <class Mma, class E, int kKeys, class Acc>
__device__ auto as_operand(const Acc& acc) {
  auto out = cute::make_tensor<E>(
      cute::partition_shape_A(Mma{}, cute::Shape<cute::_64, cute::Int<kKeys>>{}));
  static_assert(decltype(cute::size(out))::value == decltype(cute::size(acc))::value);
  cutlass::NumericArrayConverter<E, float, 2> convert;
#pragma unroll
  for (int i = 0; i < cute::size(acc); i += 2) {
    cutlass::Array<float, 2> in;
    in[0] = acc(i);
    in[1] = acc(i + 1);
    const auto pair = convert(in);
    out(i) = pair[0];
    out(i + 1) = pair[1];
  }
  return out;
}

template <class E>
__device__ inline uint32_t pack_two(float lo, float hi) {
  cutlass::NumericArrayConverter<E, float, 2> convert;
  cutlass::Array<float, 2> in;
  in[0] = lo;
  in[1] = hi;
  auto out = convert(in);
  return reinterpret_cast<uint32_t&>(out);
}

// Stores row i of a fragment times a factor to `row` [8 kTiles], 16 bytes per thread; does nothing
// if `row` is nullptr.
template <class E, int kTiles>
__device__ void store_row(E* row, const Fragment<float, kTiles>& f, int i, float factor) {
  const int q = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int group = 0; group < kTiles / 4; ++group) {
    uint32_t r[4];
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      const float* v = f.v[4 * group + o] + 2 * i;
      r[o] = pack_two<E>(v[0] * factor, v[1] * factor);
    }
    quad_transpose(r);
    if (row != nullptr) {
      *reinterpret_cast<uint4*>(row + 32 * group + 8 * q) = make_uint4(r[0], r[1], r[2], r[3]);
    }
  }
}

// Sets scores of keys that rows do not see to `value`. It is separate from the use of the scores,
// since a predicate for each of them would not fit into registers.
template <int kTiles>
__device__ void mask_scores(Fragment<float, kTiles>& s, const Mask& mask, float value) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!mask.sees(e / 2, j, e % 2)) s.v[j][e] = value;
    }
  }
}
// Replaces scores by their tanh, 1 - 2 / (1 + 2^(2 log2(e) x)), off by up to 2^-22; `times` is what
// scores are multiplied by before, with 2 log2(e) in it. No branch, and every step is in the
// score's own register: ptxas works on many at once.
template <int kTiles>
__device__ void squash(Fragment<float, kTiles>& s, float times) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& x = s.v[j][e];
      float u;
      asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(u) : "f"(1.f + exp2_of(x * times)));
      x = fmaf(u, -2.f, 1.f);
    }
  }
}
// The share of a key with this logit is zero and leaves the stick whole, in fp32.
constexpr float kNoShare = -200.f;

// Softmax of scores times a positive number: maxima are those of the scores, and one
// multiply-add makes the exponent. Scores of -infinity get nothing.
struct SoftmaxBase2 {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};

  template <int kTiles>
  __device__ void step(Fragment<float, kTiles>& s, float times, float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float m = max[i];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) m = fmaxf(m, s.v[j][2 * i + c]);
      }
      m = quad_max(m);
      const float shift = m == -INFINITY ? 0.f : m * times;
      factor[i] = exp2_of(fmaf(max[i], times, -shift));
      max[i] = m;
      float total = sum[i] * factor[i];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s.v[j][2 * i + c];
          x = exp2_of(fmaf(x, times, -shift));
          total += x;
        }
      }
      sum[i] = total;
    }
  }
};

// Returns whether `value` is true in any of the consumers' threads, all of which call. `barrier`:
// the number of an otherwise unused barrier above 0.
__device__ inline bool any_consumer(bool value, int threads, int barrier = 1) {
  uint32_t out;
  asm volatile(
      "{ .reg .pred a, b; setp.ne.u32 a, %1, 0; barrier.cta.red.or.pred b, %3, %2, a; "
      "selp.u32 %0, 1, 0, b; }"
      : "=r"(out)
      : "r"(static_cast<uint32_t>(value)), "r"(threads), "r"(barrier)
      : "memory");
  return out != 0;
}

// A place in the ring: tile n is stage n % kStages.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Order in which the two consumer warpgroups issue MMAs: they alternate, so that one processes its
// scores while the other's MMAs run. Both issue equally often.
template <bool kOn>
struct MmaOrder {
  int group;
  __device__ void begin() const {
    if (group == 1) pass();
  }
  __device__ void wait() const {
    if constexpr (kOn) cutlass::arch::NamedBarrier::sync(2 * kWarpgroup, kFirst + group);
  }
  __device__ void pass() const {
    if constexpr (kOn) cutlass::arch::NamedBarrier::arrive(2 * kWarpgroup, kFirst + 1 - group);
  }
  // Takes what the other one passed last, which would stay with the barrier.
  __device__ void end() const {
    if (group == 0) wait();
  }

 private:
  static constexpr uint32_t kFirst = 1;  // of the barriers that CUTLASS leaves to kernels
};

// Returns whether `thread` of `threads` finds a non-finite value in its share of kCount elements of
// shared memory.
template <int kCount, class E>
__device__ bool has_not_finite(const E* tile, int thread, int threads) {
  constexpr uint32_t kExponents =
      cute::is_same_v<E, cutlass::bfloat16_t> ? 0x7f807f80u : 0x7c007c00u;
  bool any = false;
#pragma unroll 2
  for (int i = thread; i < kCount / 8; i += threads) {
    any |= any_not_finite<kExponents>(reinterpret_cast<const uint4*>(tile)[i]);
  }
  return any;
}
// Variant for a tile of kLines lines in spans of 64 columns; see fragments.cuh.
template <int kLines, int kColumns, class E, class Note>
__device__ void set_apart(E* tile, int thread, int threads, const Note& note) {
#pragma unroll 1
  for (int i = thread; i < kLines * kColumns; i += threads) {
    const float x = static_cast<float>(tile[i]);
    if (!not_finite(x)) continue;
    const int line = i / kSpan % kLines, chunk = i % kSpan / 8 ^ line % 8;
    note(line, i / kSpan / kLines * kSpan + 8 * chunk + i % 8, x);
    tile[i] = E(0.f);
  }
}

// ---- Tensor maps: rows of d elements, [d, rows, heads, batch] ----

// Boxes of kBox columns and kLines rows to shared memory, one after the other.
template <int kLines, int kColumns, int kBox = kSpan, class E>
__device__ void load_box(const CUtensorMap* map, cutlass::arch::ClusterTransactionBarrier& full,
                         E* tile, int line, Head head) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
#pragma unroll
  for (int s = 0; s < kColumns / kBox; ++s) {
    cute::SM90_TMA_LOAD_4D::copy(map, reinterpret_cast<uint64_t*>(&full), kHint,
                                 tile + s * kLines * kBox, s * kBox, line,
                                 static_cast<int>(head.head), static_cast<int>(head.batch));
  }
}

}  // namespace moe_ops::cuda::attention
