// attend_decode: attention of a few new tokens over a cache of keys and values, in three launches.
//
// 1. place_heads: a warp normalizes and rotates one head of one token. Queries go to scratch in the
//    accumulate type, times `scale`; keys and values go to the cache.
// 2. attend_split: a block has kSplitKeys positions of one token and up to G query heads that share
//    their keys. Each of its warps reads kAtOnce keys at a time, a lane kLane neighboring features,
//    and keeps a running maximum, total and weighted sum of values (online softmax) for each head.
//    The block combines its warps in order and writes a partial result.
// 3. combine_splits: a block combines the partial results of one head in order, with its sink.
//
// A split has a fixed number of positions, so that the bits of a result do not depend on the batch
// or on the GPU. Positions that a query does not attend to are skipped, so that what they contain
// has no effect.
#include <algorithm>

#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/overlap.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"
#include "moe_ops/attend_decode.h"

namespace moe_ops::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kAtOnce = 4;  // keys of a warp under way together

// Reads a number of a type that is known at run time.
template <class A>
__device__ A number_at(const void* p, DType type, int64_t i) {
  switch (type) {
    case DType::kFloat64:
      return static_cast<A>(static_cast<const double*>(p)[i]);
    case DType::kFloat32:
      return static_cast<A>(static_cast<const float*>(p)[i]);
    case DType::kBFloat16:
      return static_cast<A>(widen(static_cast<const bf16*>(p)[i]));
    default:
      return static_cast<A>(widen(static_cast<const fp16*>(p)[i]));
  }
}

// --- heads

template <class S>
__global__ void place_heads_kernel(const AttendDecodeParams p) {
  using A = Accumulate<S>;
  await_previous_kernel();
  const int lane = lane_id();
  const int64_t d = p.head_size, all = p.heads + 2 * p.kv_heads;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t token = warp / all;  // of B * S
  if (token >= p.batch * p.num_tokens) return;
  const int64_t b = token / p.num_tokens, s = token % p.num_tokens;
  int64_t head = warp % all;

  const auto cached = [&](const KeptHeads<void>& kept) {
    return static_cast<S*>(kept.data) + b * kept.stride_batch + head * kept.stride_head +
           (p.start + s) * kept.stride_token;
  };
  if (head >= p.heads + p.kv_heads) {
    head -= p.heads + p.kv_heads;
    const S* const from = static_cast<const S*>(p.v) + (token * p.kv_heads + head) * d;
    S* const to = cached(p.values);
    for (int64_t i = lane; i < d; i += kWarp) to[i] = from[i];
    return;
  }
  const bool is_query = head < p.heads;
  if (!is_query) head -= p.heads;
  const int64_t heads = is_query ? p.heads : p.kv_heads;
  const S* const row = static_cast<const S*>(is_query ? p.q : p.k) + token * heads * d;
  const S* const from = row + head * d;
  const S* weight = static_cast<const S*>(is_query ? p.query_norm : p.key_norm);
  A factor = A(1);
  if (weight != nullptr) {
    const S* const normalized = p.norms_heads ? from : row;
    const int64_t width = p.norms_heads ? d : heads * d;
    A squares = A(0);
    for (int64_t i = lane; i < width; i += kWarp) {
      const A value = widen(normalized[i]);
      squares += value * value;
    }
    factor = A(1) / sqrt(warp_sum(squares) / static_cast<A>(width) + static_cast<A>(p.head_eps));
    if (!p.norms_heads) weight += head * d;
  }
  const auto feature = [&](int64_t i) {
    const A value = widen(from[i]) * factor;
    return weight == nullptr ? value : value * widen(weight[i]);
  };
  A* const query = static_cast<A*>(p.queries) + (token * p.heads + head) * d;
  S* const key = is_query ? nullptr : cached(p.keys);
  const auto place = [&](int64_t i, A value) {
    if (is_query) {
      query[i] = value * static_cast<A>(p.scale);
    } else {
      key[i] = narrow<S>(value);
    }
  };
  for (int64_t i = lane; i < p.half; i += kWarp) {
    const A cos =
        number_at<A>(p.cos, p.angle_type, b * p.cos_stride_batch + s * p.cos_stride_token + i);
    const A sin =
        number_at<A>(p.sin, p.angle_type, b * p.sin_stride_batch + s * p.sin_stride_token + i);
    const A first = feature(i), second = feature(i + p.half);
    place(i, first * cos - second * sin);
    place(i + p.half, second * cos + first * sin);
  }
  for (int64_t i = 2 * p.half + lane; i < d; i += kWarp) place(i, feature(i));
}

// --- softmax over positions

// A part of a softmax: the maximum of its scores, and the total of exp(score - maximum). A total of
// zero: the part has no positions.
template <class A>
struct Part {
  A maximum, total;
};

template <class A>
constexpr A kNothing = -__builtin_huge_val();

// Adds another part; returns the factors of the sums of both.
template <class A>
__device__ __forceinline__ Part<A> add_part(Part<A>& part, const Part<A>& other) {
  if (other.total == A(0)) return {A(1), A(0)};
  if (part.total == A(0)) {
    part = other;
    return {A(0), A(1)};
  }
  const A maximum = max_number(part.maximum, other.maximum);
  const A own = exp(part.maximum - maximum), added = exp(other.maximum - maximum);
  part = {maximum, part.total * own + other.total * added};
  return {own, added};
}

// sum * factors.maximum + other * factors.total, without the product of an empty part.
template <class A>
__device__ __forceinline__ A mix(A sum, A other, const Part<A>& factors) {
  if (factors.total == A(0) && factors.maximum == A(1)) return sum;
  if (factors.maximum == A(0) && factors.total == A(1)) return other;
  return sum * factors.maximum + other * factors.total;
}

// Reads the features of a lane; those from `size` on are zero.
template <class S, int kLane>
__device__ __forceinline__ Wide<S, kLane> lane_features(const S* row, int first, int size,
                                                        bool aligned) {
  Wide<S, kLane> out = {};
  if (first >= size) return out;
  if (aligned) {
    constexpr int V = kLane < kVector<S> ? kLane : kVector<S>;
#pragma unroll
    for (int i = 0; i < kLane; i += V) {
      const Wide<S, V> part = load_wide<V>(row + first + i);
#pragma unroll
      for (int v = 0; v < V; ++v) out.v[i + v] = part.v[v];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      if (first + i < size) out.v[i] = widen(row[first + i]);
    }
  }
  return out;
}

// Returns whether a query attends to a position, and what is added to its score.
template <class A>
__device__ __forceinline__ bool attends(const AttendDecodeParams& p, int64_t b, int64_t s,
                                        int64_t position, A& added) {
  added = A(0);
  if (p.mask.data == nullptr) return position <= p.start + s;
  const int64_t i = b * p.mask.stride_batch + s * p.mask.stride_token + position;
  if (p.mask.is_bool) return static_cast<const uint8_t*>(p.mask.data)[i] != 0;
  added = number_at<A>(p.mask.data, p.mask.type, i);
  return added != kNothing<A>;
}

// kLane: features of a lane, G: query heads of a block.
template <class S, int kLane, int G>
__global__ void __launch_bounds__(kThreads)
    attend_split_kernel(const AttendDecodeParams p, int chunks, bool aligned) {
  using A = Accumulate<S>;
  await_previous_kernel();
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int size = static_cast<int>(p.head_size), first = lane * kLane;
  int64_t block = blockIdx.x;
  const int64_t split = block % p.splits;
  block /= p.splits;
  const int chunk = static_cast<int>(block % chunks);
  block /= chunks;
  const int64_t kv_head = block % p.kv_heads, token = block / p.kv_heads;
  const int64_t b = token / p.num_tokens, s = token % p.num_tokens;
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const int heads = min(G, group - chunk * G);
  const int64_t head = token * p.heads + kv_head * group + chunk * G;  // the first, of B * S * n

  A query[G][kLane];
#pragma unroll
  for (int g = 0; g < G; ++g) {
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const bool there = g < heads && first + i < size;
      query[g][i] = there ? static_cast<const A*>(p.queries)[(head + g) * size + first + i] : A(0);
    }
  }
  const S* const keys =
      static_cast<const S*>(p.keys.data) + b * p.keys.stride_batch + kv_head * p.keys.stride_head;
  const S* const values = static_cast<const S*>(p.values.data) + b * p.values.stride_batch +
                          kv_head * p.values.stride_head;
  const int64_t end = min((split + 1) * kSplitKeys, p.start + p.num_tokens);

  Part<A> part[G];
  A sum[G][kLane] = {};
#pragma unroll
  for (int g = 0; g < G; ++g) part[g] = {kNothing<A>, A(0)};
  for (int64_t begin = split * kSplitKeys + warp * kAtOnce; begin < end;
       begin += kWarps * kAtOnce) {
    bool sees[kAtOnce];
    A added[kAtOnce];
    Wide<S, kLane> x[kAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      sees[j] = begin + j < end && attends(p, b, s, begin + j, added[j]);
      if (sees[j]) {
        x[j] =
            lane_features<S, kLane>(keys + (begin + j) * p.keys.stride_token, first, size, aligned);
      }
    }
    A score[G][kAtOnce];
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        A dot = A(0);
#pragma unroll
        for (int i = 0; i < kLane; ++i) dot += query[g][i] * x[j].v[i];
        score[g][j] = sees[j] ? warp_sum(dot) + added[j] : kNothing<A>;
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (sees[j]) {
        x[j] = lane_features<S, kLane>(values + (begin + j) * p.values.stride_token, first, size,
                                       aligned);
      }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
      A maximum = part[g].maximum;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) maximum = max_number(maximum, score[g][j]);
      const A kept = part[g].total == A(0) ? A(0) : exp(part[g].maximum - maximum);
      part[g] = {maximum, part[g].total == A(0) ? A(0) : part[g].total * kept};
      if (kept != A(1)) {
#pragma unroll
        for (int i = 0; i < kLane; ++i) sum[g][i] *= kept;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (score[g][j] == kNothing<A>) continue;
        const A weight = exp(score[g][j] - maximum);
        part[g].total += weight;
#pragma unroll
        for (int i = 0; i < kLane; ++i) sum[g][i] += weight * x[j].v[i];
      }
    }
  }

  // The warps' parts, in order.
  __shared__ A warp_sums[kWarps][kWarp * kLane];
  __shared__ Part<A> warp_parts[kWarps];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (g >= heads) break;
    if (g > 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < kLane; ++i) warp_sums[warp][first + i] = sum[g][i];
    if (lane == 0) warp_parts[warp] = part[g];
    __syncthreads();
    const int64_t to = (head + g) * p.splits + split;
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
      Part<A> all = {kNothing<A>, A(0)};
      A mixed = A(0);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        mixed = mix(mixed, warp_sums[w][i], add_part(all, warp_parts[w]));
      }
      static_cast<A*>(p.sums)[to * size + i] = mixed;
      if (i == 0) static_cast<Part<A>*>(p.totals)[to] = all;
    }
  }
}

// --- splits

template <class S>
__global__ void combine_splits_kernel(const AttendDecodeParams p) {
  using A = Accumulate<S>;
  await_previous_kernel();
  const int64_t head = blockIdx.x, d = p.head_size;  // of B * S * n
  const Part<A>* const parts = static_cast<const Part<A>*>(p.totals) + head * p.splits;
  const A* const sums = static_cast<const A*>(p.sums) + head * p.splits * d;
  for (int64_t i = threadIdx.x; i < d; i += kThreads) {
    Part<A> all = {kNothing<A>, A(0)};
    A mixed = A(0);
    for (int64_t split = 0; split < p.splits; ++split) {
      mixed = mix(mixed, sums[split * d + i], add_part(all, parts[split]));
    }
    if (all.total == A(0)) {
      mixed = A(0);
    } else {
      // A sink far above the scores makes the total infinite, and the result zero.
      if (p.sinks != nullptr) {
        all.total += exp(widen(static_cast<const S*>(p.sinks)[head % p.heads]) - all.maximum);
      }
      mixed /= all.total;
    }
    static_cast<S*>(p.y)[head * d + i] = narrow<S>(mixed);
  }
}

// --- launches

Launch overlapping(int64_t blocks, Stream stream) {
  Launch at{static_cast<unsigned>(blocks), kThreads, stream};
  at.overlaps = true;
  return at;
}

template <class S, int kLane, int G>
Status attend_splits(const AttendDecodeParams& p, Stream stream) {
  const int64_t tokens = p.batch * p.num_tokens, access = std::min(16, kLane * int{sizeof(S)});
  const int chunks = static_cast<int>(ceil_div<int64_t>(p.heads / p.kv_heads, G));
  bool aligned = p.head_size % kLane == 0;
  for (const KeptHeads<void>* kept : {&p.keys, &p.values}) {
    for (int64_t stride : {kept->stride_batch, kept->stride_head, kept->stride_token}) {
      aligned = aligned && rows_aligned(kept->data, stride * int64_t{sizeof(S)}, access);
    }
  }
  return launch_kernel<attend_split_kernel<S, kLane, G>>(
      overlapping(tokens * p.kv_heads * chunks * p.splits, stream), p, chunks, aligned);
}

}  // namespace

Status attend_decode(const AttendDecodeParams& p, Stream stream) {
  const int64_t tokens = p.batch * p.num_tokens;
  if (tokens == 0) return 0;
  return with_type(p.type, [&](auto tag) -> Status {
    using S = typename decltype(tag)::type;
    const int64_t warps = tokens * (p.heads + 2 * p.kv_heads);
    MOE_TRY(launch_kernel<place_heads_kernel<S>>(
        overlapping(ceil_div<int64_t>(warps, kWarps), stream), p));
    if (p.head_size <= 64) {
      MOE_TRY((attend_splits<S, 2, 4>(p, stream)));
    } else if (p.head_size <= 128) {
      MOE_TRY((attend_splits<S, 4, 4>(p, stream)));
    } else if (p.head_size <= 256) {
      MOE_TRY((attend_splits<S, 8, 2>(p, stream)));
    } else {
      MOE_TRY((attend_splits<S, 16, 1>(p, stream)));
    }
    return launch_kernel<combine_splits_kernel<S>>(overlapping(tokens * p.heads, stream), p);
  });
}

}  // namespace moe_ops::cuda
