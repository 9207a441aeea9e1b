// The FFN block in stages. Small experts go through it in blocks of tokens instead (blocks.cpp);
// backward.cpp has the backward.
//
// All stages run in one parallel region: (1) up projection with x gathered while it is packed, bias
// and activation applied to the tile in cache, h kept in the accumulate type; (2) down projection
// into rows; (3) weighted sum of a token's rows, each output written once. Rows are computed and
// summed for one range of features after the other.
#include "moe_ops/moe_ffn.h"

#include <vector>

#include "cpu/gemm/act_rows.h"
#include "cpu/gemm/blocking.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/prepack.h"
#include "cpu/gemm/routed_rows.h"
#include "cpu/kernels/activation.h"
#include "cpu/moe_ffn/blocks.h"
#include "cpu/moe_ffn/low_rank.h"
#include "cpu/moe_ffn/ranges.h"

namespace moe_ops::cpu {

namespace {

template <class T>
void forward(const MoeFfnParams& p, const Parallel& par) {
  const MoeFfnDesc& s = p.desc;
  const GemmKernels<T>& k = gemm_kernels<T>();
  const RowKernels<T>& row_k = row_kernels<T>();
  const ActivationKernels<T>& act_k = activation_kernels<T>();
  const int64_t I = s.intermediate_size, H = s.hidden_size;
  const int64_t rows = s.routing.num_valid_rows();
  const bool gated = is_gated(s.act.kind);
  const bool halves = gated && !s.act.interleaved;
  const int64_t width = s.width();
  const DType type = p.x.type;
  ScratchScope scratch(ScratchScope::Keep::kUpTo256MiB);
  const RowMaps<T> maps = row_maps<T>(scratch, s.routing, s.topk_weights);

  T* h = scratch.take<T>(Scratch::kHidden, rows * I);
  Rows x = p.x;
  x.index = maps.token;
  GemmDesc<T> up = gemm_desc<T>(s, halves ? I : width, H, x, p.w_gate_up);
  up.segments = halves ? 2 : 1;
  up.feature_unit = gated && s.act.interleaved ? 2 : 1;
  if (s.apply_router_weight_on_input) up.a_scale = maps.weight;
  up.k_scale = p.x_scale;
  const LowRank<T> low_rank(p.low_rank, s, false, par, scratch);
  const bool up_term = low_rank.a_up.rank > 0, down_term = low_rank.a_down.rank > 0;
  LowRows<T> low_up = {up_term ? static_cast<T*>(p.low_rank->low_gate_up) : nullptr, {}};
  LowRows<T> low_down = {down_term ? static_cast<T*>(p.low_rank->low_down) : nullptr, {}};
  const auto activate = [&](int64_t e, int64_t r, int64_t f, int64_t n, T* v0, T* v1) {
    for (int seg = 0; seg < up.segments; ++seg) {
      T* v = seg == 0 ? v0 : v1;
      const int64_t column = seg * I + f;
      if (p.b_gate_up.data != nullptr) {
        row_k.axpy(p.b_gate_up.type,
                   element(p.b_gate_up.data, p.b_gate_up.type, e * p.b_gate_up.stride_e + column),
                   T(1), v, n);
      }
      if (up_term) low_rank.add_term(low_up, low_rank.b_up, r, column, n, v);
      if (p.preact != nullptr) {
        row_k.store_row(type, v,
                        static_cast<char*>(p.preact) + (r * width + column) * dtype_size(type), n);
      }
    }
    if (gated && s.act.interleaved) {
      T buffer[2 * kFeatureBlock];
      for (int64_t i = 0; i < n; i += 2 * kFeatureBlock) {
        const int64_t m = std::min(2 * kFeatureBlock, n - i) / 2;
        deinterleave(v0 + i, m, buffer, buffer + m);
        act_k.forward({s.act.kind, 1, m, T(s.act.alpha), T(s.act.limit), buffer, buffer + m, 0,
                       h + r * I + (f + i) / 2, 0});
      }
    } else {
      act_k.forward(
          {s.act.kind, 1, n, T(s.act.alpha), T(s.act.limit), v0, v1, 0, h + r * I + f, 0});
    }
  };

  // In training backward takes the same block, and no more of it. In inference whole rows, so that
  // items of packed weights may be as wide.
  const std::vector<Range> ranges = feature_ranges<T>(
      s, rows, p.preact != nullptr ? kRowMajorFeatures / 2 : std::max<int64_t>(1, H));
  T* out = scratch.take<T>(Scratch::kRows, rows * (ranges.empty() ? 0 : ranges[0].width()));
  const Rows hidden = {h, kAccumulate<T>, I, nullptr};
  const GemmDesc<T> down = gemm_desc<T>(s, H, I, hidden, p.w_down);
  const auto keep = [&](const Range& range, int64_t e, int64_t r, int64_t f, int64_t n, T* v) {
    if (p.b_down.data != nullptr) {
      row_k.axpy(p.b_down.type, element(p.b_down.data, p.b_down.type, e * p.b_down.stride_e + f),
                 T(1), v, n);
    }
    if (down_term) low_rank.add_term(low_down, low_rank.b_down, r, f, n, v);
    std::memcpy(out + r * range.width() + f - range.begin, v, static_cast<size_t>(n) * sizeof(T));
  };

  const std::vector<GemmItem> up_items = gemm_items(up, par.num_threads);
  std::vector<Latch> up_left(static_cast<size_t>(s.routing.num_experts));
  for (const GemmItem& it : up_items) up_left[it.expert].add();
  TaskGraph stages;
  if (up_term) {
    low_rank.add_product(stages, x, up.a_scale, low_rank.a_up, low_up,
                         [](int64_t) { return true; });
  }
  stages.add(static_cast<int64_t>(up_items.size()), up.cost(), [&](int64_t i) {
    if (!stages.wait(low_up.left)) return;
    run_item(up, k, up_items[i], next_item(up_items, i, par), activate);
    up_left[up_items[i].expert].done();
  });
  const auto has_hidden = [&](int64_t e) { return stages.wait(up_left[e]); };
  if (down_term) {
    low_rank.add_product(stages, hidden, nullptr, low_rank.a_down, low_down, has_hidden);
  }
  RangeTasks by_range(stages, ranges.size());
  const auto ready = [&](int64_t e) { return has_hidden(e) && stages.wait(low_down.left); };
  for (size_t i = 0; i < ranges.size(); ++i) {
    by_range.product(i, ranges[i], down, k, par, ready, keep);
    by_range.combine(
        i, combine_params(s, ranges[i], out, !s.apply_router_weight_on_input, p.y, p.y_type));
  }
  stages.run(par);
}

// Returns whether the unpacked weights are used: for one token and small fp32 experts they are as
// fast as panels, which would have to be checked. With more tokens or larger experts, panels are
// faster if weights come from memory. The two round differently.
bool prefers_weights(const MoeFfnParams& p) {
  const MoeFfnDesc& s = p.desc;
  return !batch_invariant() && s.routing.num_tokens == 1 && p.x.type == DType::kFloat32 &&
         p.w_gate_up.stride_k == 1 && p.w_down.stride_k == 1 &&
         (s.width() + s.intermediate_size) * s.hidden_size * dtype_size(p.x.type) <=
             kMostUnpackedBytes;
}

// Takes away panels that are slower or outdated; without weights there is no choice.
void choose_panels(MoeFfnParams& p) {
  if (p.w_gate_up.panels == nullptr || p.w_gate_up.data == nullptr) return;
  if (prefers_weights(p)) {
    p.w_gate_up.panels = p.w_down.panels = nullptr;
    return;
  }
  const MoeFfnDesc& s = p.desc;
  const int64_t segments = is_gated(s.act.kind) && !s.act.interleaved ? 2 : 1;
  PackedWeight weights[] = {{&p.w_gate_up, s.width(), s.hidden_size, segments},
                            {&p.w_down, s.hidden_size, s.intermediate_size, 1}};
  drop_stale_panels(s.routing, weights);
}

}  // namespace

void moe_ffn(const MoeFfnParams& given, const Parallel& par) {
  MoeFfnParams p = given;
  ScratchScope scratch(ScratchScope::Keep::kUpTo256MiB);
  p.desc.routing = sorted(scratch, p.desc.routing);
  choose_panels(p);
  if (takes_blocks(p)) {
    moe_ffn_blocks(p, par);
  } else {
    p.x.type == DType::kFloat64 ? forward<double>(p, par) : forward<float>(p, par);
  }
  if (p.preact == nullptr) return;
  const int64_t row_bytes = p.desc.width() * dtype_size(p.x.type);
  const int64_t rows = p.desc.routing.num_valid_rows(), rest = p.desc.routing.num_slots() - rows;
  if (rest * row_bytes == 0) return;
  std::memset(static_cast<char*>(p.preact) + rows * row_bytes, 0,
              static_cast<size_t>(rest * row_bytes));
}

}  // namespace moe_ops::cpu
