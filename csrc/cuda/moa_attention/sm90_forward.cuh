// Forward by TMA and wgmma.
//
// An item is 128 rows of a head, all slots of its tokens among them: one load of a tile of keys and
// values serves every slot. There are as many blocks as SMs, and each walks its list of items. A
// producer warp fills a ring of tiles in the order in which the two consumer warpgroups (64 rows
// each) take them: keys first, then the next keys and the values alternately, so that the scores of
// a tile are made while the values of the one before are added; it goes on with the next item while
// the consumers finish this one. Tiles of keys go from the last to the first.
#pragma once

#include "cuda/moa_attention/sm90_common.cuh"

namespace moe_ops::cuda::attention::sm90 {

template <DType type, AttentionKind kKindT, int kHeadSize>
struct ForwardConfig {
  using Element = Sm90Element<type>;
  static constexpr AttentionKind kKind = kKindT;
  static constexpr bool kSoftmax = kKind == AttentionKind::kSoftmax;
  static constexpr int kD = kHeadSize;
  static constexpr int kConsumers = 2;
  static constexpr int kRows = 64 * kConsumers;
  // Breaking sticks wants registers for more than a tile of scores.
  static constexpr int kKeys = kSoftmax ? 128 : 64;
  static constexpr int kTile = kKeys * kD;
  static constexpr int kStages = kTile * 2 > 16384 ? 5 : 6;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  // Consumer warpgroups alternate with their MMAs. Weights of broken sticks take longer than
  // products whatever the order, and the consumers meet once a tile as it is.
  static constexpr bool kOrderedMma = kSoftmax;

  using ScoreMma = SharedMma<Element, kKeys, kD, cute::GMMA::Major::K, cute::GMMA::Major::K>;
  using OutMma = RegisterMma<Element, kD, kKeys, cute::GMMA::Major::MN>;

  struct Shared {
    alignas(1024) Element q[kRows * kD];
    alignas(1024) Element ring[kStages * kTile];
    alignas(8) cutlass::arch::ClusterTransactionBarrier q_full[kConsumers];
    cutlass::arch::ClusterBarrier q_empty[kConsumers];
    cutlass::arch::ClusterTransactionBarrier full[kStages];
    cutlass::arch::ClusterBarrier empty[kStages];
    // Stick-breaking: the item, counted from 1, whose sticks are all empty; how many tiles were
    // loaded for an item, and that this number is there.
    int stopped, loaded;
    cutlass::arch::ClusterBarrier loaded_full;
    NotFinite<kRows, kD> notes;
    Sight<kRows> sight;
  };
  static constexpr int kSharedBytes = sizeof(Shared);
  static_assert(kSharedBytes <= 227 * 1024);
};

struct ForwardParams {
  CUtensorMap q, k, v;
  MoaAttentionParams p;
  int heads, items;  // batch times heads, and that times tiles of rows
  // Logits are scale times products or, capped, scale times squash(products, tanh_times).
  bool capped;
  float scale, tanh_times;
};

// The item of a block in a round. The last rows see the most keys and go first; every other round
// goes through the blocks backwards, so that no block has the larger item of each.
template <class Config>
struct Item {
  bool there;
  Head head;
  int row0, first, last;  // first row, and tiles of keys

  __device__ Item(const ForwardParams& params, int round) : Item(params, index_of(round)) {}

 private:
  __device__ static int64_t index_of(int round) {
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    return int64_t{round} * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
  }
  __device__ Item(const ForwardParams& params, int64_t index)
      : there(index < params.items),
        head(params.p, there ? static_cast<int>(index) % params.heads : 0) {
    const MoaAttentionParams& p = params.p;
    const int tiles = params.items / params.heads;
    row0 = there ? (tiles - 1 - static_cast<int>(index) / params.heads) * Config::kRows : 0;
    const int row_end = min(row0 + Config::kRows, num_rows(p));
    const int first_key = keys_of_row(p, row0).first, last_key = keys_of_row(p, row_end - 1).last;
    first = first_key / Config::kKeys;
    last = last_key > first_key ? (last_key + Config::kKeys - 1) / Config::kKeys : first;
  }
};

template <class Config>
__device__ void produce(const ForwardParams& params, typename Config::Shared& smem) {
  constexpr int kStages = Config::kStages, kKeys = Config::kKeys, kD = Config::kD;
  constexpr uint32_t kBytes = Config::kTile * 2;
  Place<kStages> place;
#pragma unroll 1
  for (int round = 0;; ++round) {
    const Item<Config> item(params, round);
    if (!item.there) return;
    int loaded = 0;
    const auto load = [&](const CUtensorMap* map, int tile) {
      // A new barrier lets a wait for the phase before its first pass.
      while (!smem.empty[place.stage].try_wait(place.phase ^ 1)) {
        if (!Config::kSoftmax && *static_cast<volatile int*>(&smem.stopped) == round + 1) {
          return false;
        }
      }
      smem.full[place.stage].arrive_and_expect_tx(kBytes);
      load_box<kKeys, kD>(map, smem.full[place.stage], smem.ring + place.stage * Config::kTile,
                          tile * kKeys, item.head);
      place.next();
      ++loaded;
      return true;
    };
    // These keys may come before the consumers have left the rows of the last item.
    bool go = item.last > item.first && load(&params.k, item.last - 1);
#pragma unroll
    for (int g = 0; g < Config::kConsumers; ++g) {
      smem.q_empty[g].wait(round % 2 ^ 1);
      smem.q_full[g].arrive_and_expect_tx(64 * kD * 2);
      load_box<64, kD>(&params.q, smem.q_full[g], smem.q + g * 64 * kD, item.row0 + 64 * g,
                       item.head);
    }
#pragma unroll 1
    for (int tile = item.last - 1; go && tile >= item.first; --tile) {
      if (tile > item.first) go = load(&params.k, tile - 1);
      go = go && load(&params.v, tile);
    }
    if constexpr (!Config::kSoftmax) {
      // The consumers read it before they free the rows of the item, and the next is set after.
      *static_cast<volatile int*>(&smem.loaded) = loaded;
      smem.loaded_full.arrive();
    }
  }
}

template <class Config>
__device__ void consume(const ForwardParams& params, typename Config::Shared& smem) {
  using namespace cute;
  using Element = typename Config::Element;
  constexpr int kKeys = Config::kKeys, kD = Config::kD;
  constexpr int kThreads = Config::kConsumers * kWarpgroup;
  const MoaAttentionParams& p = params.p;
  // Descriptors are uniform over a warpgroup.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup - 1, 0);
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, lane = thread % kWarp;
  const int consumer = static_cast<int>(threadIdx.x) - kWarpgroup;
  const int line = 64 * group + thread / kWarp * 16 + lane / 4;  // of 128 rows; and line + 8
  const PlainLogits logits{params.scale};
  const float times = logits.scale * kLog2E;
  const auto sQ = as_rows<Element, 64, kD>(smem.q + group * 64 * kD);
  const MmaOrder<Config::kOrderedMma> mma_order{group};
  mma_order.begin();

  Place<Config::kStages> place;
  const auto await = [&](const Place<Config::kStages>& at) { smem.full[at.stage].wait(at.phase); };
  const auto release = [&](const Place<Config::kStages>& at) {
    if (lane == 0) smem.empty[at.stage].arrive();
  };

#pragma unroll 1
  for (int round = 0;; ++round) {
    const Item<Config> item(params, round);
    if (!item.there) break;
    const int row0 = item.row0, first = item.first, last = item.last, mine = row0 + line;
    const Range seen[2] = {keys_of_row(p, mine), keys_of_row(p, mine + 8)};
    const Range shared_keys = keys_of_all(p, row0, min(row0 + Config::kRows, num_rows(p)));
    auto scores = accumulators<typename Config::ScoreMma, kKeys>();
    auto out = accumulators<typename Config::OutMma, kD>();
    clear(out);
    auto& s = fragment(scores);
    SoftmaxBase2 softmax;
    float rest[2], factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) rest[i] = mine + 8 * i < num_rows(p) ? 0.f : kLowest<float>;
    int taken = 0;  // tiles of the ring

    // Starts the scores of the keys at `place`, which are there.
    const auto start_scores = [&] {
      warpgroup_fence_operand(scores);
      warpgroup_arrive();
      start_product<typename Config::ScoreMma>(
          sQ, as_rows<Element, kKeys, kD>(smem.ring + place.stage * Config::kTile), scores,
          GMMA::ScaleOut::Zero);
      warpgroup_commit_batch();
    };
    const auto mask_of = [&](int tile) {
      const int shift = tile * kKeys + lane % 4 * 2;
      return Mask{{seen[0].first - shift, seen[1].first - shift},
                  {seen[0].last - shift, seen[1].last - shift}};
    };
    bool empty[2] = {false, false};  // sticks, before the tile that was weighed last
    // Scores to weights; whether an earlier tile is wanted.
    const auto weigh = [&](int tile) {
      Mask mask = mask_of(tile);
      const int j0 = tile * kKeys;
      bool whole = seen[0].first <= j0 && seen[1].first <= j0 && seen[0].last >= j0 + kKeys &&
                   seen[1].last >= j0 + kKeys;
      if constexpr (!Config::kSoftmax) {
#pragma unroll
        for (int i = 0; i < 2; ++i) empty[i] = rest[i] < kLogTiny<float>;
        whole = !mask.leave_out_empty_sticks(rest) && whole;
      }
      const bool unmasked = __all_sync(~0u, whole);
      if (params.capped) squash(s, params.tanh_times);
      if constexpr (Config::kSoftmax) {
        if (!unmasked) mask_scores(s, mask, -INFINITY);
        softmax.step(s, times, factor);
        return true;
      } else {
        logits.apply(s);
        if (!unmasked) mask_scores(s, mask, kNoShare);
        break_sticks<true>(s, NoMask{}, rest);
        // NaN is not less than anything.
        const bool left = !(rest[0] < kLogTiny<float>) || !(rest[1] < kLogTiny<float>);
        return any_consumer(left, kThreads);
      }
    };

    bool wanted = true;
    smem.q_full[group].wait(round % 2);
    if (last > first) {
      await(place);
      mma_order.wait();
      start_scores();
      mma_order.pass();
      warpgroup_wait<0>();
      warpgroup_fence_operand(scores);
      release(place);
      place.next();
      ++taken;
      wanted = weigh(last - 1);
    }
    // Values that are not finite, of the tile at `at`, if some row does not see all of it.
    const auto set_apart = [&](int tile, const Place<Config::kStages>& at) {
      bool apart = shared_keys.first > tile * kKeys || shared_keys.last < (tile + 1) * kKeys;
      if constexpr (!Config::kSoftmax)
        apart = any_consumer(apart || empty[0] || empty[1], kThreads);
      if (!apart) return;
      await(at);
      Element* values = smem.ring + at.stage * Config::kTile;
      if (!any_consumer(has_not_finite<Config::kTile>(values, consumer, kThreads), kThreads))
        return;
      Mask mask = mask_of(tile);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (empty[i]) mask.last[i] = mask.first[i];
      }
      smem.sight.keep(mask, line);
      any_consumer(false, kThreads);
      attention::set_apart<kKeys, kD>(
          values, consumer, kThreads,
          [&](int key, int column, float x) { smem.sight.note_key(smem.notes, key, column, x); });
      cutlass::arch::fence_view_async_shared();
      any_consumer(false, kThreads);
    };
    // Starts out += weights times the values at `place`, which are there.
    const auto start_values = [&](auto& weights) {
      warpgroup_fence_operand(out);
      warpgroup_fence_operand(weights);
      warpgroup_arrive();
      start_product_of_registers<typename Config::OutMma>(
          weights, as_columns<Element, kKeys, kD>(smem.ring + place.stage * Config::kTile), out);
      warpgroup_commit_batch();
    };
    const auto finish_values = [&](auto& weights) {
      warpgroup_wait<0>();
      warpgroup_fence_operand(out);
      warpgroup_fence_operand(weights);
      release(place);
      place.next();
      ++taken;
    };
    int tile = last - 1;  // whose weights are in `scores`
#pragma unroll 1
    for (; tile > first && wanted; --tile) {
      Place<Config::kStages> values = place;
      values.next();
      set_apart(tile, values);
      auto weights = as_operand<typename Config::OutMma, Element, kKeys>(scores);
      const Place<Config::kStages> keys = place;
      await(keys);
      await(values);
      mma_order.wait();
      start_scores();
      place.next();
      start_values(weights);
      mma_order.pass();
      warpgroup_wait<1>();
      warpgroup_fence_operand(scores);
      release(keys);
      ++taken;
      wanted = weigh(tile - 1);
      finish_values(weights);
      if constexpr (Config::kSoftmax) fragment(out).scale_rows(factor);
    }
    // All scores are made. Broken sticks keep the rows until the ring is in order again.
    if (Config::kSoftmax && lane == 0) smem.q_empty[group].arrive();
    if (last > first) {
      if (tile > first) {  // keys that nobody looks at lie before the values
        await(place);
        release(place);
        place.next();
        ++taken;
      }
      set_apart(tile, place);
      auto weights = as_operand<typename Config::OutMma, Element, kKeys>(scores);
      await(place);
      start_values(weights);
      finish_values(weights);
    }
    if constexpr (!Config::kSoftmax) {
      if (consumer == 0) *static_cast<volatile int*>(&smem.stopped) = round + 1;
      smem.loaded_full.wait(round % 2);
      const int loaded = *static_cast<volatile int*>(&smem.loaded);
#pragma unroll 1
      for (; taken < loaded; ++taken) {
        await(place);
        release(place);
        place.next();
      }
      if (lane == 0) smem.q_empty[group].arrive();
    }

    if (smem.notes.any != 0) {
      smem.notes.add_to(fragment(out), line);
      any_consumer(false, kThreads);
      smem.notes.clear(consumer, kThreads);
      any_consumer(false, kThreads);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = mine + 8 * i;
      const bool there = r < num_rows(p);
      const float sum = Config::kSoftmax ? quad_sum(softmax.sum[i]) : 0.f;
      const bool none = sum == 0.f;
      const int64_t index = row_index(p, item.head, r);
      auto* row = static_cast<Element*>(p.out) + index * kD;
      store_row(there ? row : nullptr, fragment(out), i,
                !Config::kSoftmax ? 1.f
                : none            ? 0.f
                                  : 1.f / sum);
      if (there && lane % 4 == 0) {
        static_cast<float*>(p.state)[index] =
            !Config::kSoftmax ? (rest[i] < kLogTiny<float> ? 0.f : exponential(rest[i]))
            : none            ? -INFINITY
                              : softmax.max[i] * times * kLn2 + logf(sum);
      }
    }
  }
  mma_order.end();
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    moa_attention_sm90_kernel(const __grid_constant__ ForwardParams params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& smem = *reinterpret_cast<typename Config::Shared*>(shared);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&params.q);
    cute::prefetch_tma_descriptor(&params.k);
    cute::prefetch_tma_descriptor(&params.v);
    for (int g = 0; g < Config::kConsumers; ++g) {
      smem.q_full[g].init(1);
      smem.q_empty[g].init(kWarpgroup / kWarp);
    }
    for (int s = 0; s < Config::kStages; ++s) {
      smem.full[s].init(1);
      smem.empty[s].init(Config::kConsumers * kWarpgroup / kWarp);
    }
    smem.loaded_full.init(1);
    smem.stopped = 0;
    cutlass::arch::fence_barrier_init();
  }
  smem.notes.clear(static_cast<int>(threadIdx.x), Config::kThreads);
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x == 0) produce<Config>(params, smem);
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    consume<Config>(params, smem);
  }
}

template <class Config>
Status launch(const MoaAttentionParams& p, Stream stream) {
  ForwardParams params{};
  params.p = p;
  const int64_t row_tiles = ceil_div<int64_t>(p.num_tokens * p.num_slots, Config::kRows);
  const int64_t items = row_tiles * p.batch * p.num_heads;
  if (items == 0) return 0;
  if (items > INT32_MAX) return cudaErrorInvalidConfiguration;
  params.heads = static_cast<int>(p.batch * p.num_heads);
  params.items = static_cast<int>(items);
  params.capped = p.softcap > 0;
  params.scale = static_cast<float>(params.capped ? p.softcap : p.scale);
  params.tanh_times = params.capped ? static_cast<float>(2 * kLog2E * p.scale / p.softcap) : 0.f;
  TensorMap4dDesc q = rows_of_queries(p, p.q).desc;
  TensorMap4dDesc k = rows_of_keys(p, p.k).desc;
  TensorMap4dDesc v = rows_of_keys(p, p.v).desc;
  for (TensorMap4dDesc* d : {&q, &k, &v}) {
    d->box[0] = kSpan;
    d->box[1] = d == &q ? 64 : Config::kKeys;
  }
  MOE_TRY(encode_tensor_map(&params.q, q));
  MOE_TRY(encode_tensor_map(&params.k, k));
  MOE_TRY(encode_tensor_map(&params.v, v));
  return launch_items<moa_attention_sm90_kernel<Config>>(
      params, std::min<int64_t>(items, usable_sms()), Config::kThreads, Config::kSharedBytes,
      stream);
}

template <DType type, AttentionKind kKind>
Status run(const MoaAttentionParams& p, Stream stream) {
  return p.head_size == 64 ? launch<ForwardConfig<type, kKind, 64>>(p, stream)
                           : launch<ForwardConfig<type, kKind, 128>>(p, stream);
}

}  // namespace moe_ops::cuda::attention::sm90
