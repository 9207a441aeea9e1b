// Backward for any card, type, stride and head size. No atomics: grad_q comes from blocks of rows
// that walk the keys, grad_k and grad_v from blocks of keys that walk the rows; both make the
// scores again.
//
// Stick-breaking needs, for each row and tile of keys, how long the stick is at the tile's right
// edge and the sum of weight times gradient over the keys to its left. Rows are taken in bands
// (config.h), so that memory grows with S; for each band
//   1. moa_attention_sticks: from the last keys to the first, the lengths; where sticks end;
//   2. moa_attention_grad_q: from there to the last keys, the sums and grad_q;
//   3. moa_attention_grad_kv: adds the band to grad_k and grad_v.
#pragma once

#include "cuda/moa_attention/backward.h"
#include "cuda/moa_attention/fragments.cuh"
#include "cuda/moa_attention/launch.cuh"
#include "cuda/moa_attention/problem.cuh"

namespace moe_ops::cuda::attention {

template <class S, int kTileRows>
struct Backward {
  using T = Accumulate<S>;
  static constexpr int kRows = kTileRows, kKeys = kTileRows;
  static constexpr int kWarps = kRows / 16, kThreads = 32 * kWarps;
  static constexpr int kColumns = backward_tile(kTypeOf<S>, kMaxHeadSize).columns;
  static constexpr int kOctets = kColumns / 8, kKeyOctets = kKeys / 8;
  static constexpr int kPitchScores = pitch_of<S>(kKeys);

  // Returns the number of columns that chunks of the results may touch.
  static __host__ __device__ int padded(int d) { return (d + kColumns - 1) / kColumns * kColumns; }
  static int64_t tile_bytes(int64_t d, int tiles) {
    return static_cast<int64_t>(sizeof(S)) * tiles * kRows *
           pitch_of<S>(padded(static_cast<int>(d)));
  }
  static int64_t shared_bytes_kv(int64_t d) {
    return tile_bytes(d, 4) + static_cast<int64_t>(sizeof(S)) * 2 * kRows * kPitchScores;
  }
};

// Computes <grad_out, out> - grad_state with one warp per row.
template <class S>
__global__ void __launch_bounds__(128)
    moa_attention_delta_kernel(const __grid_constant__ BackwardLaunch launch) {
  using T = Accumulate<S>;
  const MoaAttentionParams& p = launch.b.fwd;
  const int64_t index = int64_t{blockIdx.x} * 4 + threadIdx.x / kWarp;
  const int64_t rows = int64_t{num_rows(p)};
  if (index >= p.batch * rows * p.num_heads) return;
  const int64_t item = index / p.num_heads;  // batch and row
  const Head head(p, item / rows * p.num_heads + index % p.num_heads);
  const int r = static_cast<int>(item % rows);
  const S* grad = row_of<S>(p, launch.b.grad_out, head, r);
  const S* out = static_cast<const S*>(p.out) + index * p.head_size;
  T sum = 0;
  for (int c = lane_id(); c < p.head_size; c += kWarp)
    sum = fma(widen(grad[c]), widen(out[c]), sum);
  sum = warp_sum(sum);
  if (lane_id() == 0) {
    static_cast<T*>(launch.delta)[index] = sum - static_cast<const T*>(launch.b.grad_state)[index];
  }
}

// A block's rows: its tile of the band, its warps' rows, the keys that they see.
template <class S, int kRows>
struct RowBlock {
  using T = Accumulate<S>;
  Head head;
  int64_t head_item;
  int in_band;  // tile of the band
  int row0, row_end, mine;
  Range seen[2];

  __device__ RowBlock(const BackwardLaunch& launch, int64_t item, int tile)
      : head(launch.b.fwd, item), head_item(item), in_band(tile) {
    const MoaAttentionParams& p = launch.b.fwd;
    row0 = (launch.band + tile) * kRows;
    row_end = min(row0 + kRows, num_rows(p));
    mine = row0 + static_cast<int>(threadIdx.x) / kWarp * 16 + lane_id() / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) seen[i] = keys_of_row(p, mine + 8 * i);
  }
  __device__ Range key_tiles(const MoaAttentionParams& p, int keys) const {
    const int first = keys_of_row(p, row0).first, last = keys_of_row(p, row_end - 1).last;
    const int tile = first / keys;
    return {tile, last > first ? (last + keys - 1) / keys : tile};
  }
  __device__ Mask mask(int j0) const {
    const int shift = j0 + lane_id() % 4 * 2;
    return {{seen[0].first - shift, seen[1].first - shift},
            {seen[0].last - shift, seen[1].last - shift}};
  }
  // Returns an index into [B n][key_tiles][rows of a band], which has room for rows past the last
  // one.
  __device__ int64_t checkpoint(const BackwardLaunch& launch, int key_tile, int i) const {
    return (head_item * launch.key_tiles + key_tile) * launch.band_tiles * kRows + in_band * kRows +
           (mine + 8 * i - row0);
  }
  __device__ void load(const BackwardLaunch& launch, const void* kept, int key_tile,
                       T (&v)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) v[i] = static_cast<const T*>(kept)[checkpoint(launch, key_tile, i)];
  }
  __device__ void keep(const BackwardLaunch& launch, void* kept, int key_tile,
                       const T (&v)[2]) const {
    if (lane_id() % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) static_cast<T*>(kept)[checkpoint(launch, key_tile, i)] = v[i];
  }
  // Loads the elements of the two rows from [B, S, K, n]; 0 for a missing row.
  __device__ void load_rows(const MoaAttentionParams& p, const void* x, T (&v)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = mine + 8 * i;
      v[i] = r < row_end ? static_cast<const T*>(x)[row_index(p, head, r)] : T(0);
    }
  }
};

// Load rows of q or of the gradient of out, and keys or values, to a tile.
template <class B, class S, class Block>
__device__ void load_query_tile(const MoaAttentionParams& p, const AttentionOperand& x,
                                const Block& block, bool aligned, S* tile) {
  const int d = static_cast<int>(p.head_size), columns = B::padded(d);
  load_tile<S, B::kRows, B::kThreads>(
      tile, pitch_of<S>(columns), columns, d, aligned,
      [&](int r) {
        return block.row0 + r < block.row_end ? row_of<S>(p, x, block.head, block.row0 + r)
                                              : nullptr;
      },
      static_cast<const S*>(x.data));
}
template <class B, class S>
__device__ void load_key_tile(const MoaAttentionParams& p, const AttentionOperand& x, Head head,
                              int j0, bool aligned, S* tile) {
  const int d = static_cast<int>(p.head_size), columns = B::padded(d);
  load_tile<S, B::kKeys, B::kThreads>(
      tile, pitch_of<S>(columns), columns, d, aligned,
      [&](int r) { return j0 + r < p.num_keys ? key_of<S>(x, head, j0 + r) : nullptr; },
      static_cast<const S*>(p.q.data));
}

// Computes the log lengths of sticks at the right edge of each tile of keys.
template <class S, int kTileRows>
__global__ void __launch_bounds__(2 * kTileRows)
    moa_attention_sticks_kernel(const __grid_constant__ BackwardLaunch launch) {
  using B = Backward<S, kTileRows>;
  using T = typename B::T;
  extern __shared__ __align__(128) unsigned char shared[];
  const MoaAttentionParams& p = launch.b.fwd;
  const int d = static_cast<int>(p.head_size), pitch = pitch_of<S>(B::padded(d));
  const int depth = (d + kStep - 1) / kStep * kStep;
  S* q_tile = reinterpret_cast<S*>(shared);
  S* k_tile = q_tile + B::kRows * pitch;

  const int64_t heads = p.batch * p.num_heads;
  const RowBlock<S, B::kRows> block(launch, blockIdx.x % heads,
                                    launch.band_tiles - 1 - static_cast<int>(blockIdx.x / heads));
  if (block.row0 >= num_rows(p)) return;
  load_query_tile<B>(p, p.q, block, launch.q_aligned, q_tile);
  const Logits<T> logits(p.scale, p.softcap);
  const Range tiles = block.key_tiles(p, B::kKeys);
  T rest[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) rest[i] = block.mine + 8 * i < block.row_end ? T(0) : kLowest<T>;

  int tile = tiles.last - 1;
#pragma unroll 1
  for (; tile >= tiles.first; --tile) {
    load_key_tile<B>(p, p.k, block.head, tile * B::kKeys, launch.k_aligned, k_tile);
    commit_copies();
    block.keep(launch, launch.log_rest, tile, rest);
    wait_copies<0>();
    __syncthreads();
    Fragment<T, B::kKeyOctets> s;
    Products<S, B::kKeyOctets>::rows_by_rows(
        s, q_tile + static_cast<int>(threadIdx.x) / kWarp * 16 * pitch, pitch, k_tile, pitch,
        depth);
    logits.apply(s);
    Mask mask = block.mask(tile * B::kKeys);
    mask.leave_out_empty_sticks(rest);
    break_sticks<false>(s, mask, rest);
    const bool left = !(rest[0] < kLogTiny<T>) || !(rest[1] < kLogTiny<T>);
    if (!__syncthreads_or(left)) break;
  }
  commit_copies();  // of rows that see no keys
  wait_copies<0>();
  if (threadIdx.x == 0) {
    launch.first_tile[block.head_item * launch.band_tiles + block.in_band] = max(tile, tiles.first);
  }
}

template <class S, AttentionKind kKind, int kTileRows>
__global__ void __launch_bounds__(2 * kTileRows)
    moa_attention_grad_q_kernel(const __grid_constant__ BackwardLaunch launch) {
  using B = Backward<S, kTileRows>;
  using T = typename B::T;
  constexpr bool kSoftmax = kKind == AttentionKind::kSoftmax;
  extern __shared__ __align__(128) unsigned char shared[];
  const MoaAttentionParams& p = launch.b.fwd;
  const int d = static_cast<int>(p.head_size), pitch = pitch_of<S>(B::padded(d));
  const int depth = (d + kStep - 1) / kStep * kStep;
  S* q_tile = reinterpret_cast<S*>(shared);
  S* grad_tile = q_tile + B::kRows * pitch;
  S* k_tile = grad_tile + B::kRows * pitch;
  S* v_tile = k_tile + B::kKeys * pitch;

  const int chunk = static_cast<int>(blockIdx.x) % launch.chunks;
  const int64_t item = blockIdx.x / launch.chunks, heads = p.batch * p.num_heads;
  const RowBlock<S, B::kRows> block(launch, item % heads,
                                    launch.band_tiles - 1 - static_cast<int>(item / heads));
  if (block.row0 >= num_rows(p)) return;
  const int column0 = chunk * B::kColumns;
  const int warp_rows = static_cast<int>(threadIdx.x) / kWarp * 16 * pitch;
  load_query_tile<B>(p, p.q, block, launch.q_aligned, q_tile);
  load_query_tile<B>(p, launch.b.grad_out, block, launch.grad_aligned, grad_tile);

  const Logits<T> logits(p.scale, p.softcap);
  Range tiles = block.key_tiles(p, B::kKeys);
  T a[2], b[2];  // log-sum-exp and delta, or the stick's log length and the sum of those before
  block.load_rows(p, p.state, a);
  if constexpr (kSoftmax) {
    block.load_rows(p, launch.delta, b);
  } else {
    T grad_rest[2];
    block.load_rows(p, launch.b.grad_state, grad_rest);
#pragma unroll
    for (int i = 0; i < 2; ++i) b[i] = a[i] * grad_rest[i];
    tiles.first = launch.first_tile[block.head_item * launch.band_tiles + block.in_band];
  }
  const Range shared_keys = keys_of_all(p, block.row0, block.row_end);
  __shared__ NotFinite<B::kRows, B::kColumns> notes;
  __shared__ Sight<B::kRows> sight;
  notes.clear(static_cast<int>(threadIdx.x), B::kThreads);
  Fragment<T, B::kOctets> sum;
  sum.clear();
#pragma unroll 1
  for (int tile = tiles.first; tile < tiles.last; ++tile) {
    const int j0 = tile * B::kKeys;
    load_key_tile<B>(p, p.k, block.head, j0, launch.k_aligned, k_tile);
    load_key_tile<B>(p, p.v, block.head, j0, launch.v_aligned, v_tile);
    commit_copies();
    if constexpr (!kSoftmax) {
      block.load(launch, launch.log_rest, tile, a);
      if (chunk == 0) block.keep(launch, launch.before, tile, b);
    }
    wait_copies<0>();
    __syncthreads();
    Fragment<T, B::kKeyOctets> s, dp, w;
    Products<S, B::kKeyOctets>::rows_by_rows(s, q_tile + warp_rows, pitch, k_tile, pitch, depth);
    Products<S, B::kKeyOctets>::rows_by_rows(dp, grad_tile + warp_rows, pitch, v_tile, pitch,
                                             depth);
    logits.apply(s);
    Mask mask = block.mask(j0);
    // Some row does not see all of the tile.
    bool apart = shared_keys.first > j0 || shared_keys.last < j0 + B::kKeys;
    if constexpr (kSoftmax) {
      softmax_gradient(s, w, dp, mask, logits, a, b);
    } else {
      apart |= mask.leave_out_empty_sticks(a);
      stick_gradient(s, w, dp, mask, logits, a, b);
      apart = __syncthreads_or(apart);
    }
    S* columns = k_tile + column0;
    if (apart &&
        __syncthreads_or(has_not_finite<S, B::kKeys, B::kColumns, B::kThreads>(columns, pitch))) {
      sight.keep(mask, block.mine - block.row0);
      __syncthreads();
      set_apart<S, B::kKeys, B::kColumns, B::kThreads>(columns, pitch, [&](int key, int column, T) {
        sight.note_key(notes, key, column, T(NAN));
      });
      __syncthreads();
    }
    Products<S, B::kOctets>::fragment_by_columns(sum, s, columns, pitch);
    __syncthreads();
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  notes.add_to(sum, block.mine - block.row0);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = block.mine + 8 * i;
    if (r >= block.row_end) continue;
    S* to = static_cast<S*>(launch.b.grad_q) + row_index(p, block.head, r) * d + column0;
#pragma unroll
    for (int j = 0; j < B::kOctets; ++j) {
      store_two(to, 8 * j + lane_id() % 4 * 2, d - column0, sum.v[j][2 * i] * logits.scale,
                sum.v[j][2 * i + 1] * logits.scale);
    }
  }
}

// Stores a fragment of a warp's rows to a tile in shared memory.
template <class S, class T, int kTiles>
__device__ void store_fragment(S* rows, int pitch, const Fragment<T, kTiles>& f) {
  S* to = rows + lane_id() / 4 * pitch + lane_id() % 4 * 2;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store_wide(to + 8 * i * pitch + 8 * j, Wide<S, 2>{{f.v[j][2 * i], f.v[j][2 * i + 1]}});
    }
  }
}

// Shared memory has room for two blocks at most: for three, ptxas would spill.
template <class S, AttentionKind kKind, int kTileRows>
__global__ void __launch_bounds__(2 * kTileRows, 2)
    moa_attention_grad_kv_kernel(const __grid_constant__ BackwardLaunch launch) {
  using B = Backward<S, kTileRows>;
  using T = typename B::T;
  constexpr bool kSoftmax = kKind == AttentionKind::kSoftmax;
  extern __shared__ __align__(128) unsigned char shared[];
  const MoaAttentionParams& p = launch.b.fwd;
  const int d = static_cast<int>(p.head_size), pitch = pitch_of<S>(B::padded(d));
  const int depth = (d + kStep - 1) / kStep * kStep;
  S* q_tile = reinterpret_cast<S*>(shared);
  S* grad_tile = q_tile + B::kRows * pitch;
  S* k_tile = grad_tile + B::kRows * pitch;
  S* v_tile = k_tile + B::kKeys * pitch;
  S* w_tile = v_tile + B::kKeys * pitch;
  S* ds_tile = w_tile + B::kRows * B::kPitchScores;

  // The first keys are seen by the most rows.
  const int chunk = static_cast<int>(blockIdx.x) % launch.chunks;
  const int64_t item = blockIdx.x / launch.chunks, heads = p.batch * p.num_heads;
  const Head head(p, item % heads);
  const int key_tile = static_cast<int>(item / heads), j0 = key_tile * B::kKeys;
  const int key_end = min(j0 + B::kKeys, static_cast<int>(p.num_keys));
  const int column0 = chunk * B::kColumns;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int slots = static_cast<int>(p.num_slots);

  load_key_tile<B>(p, p.k, head, j0, launch.k_aligned, k_tile);
  load_key_tile<B>(p, p.v, head, j0, launch.v_aligned, v_tile);
  const Range tokens = tokens_of(p, j0, key_end);
  const int first = max(tokens.first * slots / B::kRows, launch.band);
  const int last =
      min((tokens.last * slots + B::kRows - 1) / B::kRows, launch.band + launch.band_tiles);
  const Logits<T> logits(p.scale, p.softcap);
  Fragment<T, B::kOctets> sum_k, sum_v;
  sum_k.clear();
  sum_v.clear();
  __shared__ NotFinite<B::kKeys, B::kColumns> notes_k, notes_v;
  __shared__ Sight<B::kRows> sight;
  notes_k.clear(static_cast<int>(threadIdx.x), B::kThreads);
  notes_v.clear(static_cast<int>(threadIdx.x), B::kThreads);
#pragma unroll 1
  for (int tile = first; tile < last; ++tile) {
    const RowBlock<S, B::kRows> block(launch, item % heads, tile - launch.band);
    if (!kSoftmax &&
        key_tile < launch.first_tile[block.head_item * launch.band_tiles + block.in_band]) {
      continue;
    }
    const Range tiles = block.key_tiles(p, B::kKeys);
    if (key_tile < tiles.first || key_tile >= tiles.last) continue;
    load_query_tile<B>(p, p.q, block, launch.q_aligned, q_tile);
    load_query_tile<B>(p, launch.b.grad_out, block, launch.grad_aligned, grad_tile);
    commit_copies();
    T a[2], b[2];
    if constexpr (kSoftmax) {
      block.load_rows(p, p.state, a);
      block.load_rows(p, launch.delta, b);
    } else {
      block.load(launch, launch.log_rest, key_tile, a);
      block.load(launch, launch.before, key_tile, b);
    }
    wait_copies<0>();
    __syncthreads();
    {
      Fragment<T, B::kKeyOctets> s, dp, w;
      Products<S, B::kKeyOctets>::rows_by_rows(s, q_tile + 16 * warp * pitch, pitch, k_tile, pitch,
                                               depth);
      Products<S, B::kKeyOctets>::rows_by_rows(dp, grad_tile + 16 * warp * pitch, pitch, v_tile,
                                               pitch, depth);
      logits.apply(s);
      Mask mask = block.mask(j0);
      if constexpr (kSoftmax) {
        softmax_gradient(s, w, dp, mask, logits, a, b);
      } else {
        mask.leave_out_empty_sticks(a);
        stick_gradient(s, w, dp, mask, logits, a, b);
      }
      store_fragment(w_tile + 16 * warp * B::kPitchScores, B::kPitchScores, w);
      store_fragment(ds_tile + 16 * warp * B::kPitchScores, B::kPitchScores, s);
    }
    __syncthreads();
    const Range all = keys_of_all(p, block.row0, block.row_end);
    if ((all.first > j0 || all.last < j0 + B::kKeys) &&
        __syncthreads_or(
            has_not_finite<S, B::kRows, B::kColumns, B::kThreads>(grad_tile + column0, pitch) ||
            has_not_finite<S, B::kRows, B::kColumns, B::kThreads>(q_tile + column0, pitch))) {
      sight.keep(block.mask(j0), block.mine - block.row0);
      __syncthreads();
      // Weights are not negative.
      set_apart<S, B::kRows, B::kColumns, B::kThreads>(
          grad_tile + column0, pitch, [&](int r, int column, T x) {
            sight.template note_row<B::kKeys>(notes_v, r, column, x);
          });
      set_apart<S, B::kRows, B::kColumns, B::kThreads>(
          q_tile + column0, pitch, [&](int r, int column, T) {
            sight.template note_row<B::kKeys>(notes_k, r, column, T(NAN));
          });
      __syncthreads();
    }
    Products<S, B::kOctets>::columns_by_columns(sum_v, w_tile + 16 * warp, B::kPitchScores,
                                                grad_tile + column0, pitch, B::kRows);
    Products<S, B::kOctets>::columns_by_columns(sum_k, ds_tile + 16 * warp, B::kPitchScores,
                                                q_tile + column0, pitch, B::kRows);
    __syncthreads();
  }
  commit_copies();  // of keys that no row sees
  wait_copies<0>();
  __syncthreads();
  notes_k.add_to(sum_k, 16 * warp + lane_id() / 4);
  notes_v.add_to(sum_v, 16 * warp + lane_id() / 4);

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = j0 + 16 * warp + lane_id() / 4 + 8 * i;
    if (j >= key_end) continue;
    const int64_t at = ((head.batch * p.num_keys + j) * p.num_heads + head.head) * d + column0;
#pragma unroll
    for (int o = 0; o < B::kOctets; ++o) {
      const int column = 8 * o + lane_id() % 4 * 2;
      T k[2] = {sum_k.v[o][2 * i], sum_k.v[o][2 * i + 1]};
      T v[2] = {sum_v.v[o][2 * i], sum_v.v[o][2 * i + 1]};
      T* kept_k = static_cast<T*>(launch.sum_k) + at;
      T* kept_v = static_cast<T*>(launch.sum_v) + at;
      if (!launch.first_band) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (column + c >= d - column0) continue;
          k[c] += kept_k[column + c];
          v[c] += kept_v[column + c];
        }
      }
      if (launch.last_band) {
        store_two(static_cast<S*>(launch.b.grad_k) + at, column, d - column0, k[0] * logits.scale,
                  k[1] * logits.scale);
        store_two(static_cast<S*>(launch.b.grad_v) + at, column, d - column0, v[0], v[1]);
      } else {
        store_two(kept_k, column, d - column0, k[0], k[1]);
        store_two(kept_v, column, d - column0, v[0], v[1]);
      }
    }
  }
}

}  // namespace moe_ops::cuda::attention
