// Backward by TMA and wgmma, in one kernel of five products.
//
// A block has 128 keys of a head and walks the rows that see them, 64 at a time, from the last to
// the first. Each of two consumer warpgroups has 64 of the keys: it makes the scores and the
// gradients of weights, rows by keys, and adds to the gradients of its keys and values, which stay
// in registers. Gradients of scores meet in shared memory, where each warpgroup multiplies them by
// half of the columns of all 128 keys: that is the block's part of grad_q.
//
// The parts of a head's blocks are summed in the order of keys, so that results have the same bits
// every time: a block adds to a tile of rows when the block of the keys before has done so. Blocks
// take the keys of a head in that order (a counter says which is next), so that whoever is waited
// for is running; and since all blocks go through the rows alike, each is a step ahead of the next.
// The last block of a tile writes grad_q. Stick-breaking hands on what it needs of the keys before
// in the same way.
#pragma once

#include <cutlass/arch/barrier.h>

#include "cuda/moa_attention/backward.h"
#include "cuda/moa_attention/sm90_backward_chain.cuh"
#include "cuda/moa_attention/sm90_backward_scores.cuh"
#include "cuda/moa_attention/sm90_common.cuh"

namespace moe_ops::cuda::attention::sm90 {

struct BackwardParams {
  CUtensorMap q, k, v, grad_out;  // boxes of 64 lines and 64 columns
  CUtensorMap k_columns;          // the keys once more, by half of their columns
  BackwardLaunch launch;
  Chain chain;
  int row_tiles;  // of 64 rows, of the band
};

template <DType type, AttentionKind kKindT, int kHeadSize>
struct BackwardConfig {
  using Element = Sm90Element<type>;
  static constexpr bool kSoftmax = kKindT == AttentionKind::kSoftmax;
  static constexpr int kD = kHeadSize;
  static constexpr int kConsumers = 2, kRows = 64, kKeys = 64 * kConsumers;
  static constexpr int kTile = 64 * kD;         // 64 lines
  static constexpr int kScores = 64 * 64;       // rows by the keys of a warpgroup
  static constexpr int kHalf = kD / 2;          // columns of grad_q of a warpgroup
  static constexpr int kHalfTile = 64 * kHalf;  // 64 lines of them
  static constexpr int kStages = 2;             // gradients of scores have as many
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  // Gradients of keys and values are 2 d registers a thread, and d are scores or a part of grad_q.
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr auto kK = cute::GMMA::Major::K, kMN = cute::GMMA::Major::MN;
  using ScoreMma = SharedMma<Element, 64, kD, kK, kK>;
  using GradKeyMma = SharedMma<Element, kD, 64, kMN, kMN>;
  using GradQMma = SharedMma<Element, kHalf, 64, kK, kMN>;

  struct Shared {
    alignas(1024) Element k[kConsumers * kTile];
    alignas(1024) Element v[kConsumers * kTile];
    // By 64 keys and half of the columns; what is not finite is set apart in `bad`.
    alignas(1024) Element k_columns[kConsumers * 2 * kHalfTile];
    alignas(1024) Element ring[kStages * 2 * kTile];  // a stage is rows of q and of the gradient
    alignas(1024) Element weights[kConsumers * kScores];
    alignas(1024) Element grads[kStages * kConsumers * kScores];  // of scores
    NotFinite<kKeys, kD> notes_k, notes_v;
    NotFinite<kKeys, kD> bad;           // keys themselves
    uint32_t row_nan[kRows * kD / 32];  // bits of grad_q that are NaN
    Sight<kRows> sight[kConsumers];
    float total[kRows];  // stick-breaking: sums over the keys of the first warpgroup
    KeyBlock at;
    Step steps[2 * kStages];     // what is left of a stage may be asked for its step
    Range seen[kStages][kRows];  // keys of the rows of a step, unless they see all
    alignas(8) cutlass::arch::ClusterTransactionBarrier keys_full;
    cutlass::arch::ClusterTransactionBarrier full[kStages];
    cutlass::arch::ClusterBarrier empty[kStages];
  };
  static_assert(sizeof(Shared) <= 227 * 1024);
};

template <class Config>
__device__ void produce(const BackwardParams& params, typename Config::Shared& smem) {
  constexpr int kD = Config::kD, kTile = Config::kTile, kStages = Config::kStages;
  const BackwardLaunch& launch = params.launch;
  const MoaAttentionParams& p = launch.b.fwd;
  const KeyBlock at = smem.at;
  const int lane = static_cast<int>(threadIdx.x), j0 = at.block * Config::kKeys;
  const Head head(p, at.item);
  if (lane == 0) {
    smem.keys_full.arrive_and_expect_tx(3 * Config::kConsumers * kTile * 2);
    for (int g = 0; g < Config::kConsumers; ++g) {
      load_box<64, kD>(&params.k, smem.keys_full, smem.k + g * kTile, j0 + 64 * g, head);
      load_box<64, kD>(&params.v, smem.keys_full, smem.v + g * kTile, j0 + 64 * g, head);
      load_box<64, kD, Config::kHalf>(&params.k_columns, smem.keys_full, smem.k_columns + g * kTile,
                                      j0 + 64 * g, head);
    }
  }
  // Tiles of rows that may see the keys. Offsets of sequences need not make sense, and whether a
  // block adds to a tile must not be a matter of opinion: then all tiles are asked.
  int begin = 0, end = params.row_tiles;
  if (p.sequences.data == nullptr) {
    const int base = launch.band * Config::kRows, slots = static_cast<int>(p.num_slots);
    const Range tokens = tokens_of(p, j0, min(j0 + Config::kKeys, static_cast<int>(p.num_keys)));
    begin = max(tokens.first * slots - base, 0) / Config::kRows;
    end = min((max(tokens.last * slots - base, 0) + Config::kRows - 1) / Config::kRows, end);
  }
  int n = 0;  // steps; step n has stage n % kStages
  const auto await_stage = [&] {
    if (lane == 0) smem.empty[n % kStages].wait(n / kStages % 2 ^ 1);
    __syncwarp();
  };
#pragma unroll 1
  for (int base = end; base > begin; base -= kWarp) {
    const int tile = base - 1 - lane;
    Range keys{};
    if (tile >= begin) {
      const int* range = params.chain.ranges + 2 * int64_t{at.item * launch.band_tiles + tile};
      keys = {range[0], range[1]};
    }
    const bool wanted = keys.first / 2 <= at.block && at.block * 2 < keys.last;
#pragma unroll 1
    for (uint32_t found = __ballot_sync(kAllLanes, wanted); found != 0; found &= found - 1, ++n) {
      const int from = __ffs(static_cast<int>(found)) - 1, stage = n % kStages;
      Step step{base - 1 - from, __shfl_sync(kAllLanes, keys.first, from),
                __shfl_sync(kAllLanes, keys.last, from), 0};
      await_stage();
      const int row = (launch.band + step.tile) * Config::kRows;
      const Range all = keys_of_all(p, row, min(row + Config::kRows, num_rows(p)));
      step.whole =
          row + Config::kRows <= num_rows(p) && all.first <= j0 && all.last >= j0 + Config::kKeys;
      if (!step.whole) {
        for (int i = lane; i < Config::kRows; i += kWarp) {
          smem.seen[stage][i] = keys_of_row(p, row + i);
        }
      }
      __syncwarp();
      if (lane == 0) {
        smem.steps[n % (2 * kStages)] = step;
        auto& full = smem.full[stage];
        full.arrive_and_expect_tx(2 * kTile * 2);
        auto* to = smem.ring + stage * 2 * kTile;
        load_box<64, kD>(&params.q, full, to, row, head);
        load_box<64, kD>(&params.grad_out, full, to + kTile, row, head);
      }
    }
  }
  await_stage();
  if (lane == 0) {
    smem.steps[n % (2 * kStages)].tile = -1;
    smem.full[n % kStages].arrive();
  }
}

template <class Config>
__device__ void consume(const BackwardParams& params, typename Config::Shared& smem) {
  using namespace cute;
  using Element = typename Config::Element;
  constexpr bool kSoftmax = Config::kSoftmax;
  constexpr int kD = Config::kD, kTile = Config::kTile, kScores = Config::kScores;
  constexpr int kStages = Config::kStages;
  constexpr int kThreads = Config::kConsumers * kWarpgroup;
  const BackwardLaunch& launch = params.launch;
  const Chain& chain = params.chain;
  const MoaAttentionParams& p = launch.b.fwd;
  const KeyBlock& at = smem.at;  // read where it is wanted: registers are scarce
  const int group = __shfl_sync(~0u, Consumer().warp() / 4, 0);
  const auto key_tile = [&] { return 2 * at.block + group; };
  const PlainLogits logits{static_cast<float>(p.scale)};
  const auto meet = [](bool any = false) { return any_consumer(any, kThreads); };
  const auto meet_group = [&] { cutlass::arch::NamedBarrier::sync(kWarpgroup, 1 + group); };

  auto grad_k = accumulators<typename Config::GradKeyMma, kD>();
  auto grad_v = accumulators<typename Config::GradKeyMma, kD>();
  auto scores = accumulators<typename Config::ScoreMma, 64>();
  auto products = accumulators<typename Config::ScoreMma, 64>();
  clear(grad_k);
  clear(grad_v);
  auto &s = fragment(scores), &dp = fragment(products);
  const auto keys = as_rows<Element, 64, kD>(smem.k + group * kTile);
  const auto values = as_rows<Element, 64, kD>(smem.v + group * kTile);
  Element* const weights = smem.weights + group * kScores;

  smem.keys_full.wait(0);
  set_keys_apart<Config>(smem, Consumer().index, kThreads);
  float a[2], b[2];  // log-sum-exp (base 2) and delta, or the log length of the stick
  // Waits for step n and loads these numbers; whether there is such a step.
  const auto begin_step = [&](int n) {
    smem.full[n % kStages].wait(n / kStages % 2);
    const Step& step = smem.steps[n % (2 * kStages)];
    if (step.tile < 0) return false;
    load_step<kSoftmax>(launch, at, step, key_tile(), Consumer().line(), a, b);
    return true;
  };
  bool more = begin_step(0);
#pragma unroll 1
  for (int n = 0; more; ++n) {
    const int stage = n % kStages;
    const Step& step = smem.steps[n % (2 * kStages)];
    Element* const q = smem.ring + stage * 2 * kTile;
    Element* const grad_out = q + kTile;
    Element* const grads = smem.grads + stage * Config::kConsumers * kScores;
    warpgroup_fence_operand(scores);
    warpgroup_fence_operand(products);
    warpgroup_arrive();
    start_product<typename Config::ScoreMma>(as_rows<Element, 64, kD>(q), keys, scores,
                                             GMMA::ScaleOut::Zero);
    warpgroup_commit_batch();
    start_product<typename Config::ScoreMma>(as_rows<Element, 64, kD>(grad_out), values, products,
                                             GMMA::ScaleOut::Zero);
    warpgroup_commit_batch();

    const auto link = [&] { return Link(launch, at, step); };
    const auto seen = [&] { return smem.seen[stage] + Consumer().line(); };
    bool empty = false;
    if constexpr (!kSoftmax) empty = a[0] < kLogTiny<float> || a[1] < kLogTiny<float>;
    const bool unmasked =
        __all_sync(~0u, !empty && (step.whole || see_all(seen(), 64 * key_tile())));
    // The keys that rows see are read again where they are needed rather than kept, and so are the
    // lengths of sticks where that is rare.
    const auto mask_of_step = [&](const float (&log_rest)[2]) {
      Mask mask = step.whole ? Mask{{-8, -8}, {64, 64}} : mask_of_rows(seen(), 64 * key_tile());
      if constexpr (!kSoftmax) mask.leave_out_empty_sticks(log_rest);
      return mask;
    };
    const auto keep_sight = [&] {
      float log_rest[2], unused[2];
      load_step<kSoftmax>(launch, at, step, key_tile(), Consumer().line(), log_rest, unused);
      smem.sight[group].keep(mask_of_step(log_rest), Consumer().line());
      meet();
    };
    float before[2], total[2];  // stick-breaking: sums over the keys to the left, and over ours
    if constexpr (kSoftmax) {
      warpgroup_wait<1>();
      warpgroup_fence_operand(scores);
      const float times = logits.scale * kLog2E;
      if (unmasked) {
        weigh(s, NoMask{}, times, a);
      } else {
        weigh(s, mask_of_step(a), times, a);
      }
      store_scores<Element>(score_address(weights), s);
      warpgroup_wait<0>();
      warpgroup_fence_operand(products);
    } else {
      warpgroup_wait<0>();
      warpgroup_fence_operand(scores);
      warpgroup_fence_operand(products);
      logits.apply(s);
      if (!unmasked) {
        const Mask mask = mask_of_step(a);
        mask_scores(s, mask, kNoShare);
        mask_scores(dp, mask, 0.f);
      }
      break_for_gradient<Element>(s, dp, a, score_address(weights));
      gradient_within(s, dp, total);
      if (const Consumer me; group == 0 && me.lane() % 4 == 0) {
        smem.total[me.line()] = total[0];
        smem.total[me.line() + 8] = total[1];
      }
      take_sums(launch, chain, link(), at, step, Consumer().line(), before);
    }
    // Rows of q and of the gradient that are not finite, if some row does not see all keys. All
    // scores and products are made here.
    bool apart = !step.whole;
    if constexpr (!kSoftmax) apart = meet(apart || empty);
    if (apart && meet(has_not_finite<2 * kTile>(q, Consumer().index, kThreads))) {
      keep_sight();
      set_rows_apart<Config>(smem, q, grad_out, Consumer().index, kThreads);
      meet();
    }
    if (smem.bad.any != 0) {
      keep_sight();
      note_bad_keys<Config>(smem, Consumer().index, kThreads);
      meet();
    }
    cutlass::arch::fence_view_async_shared();
    meet_group();
    warpgroup_fence_operand(grad_v);
    warpgroup_arrive();
    start_product<typename Config::GradKeyMma>(as_columns<Element, 64, 64>(weights),
                                               as_columns<Element, 64, kD>(grad_out), grad_v,
                                               GMMA::ScaleOut::One);
    warpgroup_commit_batch();

    if constexpr (kSoftmax) {
      if (unmasked) {
        softmax_gradient(s, dp, NoMask{}, b);
      } else {
        softmax_gradient(s, dp, mask_of_step(a), b);
      }
    } else {
      if (group == 1) {
#pragma unroll
        for (int i = 0; i < 2; ++i) before[i] += smem.total[Consumer().line() + 8 * i];
        leave_sums(chain, link(), Consumer().line(), before, total);
      }
      add_before(s, dp, before);
    }
    store_scores<Element>(score_address(grads + group * kScores), dp);
    auto grad_q = accumulators<typename Config::GradQMma, Config::kHalf>();
    take_part(chain, link(), Consumer().warp(), fragment(grad_q));
    cutlass::arch::fence_view_async_shared();
    meet();
    warpgroup_fence_operand(grad_k);
    warpgroup_fence_operand(grad_q);
    warpgroup_arrive();
    start_product<typename Config::GradKeyMma>(as_columns<Element, 64, 64>(grads + group * kScores),
                                               as_columns<Element, 64, kD>(q), grad_k,
                                               GMMA::ScaleOut::One);
    warpgroup_commit_batch();
#pragma unroll
    for (int g = 0; g < Config::kConsumers; ++g) {
      start_product<typename Config::GradQMma>(
          as_rows<Element, 64, 64>(grads + g * kScores),
          as_columns<Element, 64, Config::kHalf>(smem.k_columns + g * kTile +
                                                 group * Config::kHalfTile),
          grad_q, GMMA::ScaleOut::One);
    }
    warpgroup_commit_batch();

    // Numbers of the next step's rows come while these products run.
    more = begin_step(n + 1);
    warpgroup_wait<1>();
    warpgroup_fence_operand(grad_v);
    warpgroup_fence_operand(grad_k);
    if (Consumer().lane() == 0) smem.empty[stage].arrive();
    warpgroup_wait<0>();
    warpgroup_fence_operand(grad_q);
    auto& dq = fragment(grad_q);
    if (smem.bad.any != 0) add_nan<Config>(smem, dq);
    if (link().last) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = (launch.band + step.tile) * 64 + Consumer().line() + 8 * i;
        auto* to = static_cast<Element*>(launch.b.grad_q) + at.row(p, r) * kD;
        store_row(r < num_rows(p) ? to + group * Config::kHalf : nullptr, dq, i, logits.scale);
      }
    } else {
      leave_part(chain, link(), Consumer().warp(), dq);
    }
  }
  const int line = Consumer().line();
  if (smem.notes_k.any != 0) smem.notes_k.add_to(fragment(grad_k), 64 * group + line);
  if (smem.notes_v.any != 0) smem.notes_v.add_to(fragment(grad_v), 64 * group + line);
  store_keys<kD>(launch, at, fragment(grad_k), 64 * key_tile() + line,
                 static_cast<Element*>(launch.b.grad_k), static_cast<float*>(launch.sum_k),
                 logits.scale);
  store_keys<kD>(launch, at, fragment(grad_v), 64 * key_tile() + line,
                 static_cast<Element*>(launch.b.grad_v), static_cast<float*>(launch.sum_v), 1.f);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    moa_attention_sm90_bwd_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& smem = *reinterpret_cast<typename Config::Shared*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    smem.keys_full.init(1);
    for (int s = 0; s < Config::kStages; ++s) {
      smem.full[s].init(1);
      smem.empty[s].init(Config::kConsumers * kWarpgroup / kWarp);
    }
    cutlass::arch::fence_barrier_init();
    smem.at = KeyBlock(params.launch.b.fwd, atomicAdd(params.chain.next_item, 1));
  }
  smem.notes_k.clear(thread, Config::kThreads);
  smem.notes_v.clear(thread, Config::kThreads);
  smem.bad.clear(thread, Config::kThreads);
  __syncthreads();
  if (thread < kWarpgroup) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    if (thread < kWarp) produce<Config>(params, smem);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    consume<Config>(params, smem);
  }
}

template <class Config>
Status launch_band(const BackwardLaunch& launch, const Chain& chain, Stream stream) {
  const MoaAttentionBwdParams& b = launch.b;
  const MoaAttentionParams& p = b.fwd;
  BackwardParams params{};
  params.launch = launch;
  params.chain = chain;
  const int64_t rows =
      std::min<int64_t>(launch.band_tiles * 64, p.num_tokens * p.num_slots - launch.band * 64);
  params.row_tiles = static_cast<int>(ceil_div<int64_t>(rows, Config::kRows));
  const auto encode = [](CUtensorMap& map, TensorMap4dDesc d, int columns) {
    d.box[0] = columns;
    d.box[1] = 64;
    d.swizzle_bytes = 2 * columns;
    return encode_tensor_map(&map, d);
  };
  MOE_TRY(encode(params.q, rows_of_queries(p, p.q).desc, kSpan));
  MOE_TRY(encode(params.grad_out, rows_of_queries(p, b.grad_out).desc, kSpan));
  MOE_TRY(encode(params.k, rows_of_keys(p, p.k).desc, kSpan));
  MOE_TRY(encode(params.v, rows_of_keys(p, p.v).desc, kSpan));
  MOE_TRY(encode(params.k_columns, rows_of_keys(p, p.k).desc, Config::kHalf));
  const int64_t heads = heads_of(p);
  const int64_t blocks = ceil_div<int64_t>(p.num_keys, Config::kKeys) * heads;
  const int64_t tiles = heads * launch.band_tiles;
  MOE_TRY(launch_kernel<moa_attention_sm90_chain_kernel<Config::kSoftmax>>(
      Launch{static_cast<unsigned>(ceil_div<int64_t>(tiles, 128)), 128, stream}, launch, chain));
  return launch_items<moa_attention_sm90_bwd_kernel<Config>>(
      params, blocks, Config::kThreads, sizeof(typename Config::Shared), stream);
}

template <DType type, AttentionKind kKind>
Status run_band(const BackwardLaunch& launch, const Chain& chain, Stream stream) {
  return launch.b.fwd.head_size == 128
             ? launch_band<BackwardConfig<type, kKind, 128>>(launch, chain, stream)
             : launch_band<BackwardConfig<type, kKind, 64>>(launch, chain, stream);
}

}  // namespace moe_ops::cuda::attention::sm90
