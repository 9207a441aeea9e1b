// Backward by TMA and wgmma: grad_q from blocks of 128 rows that walk the keys, grad_k and grad_v
// from blocks of 64 keys that walk the rows. Scores have rows for rows in both, so that softmax and
// broken sticks are the same text; what stick-breaking needs of a tile's neighbours was written by
// the kernels before (backward_kernel.cuh). The file is long because the two kernels are made of the
// same parts.
#pragma once

#include <cutlass/arch/barrier.h>

#include "cuda/moa_attention/backward.h"
#include "cuda/moa_attention/sm90_common.cuh"

namespace moe_ops::cuda::attention::sm90 {

struct BackwardParams {
  CUtensorMap q, k, v, grad_out;  // boxes of 64 lines
  BackwardLaunch launch;
  int row_tiles;  // of 128 rows, of the band
};

template <DType type, AttentionKind kKindT, int kHeadSize>
struct BackwardConfig {
  using Element = Sm90Element<type>;
  static constexpr bool kSoftmax = kKindT == AttentionKind::kSoftmax;
  static constexpr int kD = kHeadSize;
  static constexpr int kConsumers = 2, kRows = 64 * kConsumers, kKeys = 64;
  static constexpr int kTile = 64 * kD;  // 64 lines
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr auto kK = cute::GMMA::Major::K, kMN = cute::GMMA::Major::MN;
  using ScoreMma = SharedMma<Element, kKeys, kD, kK, kK>;
  using GradQMma = RegisterMma<Element, kD, kKeys, kMN>;
  using GradKeyMma = SharedMma<Element, kD, 64, kMN, kMN>;

  // grad_q: a stage is keys and values.
  static constexpr int kStagesQ = kD == 128 ? 4 : 6;
  struct SharedQ {
    alignas(1024) Element q[kConsumers * kTile];
    alignas(1024) Element grad[kConsumers * kTile];
    alignas(1024) Element ring[kStagesQ * 2 * kTile];
    NotFinite<kRows, kD> notes;
    Sight<kRows> sight;
    alignas(8) cutlass::arch::ClusterTransactionBarrier rows_full;
    cutlass::arch::ClusterTransactionBarrier full[kStagesQ];
    cutlass::arch::ClusterBarrier empty[kStagesQ];
  };
  // grad_k, grad_v: a stage is 128 rows of q and of the gradient.
  static constexpr int kStagesKv = 2;
  struct SharedKv {
    alignas(1024) Element k[kTile];
    alignas(1024) Element v[kTile];
    alignas(1024) Element ring[kStagesKv * 2 * kConsumers * kTile];
    alignas(1024) Element w[kConsumers * 64 * kKeys];
    alignas(1024) Element ds[kConsumers * 64 * kKeys];
    NotFinite<kKeys, kD> notes[2];  // of grad_v and grad_k
    Sight<kRows> sight;
    alignas(8) cutlass::arch::ClusterTransactionBarrier keys_full;
    cutlass::arch::ClusterTransactionBarrier full[kStagesKv];
    cutlass::arch::ClusterBarrier empty[kStagesKv];
  };
  static_assert(sizeof(SharedQ) <= 227 * 1024 && sizeof(SharedKv) <= 227 * 1024);
};

template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// A warpgroup's 64 rows of a tile of 128 of the band, as one of its threads sees them.
struct BandRows {
  Head head;
  int64_t head_item;
  int in_band;  // first row of the warpgroup, in rows of the band
  int mine, end;
  Range seen[2];

  // `part`: 0 or 1, which half of the tile.
  __device__ BandRows(const BackwardLaunch& launch, int64_t item, int tile, int part, int thread)
      : head(launch.b.fwd, item), head_item(item), in_band(tile * 128 + 64 * part) {
    const MoaAttentionParams& p = launch.b.fwd;
    mine = launch.band * 64 + in_band + thread / kWarp * 16 + thread % kWarp / 4;
    end = num_rows(p);
#pragma unroll
    for (int i = 0; i < 2; ++i) seen[i] = keys_of_row(p, mine + 8 * i);
  }
  __device__ Mask mask(int j0) const {
    const int shift = j0 + static_cast<int>(threadIdx.x) % 4 * 2;
    return {{seen[0].first - shift, seen[1].first - shift},
            {seen[0].last - shift, seen[1].last - shift}};
  }
  __device__ bool whole(int j0, int keys) const {
    return seen[0].first <= j0 && seen[1].first <= j0 && seen[0].last >= j0 + keys &&
           seen[1].last >= j0 + keys;
  }
  __device__ int64_t checkpoint(const BackwardLaunch& launch, int key_tile, int i) const {
    return (head_item * launch.key_tiles + key_tile) * launch.band_tiles * 64 +
           (mine + 8 * i - launch.band * 64);
  }
  __device__ void load(const BackwardLaunch& launch, const void* kept, int key_tile,
                       float (&v)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      v[i] = static_cast<const float*>(kept)[checkpoint(launch, key_tile, i)];
  }
  __device__ void load_rows(const MoaAttentionParams& p, const void* x, float (&v)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = mine + 8 * i;
      v[i] = r < end ? static_cast<const float*>(x)[row_index(p, head, r)] : 0.f;
    }
  }
};

// Tiles of keys that matter to 128 rows of the band, and to the rows of each half.
struct KeyTiles {
  int first, last;
  // Stick-breaking: of each half, before `first_of` its sticks are empty, and from `last_of` on it
  // sees nothing. Lengths are kept for the tiles between.
  int first_of[2], last_of[2];
  // Log lengths at the right edge of a tile.
  template <class Rows>
  __device__ void load_lengths(const Rows& rows, const BackwardLaunch& launch, int half,
                               int key_tile, float (&a)[2]) const {
    const int begin = half == 0 ? first_of[0] : first_of[1];
    const int end = half == 0 ? last_of[0] : last_of[1];
    if (key_tile >= begin && key_tile < end) {
      rows.load(launch, launch.log_rest, key_tile, a);
    } else {
      a[0] = a[1] = key_tile < begin ? kLowest<float> : 0.f;
    }
  }
};
template <class Config>
__device__ KeyTiles key_tiles_of(const BackwardLaunch& launch, int64_t item, int tile) {
  const MoaAttentionParams& p = launch.b.fwd;
  const int row0 = (launch.band + 2 * tile) * 64;
  const int row_end = min(row0 + Config::kRows, num_rows(p));
  const int first_key = keys_of_row(p, row0).first, last_key = keys_of_row(p, row_end - 1).last;
  KeyTiles out;
  out.first = first_key / Config::kKeys;
  out.last = last_key > first_key ? (last_key + Config::kKeys - 1) / Config::kKeys : out.first;
  out.first_of[0] = out.first_of[1] = out.first;
  out.last_of[0] = out.last_of[1] = out.last;
  if constexpr (!Config::kSoftmax) {
    const int* kept = launch.first_tile + item * launch.band_tiles + 2 * tile;
    out.first_of[0] = kept[0];
    const int half_end = min(row0 + 64, row_end);
    out.last_of[0] = (keys_of_row(p, half_end - 1).last + Config::kKeys - 1) / Config::kKeys;
    out.last_of[1] = out.last;
    // A half without rows has nothing written.
    out.first_of[1] = row0 + 64 < row_end ? kept[1] : out.last;
    out.first = min(out.first_of[0], out.first_of[1]);
  }
  return out;
}

// Scores and gradients of weights to gradients of scores in `scores` and weights in `w`. `mask`
// becomes what rows see whose stick is not empty; whether one is.
template <class Config, class Scores, class Weights>
__device__ bool gradients(Scores& scores, Scores& products, Weights& w, const BandRows& rows,
                          int j0, const PlainLogits& logits, float (&a)[2], float (&b)[2],
                          Mask& mask) {
  auto &s = fragment(scores), &dp = fragment(products);
  logits.apply(s);
  mask = rows.mask(j0);
  const bool empty = !Config::kSoftmax && mask.leave_out_empty_sticks(a);
  const bool whole = __all_sync(~0u, rows.whole(j0, Config::kKeys) && !empty);
  if constexpr (Config::kSoftmax) {
    if (whole) {
      softmax_gradient(s, w, dp, NoMask{}, logits, a, b);
    } else {
      softmax_gradient(s, w, dp, mask, logits, a, b);
    }
  } else {
    if (!whole) {
      mask_scores(s, mask, kNoShare);
      mask_scores(dp, mask, 0.f);
    }
    stick_gradient(s, w, dp, NoMask{}, logits, a, b);
    // A NaN of the row is not the keys' that it does not see.
    if (!whole) {
      mask_scores(s, mask, 0.f);
      mask_scores(w, mask, 0.f);
    }
  }
  return empty;
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    moa_attention_sm90_grad_q_kernel(const __grid_constant__ BackwardParams params) {
  using namespace cute;
  using Element = typename Config::Element;
  constexpr int kD = Config::kD, kTile = Config::kTile, kStages = Config::kStagesQ;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& smem = *reinterpret_cast<typename Config::SharedQ*>(shared);
  const BackwardLaunch& launch = params.launch;
  const MoaAttentionParams& p = launch.b.fwd;
  const int64_t heads = p.batch * p.num_heads, item = blockIdx.x % heads;
  const Head head(p, item);
  const int tile = params.row_tiles - 1 - static_cast<int>(blockIdx.x / heads);
  const int row0 = (launch.band + 2 * tile) * 64;
  if (row0 >= num_rows(p)) return;
  if (threadIdx.x == 0) {
    smem.rows_full.init(1);
    for (int s = 0; s < kStages; ++s) {
      smem.full[s].init(1);
      smem.empty[s].init(Config::kConsumers * kWarpgroup / kWarp);
    }
    cutlass::arch::fence_barrier_init();
  }
  smem.notes.clear(static_cast<int>(threadIdx.x), Config::kThreads);
  __syncthreads();
  const KeyTiles tiles = key_tiles_of<Config>(launch, item, tile);

  if (threadIdx.x < kWarpgroup) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x != 0) return;
    smem.rows_full.arrive_and_expect_tx(2 * Config::kConsumers * kTile * 2);
    for (int g = 0; g < Config::kConsumers; ++g) {
      load_box<64, kD>(&params.q, smem.rows_full, smem.q + g * kTile, row0 + 64 * g, head);
      load_box<64, kD>(&params.grad_out, smem.rows_full, smem.grad + g * kTile, row0 + 64 * g,
                       head);
    }
    RingPlace<kStages> place;
#pragma unroll 1
    for (int t = tiles.first; t < tiles.last; ++t, place.next()) {
      smem.empty[place.stage].wait(place.phase ^ 1);
      auto& full = smem.full[place.stage];
      full.arrive_and_expect_tx(2 * kTile * 2);
      Element* to = smem.ring + place.stage * 2 * kTile;
      load_box<64, kD>(&params.k, full, to, t * 64, head);
      load_box<64, kD>(&params.v, full, to + kTile, t * 64, head);
    }
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup - 1, 0);
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, lane = thread % kWarp;
  const BandRows rows(launch, item, tile, group, thread);
  const PlainLogits logits{static_cast<float>(p.scale)};
  auto scores = accumulators<typename Config::ScoreMma, Config::kKeys>();
  auto products = accumulators<typename Config::ScoreMma, Config::kKeys>();
  auto sum = accumulators<typename Config::GradQMma, kD>();
  clear(sum);
  float a[2], b[2];  // log-sum-exp and delta, or log length and the sum to the left
  rows.load_rows(p, p.state, a);
  if constexpr (Config::kSoftmax) {
    rows.load_rows(p, launch.delta, b);
  } else {
    float grad_rest[2];
    rows.load_rows(p, launch.b.grad_state, grad_rest);
#pragma unroll
    for (int i = 0; i < 2; ++i) b[i] = a[i] * grad_rest[i];
  }
  const Range shared_keys = keys_of_all(p, row0, min(row0 + Config::kRows, num_rows(p)));
  const auto sQ = as_rows<Element, 64, kD>(smem.q + group * kTile);
  const auto sG = as_rows<Element, 64, kD>(smem.grad + group * kTile);
  smem.rows_full.wait(0);
  RingPlace<kStages> place;
#pragma unroll 1
  for (int t = tiles.first; t < tiles.last; ++t, place.next()) {
    Element* keys = smem.ring + place.stage * 2 * kTile;
    if constexpr (!Config::kSoftmax) {
      tiles.load_lengths(rows, launch, group, t, a);
      if (lane % 4 == 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          static_cast<float*>(launch.before)[rows.checkpoint(launch, t, i)] = b[i];
      }
    }
    smem.full[place.stage].wait(place.phase);
    warpgroup_fence_operand(scores);
    warpgroup_fence_operand(products);
    warpgroup_arrive();
    start_product<typename Config::ScoreMma>(sQ, as_rows<Element, 64, kD>(keys), scores,
                                             GMMA::ScaleOut::Zero);
    start_product<typename Config::ScoreMma>(sG, as_rows<Element, 64, kD>(keys + kTile), products,
                                             GMMA::ScaleOut::Zero);
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores);
    warpgroup_fence_operand(products);
    warpgroup_fence_operand(sum);
    Fragment<float, Config::kKeys / 8> w;
    const int j0 = t * Config::kKeys;
    Mask mask;
    const bool empty = gradients<Config>(scores, products, w, rows, j0, logits, a, b, mask);
    // Some row does not see all keys.
    constexpr int kThreads = Config::kConsumers * kWarpgroup;
    bool apart = shared_keys.first > j0 || shared_keys.last < j0 + Config::kKeys;
    if constexpr (!Config::kSoftmax) apart = any_consumer(apart || empty, kThreads);
    const int consumer = group * kWarpgroup + thread;
    if (apart && any_consumer(has_not_finite<kTile>(keys, consumer, kThreads), kThreads)) {
      smem.sight.keep(mask, rows.mine - row0);
      any_consumer(false, kThreads);
      set_apart<64, kD>(keys, consumer, kThreads, [&](int key, int column, float) {
        smem.sight.note_key(smem.notes, key, column, NAN);
      });
      cutlass::arch::fence_view_async_shared();
      any_consumer(false, kThreads);
    }
    auto operand = as_operand<typename Config::GradQMma, Element, Config::kKeys>(scores);
    warpgroup_fence_operand(sum);
    warpgroup_fence_operand(operand);
    warpgroup_arrive();
    start_product_of_registers<typename Config::GradQMma>(operand,
                                                          as_columns<Element, 64, kD>(keys), sum);
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(sum);
    warpgroup_fence_operand(operand);
    if (lane == 0) smem.empty[place.stage].arrive();
  }
  smem.notes.add_to(fragment(sum), rows.mine - row0);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = rows.mine + 8 * i;
    auto* to = static_cast<Element*>(launch.b.grad_q) + row_index(p, head, r) * kD;
    store_row(r < rows.end ? to : nullptr, fragment(sum), i, logits.scale);
  }
}

// A fragment of 64 rows and 64 keys to a tile of lines, one a row, as TMA would write it.
template <class Element>
__device__ void store_scores(Element* tile, const Fragment<float, 8>& f, int thread) {
  const int line = thread / kWarp * 16 + thread % kWarp / 4, q = thread % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Element* row = tile + (line + 8 * i) * kSpan + 2 * q;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      *reinterpret_cast<uint32_t*>(row + (j ^ line % 8) * 8) =
          pack_two<Element>(f.v[j][2 * i], f.v[j][2 * i + 1]);
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    moa_attention_sm90_grad_kv_kernel(const __grid_constant__ BackwardParams params) {
  using namespace cute;
  using Element = typename Config::Element;
  constexpr int kD = Config::kD, kTile = Config::kTile, kStages = Config::kStagesKv;
  constexpr int kStage = 2 * Config::kConsumers * kTile;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& smem = *reinterpret_cast<typename Config::SharedKv*>(shared);
  const BackwardLaunch& launch = params.launch;
  const MoaAttentionParams& p = launch.b.fwd;
  const int64_t heads = p.batch * p.num_heads, item = blockIdx.x % heads;
  const Head head(p, item);
  // The first keys are seen by the most rows.
  const int key_tile = static_cast<int>(blockIdx.x / heads), j0 = key_tile * Config::kKeys;
  const int key_end = min(j0 + Config::kKeys, static_cast<int>(p.num_keys));
  if (threadIdx.x == 0) {
    smem.keys_full.init(1);
    for (int s = 0; s < kStages; ++s) {
      smem.full[s].init(1);
      smem.empty[s].init(Config::kConsumers * kWarpgroup / kWarp);
    }
    cutlass::arch::fence_barrier_init();
  }
  for (auto& notes : smem.notes) notes.clear(static_cast<int>(threadIdx.x), Config::kThreads);
  __syncthreads();
  // Tiles of 128 rows of the band.
  const Range tokens = tokens_of(p, j0, key_end);
  const int slots = static_cast<int>(p.num_slots), base = launch.band * 64;
  const int first = max(tokens.first * slots - base, 0) / Config::kRows;
  const int last = min((max(tokens.last * slots - base, 0) + Config::kRows - 1) / Config::kRows,
                       params.row_tiles);
  const auto wanted = [&](int tile, KeyTiles& tiles) {
    tiles = key_tiles_of<Config>(launch, item, tile);
    return key_tile >= tiles.first && key_tile < tiles.last;
  };

  if (threadIdx.x < kWarpgroup) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x != 0) return;
    smem.keys_full.arrive_and_expect_tx(2 * kTile * 2);
    load_box<64, kD>(&params.k, smem.keys_full, smem.k, j0, head);
    load_box<64, kD>(&params.v, smem.keys_full, smem.v, j0, head);
    RingPlace<kStages> place;
#pragma unroll 1
    for (int tile = first; tile < last; ++tile) {
      KeyTiles tiles;
      if (!wanted(tile, tiles)) continue;
      smem.empty[place.stage].wait(place.phase ^ 1);
      auto& full = smem.full[place.stage];
      full.arrive_and_expect_tx(kStage * 2);
      Element* to = smem.ring + place.stage * kStage;
      for (int g = 0; g < Config::kConsumers; ++g) {
        const int row = base + tile * Config::kRows + 64 * g;
        load_box<64, kD>(&params.q, full, to + g * kTile, row, head);
        load_box<64, kD>(&params.grad_out, full, to + (Config::kConsumers + g) * kTile, row, head);
      }
      place.next();
    }
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup - 1, 0);
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, lane = thread % kWarp;
  const PlainLogits logits{static_cast<float>(p.scale)};
  const auto meet = [] { cutlass::arch::NamedBarrier::sync(Config::kConsumers * kWarpgroup, 0); };
  // Warpgroup 0 adds to grad_v, warpgroup 1 to grad_k.
  auto sum = accumulators<typename Config::GradKeyMma, kD>();
  clear(sum);
  smem.keys_full.wait(0);
  RingPlace<kStages> place;
#pragma unroll 1
  for (int tile = first; tile < last; ++tile) {
    KeyTiles tiles;
    if (!wanted(tile, tiles)) continue;
    const BandRows rows(launch, item, tile, group, thread);
    float a[2], b[2];
    if constexpr (Config::kSoftmax) {
      rows.load_rows(p, p.state, a);
      rows.load_rows(p, launch.delta, b);
    } else {
      tiles.load_lengths(rows, launch, group, key_tile, a);
      rows.load(launch, launch.before, key_tile, b);
    }
    Element* queries = smem.ring + place.stage * kStage;
    Element* grads = queries + Config::kConsumers * kTile;
    smem.full[place.stage].wait(place.phase);
    {
      auto scores = accumulators<typename Config::ScoreMma, Config::kKeys>();
      auto products = accumulators<typename Config::ScoreMma, Config::kKeys>();
      warpgroup_fence_operand(scores);
      warpgroup_fence_operand(products);
      warpgroup_arrive();
      start_product<typename Config::ScoreMma>(as_rows<Element, 64, kD>(queries + group * kTile),
                                               as_rows<Element, 64, kD>(smem.k), scores,
                                               GMMA::ScaleOut::Zero);
      start_product<typename Config::ScoreMma>(as_rows<Element, 64, kD>(grads + group * kTile),
                                               as_rows<Element, 64, kD>(smem.v), products,
                                               GMMA::ScaleOut::Zero);
      warpgroup_commit_batch();
      warpgroup_wait<0>();
      warpgroup_fence_operand(scores);
      warpgroup_fence_operand(products);
      Fragment<float, Config::kKeys / 8> w;
      Mask mask;
      gradients<Config>(scores, products, w, rows, j0, logits, a, b, mask);
      meet();  // nobody multiplies by the last tile's scores, or looks at its sight, any more
      smem.sight.keep(rows.mask(j0), 64 * group + thread / kWarp * 16 + lane / 4);
      store_scores(smem.w + group * 64 * Config::kKeys, w, thread);
      store_scores(smem.ds + group * 64 * Config::kKeys, fragment(scores), thread);
    }
    cutlass::arch::fence_view_async_shared();
    meet();
    Element* left = group == 0 ? smem.w : smem.ds;
    Element* right = group == 0 ? grads : queries;
    // Some row does not see all keys. Each warpgroup has lines of its own here.
    const int row0 = base + tile * Config::kRows, barrier = 1 + group;
    const Range shared_keys = keys_of_all(p, row0, min(row0 + Config::kRows, num_rows(p)));
    if ((shared_keys.first > j0 || shared_keys.last < j0 + Config::kKeys) &&
        any_consumer(has_not_finite<Config::kConsumers * kTile>(right, thread, kWarpgroup),
                     kWarpgroup, barrier)) {
#pragma unroll 1
      for (int half = 0; half < Config::kConsumers; ++half) {
        set_apart<64, kD>(right + half * kTile, thread, kWarpgroup,
                          [&](int line, int column, float x) {
                            smem.sight.template note_row<Config::kKeys>(
                                smem.notes[group], 64 * half + line, column, group == 0 ? x : NAN);
                          });
      }
      cutlass::arch::fence_view_async_shared();
      any_consumer(false, kWarpgroup, barrier);
    }
    warpgroup_fence_operand(sum);
    warpgroup_arrive();
#pragma unroll
    for (int half = 0; half < Config::kConsumers; ++half) {
      start_product<typename Config::GradKeyMma>(
          as_columns<Element, 64, Config::kKeys>(left + half * 64 * Config::kKeys),
          as_columns<Element, 64, kD>(right + half * kTile), sum, GMMA::ScaleOut::One);
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(sum);
    if (lane == 0) smem.empty[place.stage].arrive();
    place.next();
  }

  auto& f = fragment(sum);
  smem.notes[group].add_to(f, thread / kWarp * 16 + lane / 4);
  const float scale = group == 0 ? 1.f : logits.scale;
  void* result = group == 0 ? launch.b.grad_v : launch.b.grad_k;
  auto* kept = static_cast<float*>(group == 0 ? launch.sum_v : launch.sum_k);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = j0 + thread / kWarp * 16 + lane / 4 + 8 * i;
    const bool there = j < key_end;
    const int64_t at = ((head.batch * p.num_keys + j) * p.num_heads + head.head) * kD;
    float* sums = kept + at + lane % 4 * 2;
    if (!launch.first_band && there) {
#pragma unroll
      for (int o = 0; o < kD / 8; ++o) {
        const auto more = *reinterpret_cast<const float2*>(sums + 8 * o);
        f.v[o][2 * i] += more.x;
        f.v[o][2 * i + 1] += more.y;
      }
    }
    if (launch.last_band) {
      store_row(there ? static_cast<Element*>(result) + at : nullptr, f, i, scale);
    } else if (there) {
#pragma unroll
      for (int o = 0; o < kD / 8; ++o) {
        *reinterpret_cast<float2*>(sums + 8 * o) = make_float2(f.v[o][2 * i], f.v[o][2 * i + 1]);
      }
    }
  }
}

template <class Config>
Status launch_band(const BackwardLaunch& launch, Stream stream) {
  const MoaAttentionBwdParams& b = launch.b;
  const MoaAttentionParams& p = b.fwd;
  BackwardParams params{};
  params.launch = launch;
  const int64_t rows =
      std::min<int64_t>(launch.band_tiles * 64, p.num_tokens * p.num_slots - launch.band * 64);
  const int64_t row_tiles = ceil_div<int64_t>(rows, Config::kRows);
  params.row_tiles = static_cast<int>(row_tiles);
  const auto encode = [](CUtensorMap& map, TensorMap4dDesc d) {
    d.box[0] = kSpan;
    d.box[1] = 64;
    return encode_tensor_map(&map, d);
  };
  MOE_TRY(encode(params.q, rows_of_queries(p, p.q).desc));
  MOE_TRY(encode(params.grad_out, rows_of_queries(p, b.grad_out).desc));
  MOE_TRY(encode(params.k, rows_of_keys(p, p.k).desc));
  MOE_TRY(encode(params.v, rows_of_keys(p, p.v).desc));
  const auto start = [&](auto* kernel, int64_t blocks, int bytes) -> Status {
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    MOE_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<static_cast<unsigned>(blocks), Config::kThreads, bytes, stream>>>(params);
    return launched();
  };
  const int64_t heads = p.batch * p.num_heads;
  MOE_TRY(start(&moa_attention_sm90_grad_q_kernel<Config>, row_tiles * heads,
                static_cast<int>(sizeof(typename Config::SharedQ))));
  return start(&moa_attention_sm90_grad_kv_kernel<Config>,
               ceil_div<int64_t>(p.num_keys, Config::kKeys) * heads,
               static_cast<int>(sizeof(typename Config::SharedKv)));
}

// d = 128 with stick-breaking would not fit into registers (sm90.cu).
template <DType type, AttentionKind kKind>
Status run_band(const BackwardLaunch& launch, Stream stream) {
  if constexpr (kKind == AttentionKind::kSoftmax) {
    if (launch.b.fwd.head_size == 128) {
      return launch_band<BackwardConfig<type, kKind, 128>>(launch, stream);
    }
  }
  return launch_band<BackwardConfig<type, kKind, 64>>(launch, stream);
}

}  // namespace moe_ops::cuda::attention::sm90
