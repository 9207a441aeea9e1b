// Steps between the five GEMMs of backward: scores and products <grad_out, v> to weights and
// gradients of scores, and the handling of non-finite values.
#pragma once

#include "cuda/moa_attention/sm90_backward_chain.cuh"
#include "cuda/moa_attention/sm90_common.cuh"

namespace moe_ops::cuda::attention::sm90 {

// Returns this lane's address in a tile of scores, which has the layout that TMA writes: 64 rows by
// 64 keys. stmatrix takes a row's address from each lane: of octet 0 or 1 of rows 0 to 15 of the
// warp. Octets 2 m and 2 m + 1 lie at that address with m in its fifth bit.
__device__ inline uint32_t score_address(const void* tile) {
  const Consumer me;
  const int lane = me.lane(), line = me.warp() % 4 * 16 + lane % 16;
  return cute::cast_smem_ptr_to_uint(tile) + line * 2 * kSpan + (lane / 16 ^ line % 8) * 16;
}
// Stores two octets. v[h][i]: two elements of row i of octet 2 m + h.
__device__ __forceinline__ void store_octets(uint32_t address, int m, const uint32_t (&v)[2][2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(address ^ 32 * m), "r"(v[0][0]), "r"(v[0][1]), "r"(v[1][0]), "r"(v[1][1])
               : "memory");
}
template <class Element>
__device__ void store_scores(uint32_t address, const Fragment<float, 8>& f) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    uint32_t v[2][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        v[h][i] = pack_two<Element>(f.v[2 * m + h][2 * i], f.v[2 * m + h][2 * i + 1]);
      }
    }
    store_octets(address, m, v);
  }
}

// ---- Softmax ----

// Converts scores to weights; log_sum: base 2.
template <class Mask>
__device__ void weigh(Fragment<float, 8>& s, const Mask& mask, float times,
                      const float (&log_sum)[2]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float w = exp2_of(fmaf(s.v[j][e], times, -log_sum[e / 2]));
      s.v[j][e] = mask.sees(e / 2, j, e % 2) ? w : 0.f;
    }
  }
}
// Converts products to gradients of scores. Masked elements are set to zero, as zero times a
// non-finite value is NaN.
template <class Mask>
__device__ void softmax_gradient(const Fragment<float, 8>& w, Fragment<float, 8>& dp,
                                 const Mask& mask, const float (&delta)[2]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float g = w.v[j][e] * (dp.v[j][e] - delta[e / 2]);
      dp.v[j][e] = mask.sees(e / 2, j, e % 2) ? g : 0.f;
    }
  }
}

// ---- Stick-breaking: stick_gradient of scores.cuh, in an order that keeps two numbers a score
// ----

// Converts, from the last key to the first, logits to shares, products to weight times product,
// weights to the tile at `address`. Logits of keys that a row does not see are kNoShare: their
// share is zero, and so is what comes of them, whatever the row's sums are.
template <class Element>
__device__ void break_for_gradient(Fragment<float, 8>& s, Fragment<float, 8>& dp,
                                   const float (&log_rest)[2], uint32_t address) {
  float rest[2] = {log_rest[0], log_rest[1]};
#pragma unroll
  for (int m = 3; m >= 0; --m) {
    uint32_t w[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 1; h >= 0; --h) {
        float* x = s.v[2 * m + h] + 2 * i;
        float* g = dp.v[2 * m + h] + 2 * i;
        const LogSigmoid<float> l0 = log_sigmoid(x[0]), l1 = log_sigmoid(x[1]);
        const QuadScan<float> scan = quad_after(l0.rest + l1.rest);
        const float r1 = rest[i] + scan.others, r0 = r1 + l1.rest;
        x[0] = exponential(l0.share);
        x[1] = exponential(l1.share);
        const float w0 = x[0] == 0.f ? 0.f : exponential(l0.share + r0);
        const float w1 = x[1] == 0.f ? 0.f : exponential(l1.share + r1);
        w[h][i] = pack_two<Element>(w0, w1);
        g[0] *= w0;
        g[1] *= w1;
        rest[i] += scan.total;
      }
    }
    store_octets(address, m, w);
  }
}
// Converts, from the first key to the last, weight times product to the gradient without the keys
// before the tile. `total`: the sum over the tile, of each row.
template <class Shares>
__device__ void gradient_within(const Shares& z, Fragment<float, 8>& g, float (&total)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float &g0 = g.v[j][2 * i], &g1 = g.v[j][2 * i + 1];
      const QuadScan<float> scan = quad_before(g0 + g1);
      const float b0 = sum + scan.others + g0, b1 = b0 + g1;
      g0 = fmaf(-z.v[j][2 * i], b0, g0);
      g1 = fmaf(-z.v[j][2 * i + 1], b1, g1);
      sum += scan.total;
    }
    total[i] = sum;
  }
}
// Adds the keys before the tile to the gradient.
__device__ inline void add_before(const Fragment<float, 8>& z, Fragment<float, 8>& g,
                                  const float (&before)[2]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float share = z.v[j][e], v = fmaf(-share, before[e / 2], g.v[j][e]);
      g.v[j][e] = share == 0.f ? 0.f : v;
    }
  }
}

// ---- Rows ----

// Returns which of the 64 keys from j0 on the thread's two rows see; `seen`: the range of the first
// row.
__device__ inline Mask mask_of_rows(const Range* seen, int j0) {
  const int shift = j0 + static_cast<int>(threadIdx.x) % 4 * 2;
  return {{seen[0].first - shift, seen[8].first - shift},
          {seen[0].last - shift, seen[8].last - shift}};
}
__device__ inline bool see_all(const Range* seen, int j0) {
  return seen[0].first <= j0 && seen[8].first <= j0 && seen[0].last >= j0 + 64 &&
         seen[8].last >= j0 + 64;
}

// Loads a step's row data. Softmax: log-sum-exp with base 2, and delta. Stick-breaking: the log
// length at the right edge of the tile of keys, which is kept for those that matter to the rows.
template <bool kSoftmax>
__device__ void load_step(const BackwardLaunch& launch, const KeyBlock& at, const Step& step,
                          int key_tile, int line, float (&a)[2], float (&b)[2]) {
  const MoaAttentionParams& p = launch.b.fwd;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int in_band = step.tile * 64 + line + 8 * i;
    const int r = launch.band * 64 + in_band;
    if constexpr (kSoftmax) {
      a[i] = b[i] = 0;
      if (r >= num_rows(p)) continue;
      const int64_t index = at.row(p, r);
      a[i] = static_cast<const float*>(p.state)[index] * kLog2E;
      b[i] = static_cast<const float*>(launch.delta)[index];
    } else {
      a[i] = key_tile < step.first ? kLowest<float> : 0.f;
      if (key_tile < step.first || key_tile >= step.last) continue;
      a[i] = static_cast<const float*>(
          launch.log_rest)[(at.item * launch.key_tiles + key_tile) * launch.band_tiles * 64 +
                           in_band];
    }
  }
}

// ---- What is not finite ----

// Zeros in place of what is not finite in the keys that gradients of scores are multiplied by.
template <class Config>
__device__ void set_keys_apart(typename Config::Shared& smem, int thread, int threads) {
  constexpr int kHalf = Config::kHalf, kChunks = kHalf / 8;
  auto* keys = smem.k_columns;
  if (!any_consumer(has_not_finite<2 * Config::kTile>(keys, thread, threads), threads)) return;
#pragma unroll 1
  for (int i = thread; i < 2 * Config::kTile; i += threads) {
    if (!not_finite(static_cast<float>(keys[i]))) continue;
    const int part = i / Config::kHalfTile, line = i / kHalf % 64;
    const int chunk = i % kHalf / 8 ^ line / (8 / kChunks) % kChunks;
    smem.bad.note(part / 2 * 64 + line, part % 2 * kHalf + 8 * chunk + i % 8, NAN);
    keys[i] = typename Config::Element(0.f);
  }
  cutlass::arch::fence_view_async_shared();
  any_consumer(false, threads);
}
// Notes the elements of grad_q that these keys make NaN, for rows whose masks are in smem.sight.
template <class Config>
__device__ void note_bad_keys(typename Config::Shared& smem, int thread, int threads) {
  constexpr int kWords = Config::kD / 32;
#pragma unroll 1
  for (int i = thread; i < 64 * kWords; i += threads) {
    uint32_t bits = 0;
    for (int g = 0; g < 2; ++g) {
      const auto& sight = smem.sight[g];
      for (int j = max(sight.first[i / kWords], 0); j < min(sight.last[i / kWords], 64); ++j) {
        bits |= smem.bad.high[(64 * g + j) * kWords + i % kWords];
      }
    }
    smem.row_nan[i] = bits;
  }
}
template <class Config, int kTiles>
__device__ void add_nan(const typename Config::Shared& smem, Fragment<float, kTiles>& f) {
  constexpr int kWords = Config::kD / 32;
  const Consumer me;
  const uint32_t* words = smem.row_nan + me.line() * kWords + me.warp() / 4 * (kWords / 2);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const uint32_t bits = words[8 * i * kWords + j / 4] >> me.lane() % 4 * 2;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (bits >> (j % 4 * 8 + c) & 1) f.v[j][2 * i + c] = NAN;
      }
    }
  }
}

// The notes of 64 keys of a block.
template <class Notes>
struct NotesOfKeys {
  Notes& notes;
  int first;
  __device__ void note(int key, int column, float x) { notes.note(first + key, column, x); }
};
// Zeros in place of what is not finite in the rows of a step, whose masks are in smem.sight.
template <class Config, class Element>
__device__ void set_rows_apart(typename Config::Shared& smem, Element* q, Element* grad_out,
                               int thread, int threads) {
  using Notes = NotesOfKeys<decltype(smem.notes_k)>;
  const auto note = [&](auto& notes, int row, int column, float x) {
#pragma unroll 1
    for (int g = 0; g < 2; ++g) {
      Notes of_keys{notes, 64 * g};
      smem.sight[g].template note_row<64>(of_keys, row, column, x);
    }
  };
  set_apart<64, Config::kD>(q, thread, threads, [&](int row, int column, float) {
    note(smem.notes_k, row, column, NAN);
  });
  // Weights are not negative.
  set_apart<64, Config::kD>(grad_out, thread, threads, [&](int row, int column, float x) {
    note(smem.notes_v, row, column, x);
  });
  cutlass::arch::fence_view_async_shared();
}

// ---- Results ----

// Adds the gradients of keys j and j + 8 to those of earlier bands.
template <int kD, class Element>
__device__ void store_keys(const BackwardLaunch& launch, const KeyBlock& at,
                           Fragment<float, kD / 8>& f, int j, Element* result, float* kept,
                           float scale) {
  const MoaAttentionParams& p = launch.b.fwd;
  const Head head(p, at.item);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int key = j + 8 * i;
    const bool there = key < p.num_keys;
    const int64_t index = ((head.batch * p.num_keys + key) * p.num_heads + head.head) * kD;
    float* sums = kept + index + threadIdx.x % 4 * 2;
    if (!launch.first_band && there) {
#pragma unroll
      for (int o = 0; o < kD / 8; ++o) {
        const auto more = *reinterpret_cast<const float2*>(sums + 8 * o);
        f.v[o][2 * i] += more.x;
        f.v[o][2 * i + 1] += more.y;
      }
    }
    if (launch.last_band) {
      store_row(there ? result + index : nullptr, f, i, scale);
    } else if (there) {
#pragma unroll
      for (int o = 0; o < kD / 8; ++o) {
        *reinterpret_cast<float2*>(sums + 8 * o) = make_float2(f.v[o][2 * i], f.v[o][2 * i + 1]);
      }
    }
  }
}

}  // namespace moe_ops::cuda::attention::sm90
