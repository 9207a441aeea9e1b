// Backward of the FFN block in stages, all of them in one parallel region. Small experts go through
// it in blocks of tokens instead (blocks.cpp).
//
// (1) u = W_down^T grad_y, unweighted, because <h, u> is then the gradient of the routing weight;
// (2) the activation is recomputed from the pre-activation; (3) gradients of weights and biases;
// (4) the gradient of x by rows; (5) its sum by token. The gradient of x is computed and summed for
// one range of features after the other. Low-rank terms of the weights (low_rank.h) add a product
// in front of (1) and (4), whose tiles get their sums, and the gradients of their factors to (3).
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/gemm/act_rows.h"
#include "cpu/gemm/blocking.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/routed_rows.h"
#include "cpu/gemm/wgrad.h"
#include "cpu/kernels/activation.h"
#include "cpu/moe_ffn/blocks.h"
#include "cpu/moe_ffn/low_rank.h"
#include "cpu/moe_ffn/ranges.h"
#include "moe_ops/moe_ffn.h"

namespace moe_ops::cpu {

namespace {

// Rows [begin, end) of one expert.
struct RowItem {
  int64_t expert, begin, end;
};

// One call: its operands, its buffers, and the tasks that its stages add to one graph.
template <class T>
class Backward {
 public:
  Backward(const MoeFfnBwdParams& params, const Parallel& parallel) : p_(params), par_(parallel) {}

  void run() {
    clear_router_weight_gradient();
    count_items();
    add_output_terms();
    add_down_product();
    add_activation();
    add_down_factor_gradients();
    add_gate_up_factor_gradients();
    add_weight_gradients();
    add_bias_gradients();
    add_input_gradient();
    stages_.run(par_);
  }

 private:
  // Sets the gradient of the routing weights to zero, since skipped slots have no row to write it.
  void clear_router_weight_gradient() {
    if (grad_weights_ == nullptr) return;
    std::fill(grad_weights_, grad_weights_ + s_.routing.num_tokens * s_.routing.top_k, T(0));
  }

  // Splits the rows into items and counts, for each expert, the items that others wait for.
  void count_items() {
    const int64_t chunk = std::max<int64_t>(1, chunk_length(rows_, row_cost()));
    for (int64_t e = 0; e < s_.routing.num_experts; ++e) {
      const int64_t end = s_.routing.expert_offsets[e + 1];
      for (int64_t r = s_.routing.expert_offsets[e]; r < end; r += chunk) {
        row_items_.push_back({e, r, std::min(r + chunk, end)});
        dpre_left_[e].add();
      }
    }
    for (const GemmItem& it : down_items_) u_left_[it.expert].add();
    u_readers_.add(static_cast<int64_t>(row_items_.size()));
  }

  // Adds the product of grad_y with factor b of w_down, of which u gets its low-rank term.
  void add_output_terms() {
    if (low_rank_.b_down.rank == 0) return;
    low_rank_.add_product(stages_, gy_, nullptr, low_rank_.b_down, low_out_,
                          [](int64_t) { return true; });
  }

  // Adds stage 1, which computes u = W_down^T grad_y; transposing w_down only changes its strides.
  void add_down_product() {
    stages_.add(static_cast<int64_t>(down_items_.size()), down_.cost(), [this](int64_t i) {
      if (!stages_.wait(low_out_.left)) return;
      run_item(down_, k_, down_items_[i], next_item(down_items_, i, par_),
               [this](int64_t, int64_t r, int64_t f, int64_t n, T* v, T*) {
                 if (low_rank_.a_down.rank > 0) {
                   low_rank_.add_term(low_out_, low_rank_.a_down, r, f, n, v);
                 }
                 std::memcpy(u_ + r * I_ + f, v, static_cast<size_t>(n) * sizeof(T));
               });
      u_left_[down_items_[i].expert].done();
    });
  }

  // Adds stage 2, which computes the gradients of the pre-activation and of the routing weights,
  // and replaces u by weight * h, the operand of w_down's gradient.
  void add_activation() {
    stages_.add(static_cast<int64_t>(row_items_.size()), row_cost() * static_cast<double>(rows_),
                [this](int64_t i) {
                  if (!stages_.wait(u_left_[row_items_[i].expert])) return;
                  activate(row_items_[i]);
                  dpre_left_[row_items_[i].expert].done();
                  u_readers_.done();
                });
  }

  // Adds the gradients of w_down's factors; rows of h are weight * h, which has replaced u.
  void add_down_factor_gradients() {
    const Factor<T>&a = low_rank_.a_down, &b = low_rank_.b_down;
    if (a.rank == 0) return;
    const auto* low_h = static_cast<const T*>(p_.low_rank->low_down);
    const Rows h = {u_, kAccumulate<T>, I_, nullptr};
    add_factor_gradient({low_h, b.rank, gy_, H_, on_input_ ? nullptr : maps_.weight, b.shared, true,
                         p_.grad_low_rank.b_down},
                        nullptr);
    add_factor_gradient(
        {low_out_.data, a.rank, h, I_, nullptr, a.shared, false, p_.grad_low_rank.a_down}, nullptr);
  }

  // Adds the product of the pre-activation's gradients with factor b of w_gate_up, of which the
  // gradient of x gets its low-rank term, and the gradients of w_gate_up's factors.
  void add_gate_up_factor_gradients() {
    const Factor<T>&a = low_rank_.a_up, &b = low_rank_.b_up;
    if (a.rank == 0) return;
    const LowRankGradients& grad = p_.grad_low_rank;
    if (grad.a_gate_up != nullptr || !ranges_.empty()) {
      low_rank_.add_product(stages_, dpre_rows_, nullptr, b, low_pre_,
                            [this](int64_t e) { return stages_.wait(dpre_left_[e]); });
    }
    const auto* low_x = static_cast<const T*>(p_.low_rank->low_gate_up);
    add_factor_gradient(
        {low_x, b.rank, dpre_rows_, width_, nullptr, b.shared, true, grad.b_gate_up}, nullptr);
    add_factor_gradient({low_pre_.data, a.rank, x_, H_, on_input_ ? maps_.weight : nullptr,
                         a.shared, false, grad.a_gate_up},
                        &low_pre_.left);
  }

  // Adds the gradient of one factor, which waits for its experts' pre-activation gradients and for
  // `product` unless nullptr.
  void add_factor_gradient(const FactorGradient<T>& gradient, const Latch* product) {
    low_rank_.add_gradient(stages_, gradient, u_readers_, [this, product](int64_t e) {
      return stages_.wait(dpre_left_[e]) && (product == nullptr || stages_.wait(*product));
    });
  }

  // Adds stage 3, which computes the gradients of w_down and w_gate_up from rows of grad_y and x.
  void add_weight_gradients() {
    GroupedWgradParams of_down =
        routed_wgrad(s_.routing, gy_, H_, {u_, kAccumulate<T>, I_, nullptr}, I_, p_.grad_w_down,
                     p_.grad_w_down_type);
    of_down.accumulate = p_.accumulate_w_down;
    add_weight_gradient(of_down);
    GroupedWgradParams of_up = routed_wgrad(s_.routing, dpre_rows_, width_, x_, H_,
                                            p_.grad_w_gate_up, p_.grad_w_gate_up_type);
    of_up.a_scale = on_input_ ? maps_.weight : nullptr;
    of_up.accumulate = p_.accumulate_w_gate_up;
    add_weight_gradient(of_up);
  }

  // Adds the tasks of one weight gradient, which wait for their expert's pre-activation gradients.
  void add_weight_gradient(const GroupedWgradParams& w) {
    if (w.out == nullptr) return;
    const WgradPlan plan = wgrad_plan(w, par_.num_threads);
    const bool reads_u = w.a.data == u_;
    if (reads_u) u_readers_.add(plan.count);
    stages_.add(plan.count, plan.cost, [this, w, plan, reads_u](int64_t i) {
      if (!stages_.wait(dpre_left_[i / plan.parts])) return;
      run_wgrad_item(w, k_, plan, i);
      if (reads_u) u_readers_.done();
    });
  }

  // Adds the rest of stage 3, which sums the rows of each expert to the gradients of the biases.
  void add_bias_gradients() {
    add_bias_gradient(dpre_rows_, width_, nullptr, p_.grad_b_gate_up);
    add_bias_gradient(gy_, H_, on_input_ ? nullptr : maps_.weight, p_.grad_b_down);
  }

  // Adds the tasks of one bias gradient: sums of `grad` [rows, features] times `scale`.
  void add_bias_gradient(const Rows& grad, int64_t features, const T* scale, void* out) {
    if (out == nullptr || features == 0) return;
    const GroupedSumParams b = routed_sum(s_.routing, grad, features, scale, out, type_);
    stages_.add(sum_items(b), sum_cost(b), [this, b](int64_t i) {
      if (stages_.wait(dpre_left_[i / (sum_items(b) / s_.routing.num_experts)]))
        run_sum_item<T>(b, i);
    });
  }

  // Adds stages 4 and 5, which compute the gradient of x by rows and sum it by token, range after
  // range; its rows also give the gradient of routing weights that scaled the input.
  void add_input_gradient() {
    for (size_t i = 0; i < ranges_.size(); ++i) {
      add_up_product(i);
      if (on_input_ && grad_weights_ != nullptr) add_input_weight_gradient(i);
      if (p_.grad_x != nullptr) {
        by_range_.combine(i, combine_params(s_, ranges_[i], dx_, on_input_, p_.grad_x, type_));
      }
    }
  }

  // Adds the product of a range; it writes where u was, so it waits for all readers of u, whatever
  // their expert, since the rows of the two have different lengths.
  void add_up_product(size_t i) {
    by_range_.product(
        i, ranges_[i], up_, k_, par_,
        [this](int64_t) { return stages_.wait(u_readers_) && stages_.wait(low_pre_.left); },
        [this](const Range& range, int64_t, int64_t r, int64_t f, int64_t n, T* v) {
          if (low_rank_.a_up.rank > 0) {
            low_rank_.add_term(low_pre_, low_rank_.a_up, r, f, n, v);
          }
          std::memcpy(dx_ + r * range.width() + f - range.begin, v,
                      static_cast<size_t>(n) * sizeof(T));
        });
  }

  // Adds a range's share of <dx, x> to the gradients of the routing weights.
  void add_input_weight_gradient(size_t i) {
    const Range range = ranges_[i];
    const double cost = static_cast<double>(range.width()) / 8.0 + 2;
    by_range_.reader(i, static_cast<int64_t>(row_items_.size()), cost * static_cast<double>(rows_),
                     [this, range](int64_t j) {
                       for (int64_t r = row_items_[j].begin; r < row_items_[j].end; ++r) {
                         grad_weights_[s_.routing.row_to_slot[r]] += row_k_.dot_row(
                             kAccumulate<T>, dx_ + r * range.width(), type_,
                             element(row_of(x_, r), type_, range.begin), range.width());
                       }
                     });
  }

  // Computes stage 2 for the rows of one item.
  void activate(const RowItem& it) {
    ScratchScope tile;
    T* pre = tile.take<T>(Scratch::kTile, 3 * width_);
    T* halves = pre + width_;
    T* grad = pre + 2 * width_;
    const bool read_direct = type_ == kAccumulate<T>, write_direct = dpre_type_ == kAccumulate<T>;
    for (int64_t r = it.begin; r < it.end; ++r) {
      T* ur = u_ + r * I_;
      char* dr = dpre_ + r * width_ * dtype_size(dpre_type_);
      const char* saved = element(p_.preact, type_, r * width_);
      const T* gate = read_direct ? reinterpret_cast<const T*>(saved) : pre;
      if (!read_direct) row_k_.load_row(type_, saved, pre, width_, T(1));
      if (interleaved_) {
        deinterleave(gate, I_, halves, halves + I_);
        gate = halves;
      }
      T* to = write_direct && !interleaved_ ? reinterpret_cast<T*>(dr) : grad;
      T dot;  // <h, u> with the unweighted u
      act_k_.backward({.kind = s_.act.kind,
                       .rows = 1,
                       .n = I_,
                       .alpha = T(s_.act.alpha),
                       .limit = T(s_.act.limit),
                       .gate = gate,
                       .up = gate + (gated_ ? I_ : 0),
                       .ld = width_,
                       .dh = ur,
                       .ld_dh = I_,
                       .weights = on_input_ ? nullptr : maps_.weight + r,
                       .h = ur,
                       .ld_h = I_,
                       .dgate = to,
                       .dup = to + I_,
                       .ld_grad = width_,
                       .dots = &dot});
      if (grad_weights_ != nullptr && !on_input_) {
        if (p_.b_down.data != nullptr) dot += bias_dot(it.expert, r);
        grad_weights_[s_.routing.row_to_slot[r]] = dot;
      }
      if (interleaved_) {
        interleave(grad, grad + I_, I_, pre);
        row_k_.store_row(dpre_type_, pre, dr, width_);
      } else if (!write_direct) {
        row_k_.store_row(dpre_type_, grad, dr, width_);
      }
    }
  }

  // Returns <b_down, grad_y> of a row, the share of b_down in the gradient of its routing weight.
  T bias_dot(int64_t expert, int64_t r) const {
    return row_k_.dot_row(p_.b_down.type,
                          element(p_.b_down.data, p_.b_down.type, expert * p_.b_down.stride_e),
                          gy_.type, row_of(gy_, r), H_);
  }

  // Returns the cost of a row in stage 2.
  double row_cost() const { return static_cast<double>(I_) * 4.0 + 2; }

  // Returns the ranges of stages 4 and 5; none if nothing needs the gradient of x by rows.
  std::vector<Range> ranges_of_dx() const {
    const bool needed = p_.grad_x != nullptr || (on_input_ && grad_weights_ != nullptr);
    return needed ? feature_ranges<T>(s_, rows_, kRowMajorFeatures / 2) : std::vector<Range>{};
  }

  // Returns `rows` [T, H] as rows of the routing.
  Rows gathered(Rows by_token) const {
    by_token.index = maps_.token;
    return by_token;
  }

  const MoeFfnBwdParams& p_;
  const Parallel& par_;
  const MoeFfnDesc& s_ = p_.desc;
  const GemmKernels<T>& k_ = gemm_kernels<T>();
  const RowKernels<T>& row_k_ = row_kernels<T>();
  const ActivationKernels<T>& act_k_ = activation_kernels<T>();
  const int64_t I_ = s_.intermediate_size, H_ = s_.hidden_size;
  const int64_t width_ = s_.width();                  // P
  const int64_t rows_ = s_.routing.num_valid_rows();  // N
  const DType type_ = p_.x.type;                      // of the tokens
  const bool gated_ = is_gated(s_.act.kind);
  const bool interleaved_ = gated_ && s_.act.interleaved;
  const bool on_input_ = s_.apply_router_weight_on_input;
  T* const grad_weights_ = static_cast<T*>(p_.grad_topk_weights);

  ScratchScope scratch_{ScratchScope::Keep::kUpTo256MiB};
  const RowMaps<T> maps_ = row_maps<T>(scratch_, s_.routing, s_.topk_weights);
  const Rows gy_ = gathered(p_.grad_y), x_ = gathered(p_.x);
  const std::vector<Range> ranges_ = ranges_of_dx();
  // [N, I] u, later weight * h. Nothing reads it once dx [N, range], the gradient of x by rows, is
  // computed, so the two share one block.
  T* const u_ = scratch_.take<T>(Scratch::kRows,
                                 rows_* std::max(I_, ranges_.empty() ? 0 : ranges_[0].width()));
  T* const dx_ = u_;
  // [N, P] gradients of the pre-activation. They are bfloat16 if the tokens are, because the GEMMs
  // that read them round them anyway; in float16 they could underflow.
  const DType dpre_type_ = type_ == DType::kBFloat16 ? type_ : kAccumulate<T>;
  char* const dpre_ =
      scratch_.take<char>(Scratch::kHidden, rows_ * width_ * dtype_size(dpre_type_));
  const Rows dpre_rows_ = {dpre_, dpre_type_, width_, nullptr};

  const GemmDesc<T> down_ = gemm_desc<T>(s_, I_, H_, gy_, transposed(p_.w_down));
  const GemmDesc<T> up_ = gemm_desc<T>(s_, H_, width_, dpre_rows_, transposed(p_.w_gate_up));
  const std::vector<GemmItem> down_items_ = gemm_items(down_, par_.num_threads);

  const LowRank<T> low_rank_{p_.low_rank, s_, true, par_, scratch_};
  LowRows<T> low_out_ = {low_rank_.low_out, {}};
  LowRows<T> low_pre_ = {low_rank_.low_pre, {}};

  std::vector<RowItem> row_items_;
  // Items that are not done: of stages 1 and 2, by expert, and of all that read u.
  std::vector<Latch> u_left_{static_cast<size_t>(s_.routing.num_experts)};
  std::vector<Latch> dpre_left_{static_cast<size_t>(s_.routing.num_experts)};
  Latch u_readers_;
  TaskGraph stages_;
  RangeTasks by_range_{stages_, ranges_.size()};
};

}  // namespace

void moe_ffn_bwd(const MoeFfnBwdParams& p, const Parallel& par) {
  if (takes_blocks(p)) return moe_ffn_blocks_bwd(p, par);
  p.x.type == DType::kFloat64 ? Backward<double>(p, par).run() : Backward<float>(p, par).run();
}

}  // namespace moe_ops::cpu
