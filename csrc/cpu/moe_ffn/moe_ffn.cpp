// The FFN block in stages. Small experts go through it in blocks of tokens instead (blocks.cpp).
//
// Forward, in one parallel region: (1) up projection with x gathered while it is packed, bias and
// activation applied to the tile in cache, h kept in the accumulate type; (2) down projection into
// rows; (3) weighted sum of a token's rows, each output written once. Backward, in one region too:
// (1) u = W_down^T grad_y, unweighted, because <h, u> is then the gradient of the routing weight;
// (2) activation recomputed from the pre-activation; (3) gradients of weights and biases; (4) the
// gradient of x by rows; (5) its sum by token. Rows are computed and summed for one range of
// features after the other.
#include "moe_ops/moe_ffn.h"

#include <vector>

#include "cpu/gemm/act_rows.h"
#include "cpu/gemm/blocking.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/prepack.h"
#include "cpu/gemm/routed_rows.h"
#include "cpu/gemm/wgrad.h"
#include "cpu/kernels/activation.h"
#include "cpu/moe_ffn/blocks.h"

namespace moe_ops::cpu {

namespace {

// Features that are computed and summed by token together (kRangeBytes).
struct Range {
  int64_t begin, end;
  int64_t width() const { return end - begin; }
};
template <class T>
std::vector<Range> feature_ranges(const MoeFfnDesc& s, int64_t rows, int64_t narrowest) {
  const int64_t row_bytes = std::max<int64_t>(1, rows) * static_cast<int64_t>(sizeof(T));
  const int64_t width = std::max(narrowest, kRangeBytes / row_bytes / narrowest * narrowest);
  std::vector<Range> ranges;
  for (int64_t f = 0; f < s.hidden_size; f += width) {
    ranges.push_back({f, std::min(f + width, s.hidden_size)});
  }
  return ranges;
}

// Sums of the rows of a range, [rows, width], by token.
template <class T>
UnpermuteParams combine_params(const MoeFfnDesc& s, const Range& range, const T* rows,
                               bool weighted, void* y, DType y_type) {
  UnpermuteParams u = combination(s.routing, rows, kAccumulate<T>, range.width(),
                                  weighted ? s.topk_weights : nullptr,
                                  static_cast<char*>(y) + range.begin * dtype_size(y_type), y_type);
  u.y_stride = s.hidden_size;
  return u;
}

// The stages of such a product and of those that read its rows.
class RangeTasks {
 public:
  RangeTasks(TaskGraph& stages, size_t ranges)
      : stages_(stages), computed_(ranges), read_(ranges) {}

  // ready(expert): waits for what the items of an expert read; false: another item failed.
  // keep(range, expert, row, feature, n, values) puts values away.
  template <class T, class Ready, class Keep>
  void product(size_t i, const Range& range, const GemmDesc<T>& d, const GemmKernels<T>& k,
               const Parallel& par, const Ready& ready, const Keep& keep) {
    std::vector<GemmItem> items = gemm_items(d, par.num_threads, range.begin, range.end);
    const auto n = static_cast<int64_t>(items.size());
    const double share = static_cast<double>(range.width()) / static_cast<double>(d.features);
    computed_[i].add(n);
    stages_.add(n, d.cost() * share, [=, this, &d, &k, &par, items = std::move(items)](int64_t j) {
      if (i > 0 && !stages_.wait(read_[i - 1])) return;
      if (!ready(items[j].expert)) return;
      run_item(d, k, items[j], next_item(items, j, par),
               [&](int64_t e, int64_t r, int64_t f, int64_t count, T* v, T*) {
                 keep(range, e, r, f, count, v);
               });
      computed_[i].done();
    });
  }
  template <class Fn>
  void reader(size_t i, int64_t n, double cost, const Fn& fn) {
    read_[i].add(n);
    stages_.add(n, cost, [=, this](int64_t j) {
      if (!stages_.wait(computed_[i])) return;
      fn(j);
      read_[i].done();
    });
  }
  void combine(size_t i, const UnpermuteParams& u) {
    const double cost = unpermute_cost(u);
    const int64_t chunk = std::max<int64_t>(1, chunk_length(u.num_tokens, cost));
    reader(i, ceil_div(u.num_tokens, chunk), cost * static_cast<double>(u.num_tokens),
           [u, chunk](int64_t j) {
             unpermute_tokens(u, j * chunk, std::min(u.num_tokens, (j + 1) * chunk));
           });
  }

 private:
  TaskGraph& stages_;
  std::vector<Latch> computed_, read_;  // items that are not done, by range
};

template <class T>
GemmDesc<T> gemm_desc(const MoeFfnDesc& s, int64_t features, int64_t in_features, const Rows& a,
                      const ExpertMatrices& b) {
  GemmDesc<T> d;
  d.expert_offsets = s.routing.expert_offsets;
  d.num_experts = s.routing.num_experts;
  d.features = features;
  d.in_features = in_features;
  d.a = a;
  d.b = b;
  return d;
}

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
  const auto activate = [&](int64_t e, int64_t r, int64_t f, int64_t n, T* v0, T* v1) {
    for (int seg = 0; seg < up.segments; ++seg) {
      T* v = seg == 0 ? v0 : v1;
      const int64_t column = seg * I + f;
      if (p.b_gate_up.data != nullptr) {
        row_k.axpy(p.b_gate_up.type,
                   element(p.b_gate_up.data, p.b_gate_up.type, e * p.b_gate_up.stride_e + column),
                   T(1), v, n);
      }
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
    std::memcpy(out + r * range.width() + f - range.begin, v, static_cast<size_t>(n) * sizeof(T));
  };

  const std::vector<GemmItem> up_items = gemm_items(up, par.num_threads);
  std::vector<Latch> up_left(static_cast<size_t>(s.routing.num_experts));
  for (const GemmItem& it : up_items) up_left[it.expert].add();
  TaskGraph stages;
  stages.add(static_cast<int64_t>(up_items.size()), up.cost(), [&](int64_t i) {
    run_item(up, k, up_items[i], next_item(up_items, i, par), activate);
    up_left[up_items[i].expert].done();
  });
  RangeTasks by_range(stages, ranges.size());
  const auto ready = [&](int64_t e) { return stages.wait(up_left[e]); };
  for (size_t i = 0; i < ranges.size(); ++i) {
    by_range.product(i, ranges[i], down, k, par, ready, keep);
    by_range.combine(
        i, combine_params(s, ranges[i], out, !s.apply_router_weight_on_input, p.y, p.y_type));
  }
  stages.run(par);
}

// Rows [begin, end) of one expert.
struct RowItem {
  int64_t expert, begin, end;
};

template <class T>
void backward(const MoeFfnBwdParams& p, const Parallel& par) {
  const MoeFfnDesc& s = p.desc;
  const GemmKernels<T>& k = gemm_kernels<T>();
  const RowKernels<T>& row_k = row_kernels<T>();
  const ActivationKernels<T>& act_k = activation_kernels<T>();
  const int64_t I = s.intermediate_size, H = s.hidden_size, K = s.routing.top_k;
  const int64_t rows = s.routing.num_valid_rows();
  const bool gated = is_gated(s.act.kind);
  const int64_t width = s.width();
  const bool on_input = s.apply_router_weight_on_input;
  const DType type = p.x.type;
  ScratchScope scratch(ScratchScope::Keep::kUpTo256MiB);
  const RowMaps<T> maps = row_maps<T>(scratch, s.routing, s.topk_weights);
  T* grad_weights = static_cast<T*>(p.grad_topk_weights);
  if (grad_weights != nullptr) {
    std::fill(grad_weights, grad_weights + s.routing.num_tokens * K, T(0));
  }

  Rows gy = p.grad_y;
  gy.index = maps.token;
  Rows x = p.x;
  x.index = maps.token;

  // u = W_down^T grad_y: the matrix [I, H] is w_down transposed, which is a change of strides.
  // Nobody needs u when the gradient of x by rows is computed, so they share one block.
  const bool need_dx = p.grad_x != nullptr || (on_input && grad_weights != nullptr);
  std::vector<Range> ranges;
  if (need_dx) ranges = feature_ranges<T>(s, rows, kRowMajorFeatures / 2);
  T* u =
      scratch.take<T>(Scratch::kRows, rows * std::max(I, ranges.empty() ? 0 : ranges[0].width()));
  const GemmDesc<T> down = gemm_desc<T>(s, I, H, gy, transposed(p.w_down));
  const auto keep_u = [&](int64_t, int64_t r, int64_t f, int64_t n, T* v, T*) {
    std::memcpy(u + r * I + f, v, static_cast<size_t>(n) * sizeof(T));
  };

  // Pre-activation gradients; u becomes weight * h, the operand of the down weight gradient.
  // In bfloat16 where tokens are, as the products that read it round it anyway; in float16 it would
  // underflow.
  const DType dpre_type = type == DType::kBFloat16 ? type : kAccumulate<T>;
  const int64_t dpre_size = dtype_size(dpre_type);
  char* dpre = scratch.take<char>(Scratch::kHidden, rows * width * dpre_size);
  const bool interleaved = gated && s.act.interleaved;
  const bool read_direct = type == kAccumulate<T>, write_direct = dpre_type == kAccumulate<T>;
  const auto activation_rows = [&](const RowItem& it) {
    ScratchScope scratch;
    T* pre = scratch.take<T>(Scratch::kTile, 3 * width);
    T* halves = pre + width;
    T* grad = pre + 2 * width;
    for (int64_t r = it.begin; r < it.end; ++r) {
      T* ur = u + r * I;
      char* dr = dpre + r * width * dpre_size;
      const char* saved = element(p.preact, type, r * width);
      const T* gate = read_direct ? reinterpret_cast<const T*>(saved) : pre;
      if (!read_direct) row_k.load_row(type, saved, pre, width, T(1));
      if (interleaved) {
        deinterleave(gate, I, halves, halves + I);
        gate = halves;
      }
      T* to = write_direct && !interleaved ? reinterpret_cast<T*>(dr) : grad;
      // Of the unweighted u: <h, u> is the gradient of the routing weight.
      T g;
      act_k.backward({s.act.kind, 1, I, T(s.act.alpha), T(s.act.limit), gate,
                      gate + (gated ? I : 0), width, ur, I, on_input ? nullptr : maps.weight + r,
                      ur, I, to, to + I, width, &g});
      if (grad_weights != nullptr && !on_input) {
        if (p.b_down.data != nullptr) {
          g += row_k.dot_row(p.b_down.type,
                             element(p.b_down.data, p.b_down.type, it.expert * p.b_down.stride_e),
                             gy.type, row_of(gy, r), H);
        }
        grad_weights[s.routing.row_to_slot[r]] = g;
      }
      if (interleaved) {
        interleave(grad, grad + I, I, pre);
        row_k.store_row(dpre_type, pre, dr, width);
      } else if (!write_direct) {
        row_k.store_row(dpre_type, grad, dr, width);
      }
    }
  };

  const Rows hidden = {u, kAccumulate<T>, I, nullptr};
  const Rows dpre_rows = {dpre, dpre_type, width, nullptr};

  // The gradient of x by rows, and from there that of routing weights which scaled the input.
  T* dx = u;
  const GemmDesc<T> up = gemm_desc<T>(s, H, width, dpre_rows, transposed(p.w_gate_up));
  const auto keep_dx = [&](const Range& range, int64_t, int64_t r, int64_t f, int64_t n, T* v) {
    std::memcpy(dx + r * range.width() + f - range.begin, v, static_cast<size_t>(n) * sizeof(T));
  };

  const std::vector<GemmItem> down_items = gemm_items(down, par.num_threads);
  std::vector<RowItem> row_items;
  const double row_cost = static_cast<double>(I) * 4.0 + 2;
  const int64_t row_chunk = std::max<int64_t>(1, chunk_length(rows, row_cost));
  std::vector<Latch> u_left(static_cast<size_t>(s.routing.num_experts)), dpre_left(u_left.size());
  for (int64_t e = 0; e < s.routing.num_experts; ++e) {
    const int64_t end = s.routing.expert_offsets[e + 1];
    for (int64_t r = s.routing.expert_offsets[e]; r < end; r += row_chunk) {
      row_items.push_back({e, r, std::min(r + row_chunk, end)});
      dpre_left[e].add();
    }
  }
  for (const GemmItem& it : down_items) u_left[it.expert].add();
  Latch u_readers;  // items that read u
  u_readers.add(static_cast<int64_t>(row_items.size()));

  TaskGraph stages;
  stages.add(static_cast<int64_t>(down_items.size()), down.cost(), [&](int64_t i) {
    run_item(down, k, down_items[i], next_item(down_items, i, par), keep_u);
    u_left[down_items[i].expert].done();
  });
  stages.add(static_cast<int64_t>(row_items.size()), row_cost * static_cast<double>(rows),
             [&](int64_t i) {
               if (!stages.wait(u_left[row_items[i].expert])) return;
               activation_rows(row_items[i]);
               dpre_left[row_items[i].expert].done();
               u_readers.done();
             });
  const auto weight_gradient = [&](const Rows& grad, int64_t out_features, const Rows& a,
                                   int64_t in_features, const T* a_scale, void* out, DType out_type,
                                   bool accumulate) {
    if (out == nullptr) return;
    GroupedWgradParams w =
        routed_wgrad(s.routing, grad, out_features, a, in_features, out, out_type);
    w.a_scale = a_scale;
    w.accumulate = accumulate;
    const WgradPlan plan = wgrad_plan(w, par.num_threads);
    const bool reads_u = a.data == u;
    if (reads_u) u_readers.add(plan.count);
    stages.add(plan.count, plan.cost, [&, w, plan, reads_u](int64_t i) {
      if (!stages.wait(dpre_left[i / plan.parts])) return;
      run_wgrad_item(w, k, plan, i);
      if (reads_u) u_readers.done();
    });
  };
  weight_gradient(gy, H, hidden, I, nullptr, p.grad_w_down, p.grad_w_down_type,
                  p.accumulate_w_down);
  weight_gradient(dpre_rows, width, x, H, on_input ? maps.weight : nullptr, p.grad_w_gate_up,
                  p.grad_w_gate_up_type, p.accumulate_w_gate_up);
  const auto bias_gradient = [&](const Rows& grad, int64_t features, const T* scale, void* out) {
    if (out == nullptr || features == 0) return;
    const GroupedSumParams b = routed_sum(s.routing, grad, features, scale, out, type);
    stages.add(sum_items(b), sum_cost(b), [&, b](int64_t i) {
      if (stages.wait(dpre_left[i / (sum_items(b) / s.routing.num_experts)])) run_sum_item<T>(b, i);
    });
  };
  bias_gradient(dpre_rows, width, nullptr, p.grad_b_gate_up);
  bias_gradient(gy, H, on_input ? nullptr : maps.weight, p.grad_b_down);
  RangeTasks by_range(stages, ranges.size());
  // They write where u was: of any expert, since their rows have another length.
  const auto ready = [&](int64_t) { return stages.wait(u_readers); };
  for (size_t i = 0; i < ranges.size(); ++i) {
    const Range range = ranges[i];
    by_range.product(i, range, up, k, par, ready, keep_dx);
    if (on_input && grad_weights != nullptr) {
      by_range.reader(i, static_cast<int64_t>(row_items.size()),
                      (static_cast<double>(range.width()) / 8.0 + 2) * static_cast<double>(rows),
                      [&, range](int64_t j) {
                        for (int64_t r = row_items[j].begin; r < row_items[j].end; ++r) {
                          grad_weights[s.routing.row_to_slot[r]] += row_k.dot_row(
                              kAccumulate<T>, dx + r * range.width(), type,
                              element(row_of(x, r), type, range.begin), range.width());
                        }
                      });
    }
    if (p.grad_x != nullptr) {
      by_range.combine(i, combine_params(s, range, dx, on_input, p.grad_x, type));
    }
  }
  stages.run(par);
}

// One token reads small experts of fp32 as fast in the weights as they lie, which nobody has to
// check. With more tokens or larger experts, panels are ahead where weights come from memory. The
// two round differently.
bool prefers_weights(const MoeFfnParams& p) {
  const MoeFfnDesc& s = p.desc;
  return !batch_invariant() && s.routing.num_tokens == 1 && p.x.type == DType::kFloat32 &&
         p.w_gate_up.stride_k == 1 && p.w_down.stride_k == 1 &&
         (s.width() + s.intermediate_size) * s.hidden_size * dtype_size(p.x.type) <=
             kMostUnpackedBytes;
}

void choose_panels(MoeFfnParams& p) {
  if (p.w_gate_up.panels == nullptr) return;
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

void moe_ffn_bwd(const MoeFfnBwdParams& p, const Parallel& par) {
  if (takes_blocks(p)) return moe_ffn_blocks_bwd(p, par);
  p.x.type == DType::kFloat64 ? backward<double>(p, par) : backward<float>(p, par);
}

}  // namespace moe_ops::cpu
