// Forward for any card, type, stride and head size.
//
// A block has 16 rows a warp, all slots of its tokens among them, and walks tiles of keys from the
// last to the first: keys and values are read once for all slots. While the scores of a tile are
// made its values are under way, and while those are added the keys of the next tile.
#pragma once

#include "cuda/moa_attention/fragments.cuh"
#include "cuda/moa_attention/launch.cuh"
#include "cuda/moa_attention/problem.cuh"

namespace moe_ops::cuda::attention {

struct ForwardLaunch {
  MoaAttentionParams p;
  int row_tiles, splits, chunks;  // chunks: of the columns of out
  bool q_aligned, k_aligned, v_aligned;
};

// Result of a split of the keys, [split][row]: out [d] not yet divided, then [2]: the maximum and
// the sum of exponentials, or the log of what remains of the stick.
template <class T>
struct Partials {
  T *out, *state;
  int64_t rows, columns;
  __host__ __device__ Partials(const MoaAttentionParams& p, int splits)
      : out(static_cast<T*>(p.workspace)),
        state(out + splits * p.batch * p.num_tokens * p.num_slots * p.num_heads * p.head_size),
        rows(p.batch * p.num_tokens * p.num_slots * p.num_heads),
        columns(p.head_size) {}
  __device__ T* out_of(int split, int64_t row) const {
    return out + (split * rows + row) * columns;
  }
  __device__ T* state_of(int split, int64_t row) const { return state + (split * rows + row) * 2; }
};

// Returns the mask of a tile of keys from j0 on.
__device__ inline Mask mask_of(const Range (&seen)[2], int j0) {
  const int shift = j0 + lane_id() % 4 * 2;
  return {{seen[0].first - shift, seen[1].first - shift},
          {seen[0].last - shift, seen[1].last - shift}};
}

// Returns the tiles of keys that rows row0 to row_end - 1 see.
template <int kKeys>
__device__ Range key_tiles_of(const MoaAttentionParams& p, int row0, int row_end) {
  const int first = keys_of_row(p, row0).first, last = keys_of_row(p, row_end - 1).last;
  const int tile = first / kKeys;
  return {tile, last > first ? (last + kKeys - 1) / kKeys : tile};
}

template <class S, AttentionKind kKind, int kWarps, int kKeys, int kColumns>
struct Forward {
  using T = Accumulate<S>;
  static constexpr bool kSoftmax = kKind == AttentionKind::kSoftmax;
  static constexpr int kRows = 16 * kWarps, kThreads = 32 * kWarps;
  static constexpr int kKeyOctets = kKeys / 8, kOctets = kColumns / 8;

  static int64_t shared_bytes(int64_t d) {
    const int pitch = pitch_of<S>(static_cast<int>(d));
    return static_cast<int64_t>(sizeof(S)) *
           ((kRows + kKeys) * pitch + kKeys * pitch_of<S>(kColumns));
  }
};

template <class S, AttentionKind kKind, int kWarps, int kKeys, int kColumns>
__global__ void __launch_bounds__(32 * kWarps)
    moa_attention_kernel(const __grid_constant__ ForwardLaunch launch) {
  using F = Forward<S, kKind, kWarps, kKeys, kColumns>;
  using T = typename F::T;
  constexpr int kRows = F::kRows, kThreads = F::kThreads;
  extern __shared__ __align__(128) unsigned char shared[];
  const MoaAttentionParams& p = launch.p;
  const int d = static_cast<int>(p.head_size), pitch = pitch_of<S>(d);
  const int depth = (d + kStep - 1) / kStep * kStep;
  constexpr int kPitchV = pitch_of<S>(kColumns);
  S* q_tile = reinterpret_cast<S*>(shared);
  S* k_tile = q_tile + kRows * pitch;
  S* v_tile = k_tile + kKeys * pitch;

  // The last rows see the most keys and go first.
  int64_t item = blockIdx.x;
  const int chunk = static_cast<int>(item % launch.chunks);
  item /= launch.chunks;
  const int split = static_cast<int>(item % launch.splits);
  item /= launch.splits;
  const int64_t heads = p.batch * p.num_heads;
  const Head head(p, item % heads);
  const int row0 = (launch.row_tiles - 1 - static_cast<int>(item / heads)) * kRows;
  const int row_end = min(row0 + kRows, num_rows(p));
  const int column0 = chunk * kColumns;

  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = lane_id();
  const int mine = row0 + 16 * warp + lane / 4;  // and mine + 8
  const Range seen[2] = {keys_of_row(p, mine), keys_of_row(p, mine + 8)};
  const Range all = key_tiles_of<kKeys>(p, row0, row_end);
  const int64_t tiles = all.last - all.first;
  const int first = all.first + static_cast<int>(tiles * split / launch.splits);
  const int last = all.first + static_cast<int>(tiles * (split + 1) / launch.splits);
  const Range shared_keys = keys_of_all(p, row0, row_end);

  const S* q = static_cast<const S*>(p.q.data);
  load_tile<S, kRows, kThreads>(
      q_tile, pitch, d, d, launch.q_aligned,
      [&](int r) { return row0 + r < row_end ? row_of<S>(p, p.q, head, row0 + r) : nullptr; }, q);
  const auto load_keys = [&](int tile) {
    load_tile<S, kKeys, kThreads>(
        k_tile, pitch, d, d, launch.k_aligned,
        [&](int r) {
          const int j = tile * kKeys + r;
          return j < p.num_keys ? key_of<S>(p.k, head, j) : nullptr;
        },
        q);
  };
  if (last > first) load_keys(last - 1);
  commit_copies();

  __shared__ NotFinite<kRows, kColumns> notes;
  __shared__ Sight<kRows> sight;
  notes.clear(static_cast<int>(threadIdx.x), kThreads);
  const Logits<T> logits(p.scale, p.softcap);
  Fragment<T, F::kOctets> out;
  out.clear();
  SoftmaxRows<T> softmax;
  T rest[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) rest[i] = mine + 8 * i < row_end ? T(0) : kLowest<T>;

#pragma unroll 1
  for (int tile = last - 1; tile >= first; --tile) {
    load_tile<S, kKeys, kThreads>(
        v_tile, kPitchV, kColumns, d - column0, launch.v_aligned,
        [&](int r) {
          const int j = tile * kKeys + r;
          return j < p.num_keys ? key_of<S>(p.v, head, j) + column0 : nullptr;
        },
        q);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    Fragment<T, F::kKeyOctets> s;
    Products<S, F::kKeyOctets>::rows_by_rows(s, q_tile + 16 * warp * pitch, pitch, k_tile, pitch,
                                             depth);
    __syncthreads();
    if (tile > first) load_keys(tile - 1);
    commit_copies();
    logits.apply(s);
    Mask mask = mask_of(seen, tile * kKeys);
    const bool whole = shared_keys.first <= tile * kKeys && shared_keys.last >= (tile + 1) * kKeys;
    bool apart = !whole;  // some row does not see all of the tile
    if constexpr (F::kSoftmax) {
      T factor[2];
      softmax.step(s, mask, factor);
      out.scale_rows(factor);
    } else {
      apart |= mask.leave_out_empty_sticks(rest);
      break_sticks<true>(s, mask, rest);
    }
    wait_copies<1>();
    apart = __syncthreads_or(apart);
    if (apart && __syncthreads_or(has_not_finite<S, kKeys, kColumns, kThreads>(v_tile, kPitchV))) {
      sight.keep(mask, mine - row0);
      __syncthreads();
      set_apart<S, kKeys, kColumns, kThreads>(v_tile, kPitchV, [&](int key, int column, T x) {
        sight.note_key(notes, key, column, x);
      });
      __syncthreads();
    }
    Products<S, F::kOctets>::fragment_by_columns(out, s, v_tile, kPitchV);
    if constexpr (F::kSoftmax) {
      __syncthreads();
    } else {
      // NaN is not less than anything.
      const bool left = !(rest[0] < kLogTiny<T>) || !(rest[1] < kLogTiny<T>);
      if (!__syncthreads_or(left)) break;
    }
  }
  wait_copies<0>();
  __syncthreads();
  notes.add_to(out, mine - row0);

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = mine + 8 * i;
    const T sum = F::kSoftmax ? quad_sum(softmax.sum[i]) : T(0);
    if (r >= row_end) continue;
    const int64_t index = row_index(p, head, r);
    const bool writes_state = chunk == 0 && lane % 4 == 0;
    if (launch.splits > 1) {
      const Partials<T> partials(p, launch.splits);
      T* to = partials.out_of(split, index) + column0;
#pragma unroll
      for (int j = 0; j < F::kOctets; ++j) {
        store_two(to, 8 * j + lane % 4 * 2, d - column0, out.v[j][2 * i], out.v[j][2 * i + 1]);
      }
      if (writes_state) {
        partials.state_of(split, index)[0] = F::kSoftmax ? softmax.max[i] : rest[i];
        partials.state_of(split, index)[1] = sum;
      }
      continue;
    }
    const bool none = sum == T(0);
    const T factor = !F::kSoftmax ? T(1) : none ? T(0) : T(1) / sum;
    S* to = static_cast<S*>(p.out) + index * d + column0;
#pragma unroll
    for (int j = 0; j < F::kOctets; ++j) {
      store_two(to, 8 * j + lane % 4 * 2, d - column0, out.v[j][2 * i] * factor,
                out.v[j][2 * i + 1] * factor);
    }
    if (writes_state) {
      static_cast<T*>(p.state)[index] = !F::kSoftmax
                                            ? (rest[i] < kLogTiny<T> ? T(0) : exponential(rest[i]))
                                        : none ? -T(INFINITY)
                                               : softmax.max[i] + log(sum);
    }
  }
}

// Adds what the splits of a row left, a thread a column.
template <class S, AttentionKind kKind>
__global__ void __launch_bounds__(128)
    combine_splits_kernel(const __grid_constant__ ForwardLaunch launch) {
  using T = Accumulate<S>;
  const MoaAttentionParams& p = launch.p;
  const Partials<T> partials(p, launch.splits);
  const int64_t i = int64_t{blockIdx.x} * 128 + threadIdx.x;
  if (i >= partials.rows * partials.columns) return;
  const int64_t row = i / partials.columns, column = i % partials.columns;
  T out = 0, state;
  if constexpr (kKind == AttentionKind::kSoftmax) {
    T max = kLowest<T>, sum = 0;
    for (int s = 0; s < launch.splits; ++s) max = max_number(max, partials.state_of(s, row)[0]);
    for (int s = 0; s < launch.splits; ++s) {
      const T factor = exponential(partials.state_of(s, row)[0] - max);
      sum += factor * partials.state_of(s, row)[1];
      out += factor * partials.out_of(s, row)[column];
    }
    const bool none = sum == T(0);
    out = none ? T(0) : out / sum;
    state = none ? -T(INFINITY) : max + log(sum);
  } else {
    T rest = 0;
    for (int s = launch.splits - 1; s >= 0; --s) {
      if (rest < kLogTiny<T>) break;
      out += exponential(rest) * partials.out_of(s, row)[column];
      rest += partials.state_of(s, row)[0];
    }
    state = rest < kLogTiny<T> ? T(0) : exponential(rest);
  }
  static_cast<S*>(p.out)[i] = narrow<S>(out);
  if (column == 0) static_cast<T*>(p.state)[row] = state;
}

// Splits of the keys by sizes alone; 1 writes the result itself.
inline int forward_splits(const MoaAttentionParams& p) {
  if (p.batch_invariant || !has_few_rows(rows_of(p))) return 1;
  return static_cast<int>(key_splits(heads_of(p), p.num_keys));
}

template <class S, AttentionKind kKind, bool kFew, int kColumns>
Status launch_forward(const MoaAttentionParams& p, Stream stream) {
  constexpr TileSizes kTile = forward_tile(kTypeOf<S>, kColumns, kFew);
  static_assert(kTile.columns == kColumns);
  using F = Forward<S, kKind, kTile.rows / 16, kTile.keys, kColumns>;
  ForwardLaunch launch{};
  launch.p = p;
  launch.row_tiles = static_cast<int>(row_tiles_of(p, kTile.rows));
  launch.splits = kFew ? forward_splits(p) : 1;
  launch.chunks = static_cast<int>(ceil_div<int64_t>(p.head_size, kColumns));
  launch.q_aligned = aligned(p.q, p.type);
  launch.k_aligned = aligned(p.k, p.type);
  launch.v_aligned = aligned(p.v, p.type);
  const int64_t items = launch.row_tiles * heads_of(p) * launch.chunks * launch.splits;
  MOE_TRY((launch_items<moa_attention_kernel<S, kKind, kTile.rows / 16, kTile.keys, kColumns>>(
      launch, items, F::kThreads, F::shared_bytes(p.head_size), stream)));
  if (launch.splits == 1) return 0;
  const int64_t numbers = heads_of(p) * rows_of(p) * p.head_size;
  return launch_items<combine_splits_kernel<S, kKind>>(launch, ceil_div<int64_t>(numbers, 128), 128,
                                                       0, stream);
}

template <class S>
Status generic_forward(const MoaAttentionParams& p, Stream stream) {
  const bool softmax = p.kind == AttentionKind::kSoftmax, few = has_few_rows(rows_of(p));
  constexpr AttentionKind kSoftmax = AttentionKind::kSoftmax,
                          kStick = AttentionKind::kStickBreaking;
  constexpr int kFewColumns = forward_tile(kTypeOf<S>, kMaxHeadSize, true).columns;
  constexpr int kWide = forward_tile(kTypeOf<S>, kMaxHeadSize, false).columns;
  constexpr int kNarrow = forward_tile(kTypeOf<S>, 1, false).columns;
  if (few) {
    return softmax ? launch_forward<S, kSoftmax, true, kFewColumns>(p, stream)
                   : launch_forward<S, kStick, true, kFewColumns>(p, stream);
  }
  if (p.head_size > kNarrow) {
    return softmax ? launch_forward<S, kSoftmax, false, kWide>(p, stream)
                   : launch_forward<S, kStick, false, kWide>(p, stream);
  }
  return softmax ? launch_forward<S, kSoftmax, false, kNarrow>(p, stream)
                 : launch_forward<S, kStick, false, kNarrow>(p, stream);
}

}  // namespace moe_ops::cuda::attention
