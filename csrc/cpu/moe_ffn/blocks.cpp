// The FFN block of small experts, a block of tokens at a time (token_blocks.h).
//
// Slots are sorted by expert and in their order, so the rows that a block of tokens has of an
// expert are a run of sorted rows. They go through everything in tiles of as many rows as a product
// takes: x gathered, pre-activation, activation, output; a token's rows are then summed from cache.
// Backward does the same up to the gradient of x by rows, and multiplies what the tiles of an
// expert left in cache for the gradients of weights, which are summed over chunks.
#include "cpu/moe_ffn/blocks.h"

#include "cpu/gemm/act_rows.h"
#include "cpu/gemm/blocking.h"
#include "cpu/gemm/token_blocks.h"
#include "cpu/kernels/activation.h"

namespace moe_ops::cpu {

namespace {

BlockedSizes sizes_of(const MoeFfnDesc& s, DType type) {
  const int64_t H = s.hidden_size, I = s.intermediate_size, width = s.width();
  return {s.routing.num_tokens,
          s.routing.top_k,
          s.routing.num_experts,
          std::min(H, I),
          std::max(H, width),
          (width + I) * H,
          type};
}

// Returns the approximate nanoseconds of a pass with `products` GEMMs as large as those of forward.
double blocks_cost(const MoeFfnDesc& s, int products) {
  const int64_t per_slot = (s.width() + s.intermediate_size) * s.hidden_size;
  return static_cast<double>(s.routing.num_tokens * s.routing.top_k) *
         (static_cast<double>(products * per_slot) / 32 + 64);
}

// Finds the tokens in x, and the routing weights, of rows r0 to r0 + m of expert e in the block.
template <class T>
void find_rows(const MoeFfnDesc& s, const TokenBlock& b, int64_t e, int64_t r0, int64_t m,
               const RowStarts x, const void** rows, T* weights) {
  const int32_t* tokens = b.tokens + b.offsets[e] + r0;
  const int32_t* slots = b.slots + b.offsets[e] + r0;
  const T* topk_weights = static_cast<const T*>(s.topk_weights) + b.first;
  for (int64_t i = 0; i < m; ++i) {
    rows[i] = x[tokens[i]];
    weights[i] = topk_weights[slots[i]];
  }
}

template <class T>
void forward(const MoeFfnParams& p, const Parallel& par) {
  const MoeFfnDesc& s = p.desc;
  const GemmKernels<T>& k = gemm_kernels<T>();
  const RowKernels<T>& row_k = row_kernels<T>();
  const ActivationKernels<T>& act_k = activation_kernels<T>();
  const int64_t I = s.intermediate_size, H = s.hidden_size, E = s.routing.num_experts,
                width = s.width();
  const DType type = p.x.type;
  const int64_t size = dtype_size(type), ld_pre = padded(k, width), ld = padded(k, H);
  const bool gated = is_gated(s.act.kind), interleaved = gated && s.act.interleaved;
  const int64_t up_at = gated ? I : 0;
  const bool on_input = s.apply_router_weight_on_input;
  // Pre-activations that are kept as they are computed.
  const bool direct = p.preact != nullptr && type == kAccumulate<T> && ld_pre == width;

  const int64_t up_size = PackedExperts<T>::elements(k, E, width, H);
  ScratchScope scratch;
  T* panels = scratch.take<T>(Scratch::kTokens, up_size + PackedExperts<T>::elements(k, E, H, I));
  const PackedExperts<T> up(k, p.w_gate_up, E, width, H, panels, s.routing.expert_offsets);
  const PackedExperts<T> down(k, p.w_down, E, H, I, panels + up_size, s.routing.expert_offsets);

  const auto run_block = [&](const TokenBlock& b) {
    ScratchScope scratch;
    const int64_t n = b.num_slots();
    T* out = scratch.take<T>(Scratch::kTile, n * ld);
    Arena part(scratch, Scratch::kPackA,
               kMaxMr * 2 * (kLda + ld_pre) * static_cast<int64_t>(sizeof(T)) + 4 * 64);
    T *x = part.take<T>(kMaxMr * kLda), *h = part.take<T>(kMaxMr * kLda);
    T *own_pre = part.take<T>(kMaxMr * ld_pre), *halves = part.take<T>(kMaxMr * ld_pre);
    std::array<const void*, kMaxMr> tokens;
    std::array<T, kMaxMr> weights;
    for (int64_t e = 0; e < E; ++e) {
      const int64_t count = b.offsets[e + 1] - b.offsets[e];
      for (RowTiles tile(count, k.mr2); tile.next();) {
        const int64_t r0 = tile.begin, m = tile.height, row = b.sorted_rows[e] + r0;
        find_rows(s, b, e, r0, m, RowStarts(p.x), tokens.data(), weights.data());
        row_k.gather_rows({type, tokens.data(), m, H}, on_input ? weights.data() : nullptr, x,
                          kLda);
        char* saved = static_cast<char*>(p.preact) + row * width * size;
        T* pre = direct ? reinterpret_cast<T*>(saved) : own_pre;
        multiply_tile<T>(k, {.a = x,
                             .m = m,
                             .depth = H,
                             .panels = up.of(e),
                             .outputs = width,
                             .bias_type = p.b_gate_up.type,
                             .bias = vector_of(p.b_gate_up, e),
                             .c = pre});
        if (p.preact != nullptr && !direct) {
          row_k.store_rows(pre, ld_pre, {type, saved, width, m, width});
        }
        const T* gate = pre;
        if (interleaved) {
          for (int64_t r = 0; r < m; ++r) {
            deinterleave(pre + r * ld_pre, I, halves + r * ld_pre, halves + r * ld_pre + I);
          }
          gate = halves;
        }
        act_k.forward({s.act.kind, m, I, T(s.act.alpha), T(s.act.limit), gate, gate + up_at, ld_pre,
                       h, kLda});
        multiply_tile<T>(k, {.a = h,
                             .m = m,
                             .depth = I,
                             .panels = down.of(e),
                             .outputs = H,
                             .bias_type = p.b_down.type,
                             .bias = vector_of(p.b_down, e),
                             .c = out + (b.offsets[e] + r0) * ld});
      }
    }
    const T* factors = on_input ? nullptr : static_cast<const T*>(s.topk_weights) + b.first;
    row_k.combine_rows({.type = p.y_type,
                        .rows = out,
                        .ld = ld,
                        .index = b.rows,
                        .weights = factors,
                        .num_tokens = b.end - b.begin,
                        .top_k = s.routing.top_k,
                        .n = H,
                        .out = static_cast<char*>(p.y) + b.begin * H * dtype_size(p.y_type)});
  };
  parallel_blocks(s.routing, par, blocks_cost(s, 1), run_block);
}

// Scratch memory of a thread for the rows of an expert in a block, at most kKc at once. Rows kLda
// apart are rows of one GEMM and columns of another.
template <class T>
struct BwdScratch {
  T* dx;                          // [slots of a block][padded(H)]
  T* u;                           // a tile's
  T *pre, *halves, *grad_halves;  // pre-activations as they were, in halves, and gradients of these
  T *gy, *dpre;                   // [kKc][kLda]: grad_y, gradients of pre-activations
  T *hidden, *x;                  // [kKc][odd_ld]: weight * h; x
  T* sum;
  T *weights, *dots;                // [kKc]
  const void **gys, **xs, **dpres;  // [kKc] rows of grad_y, x and dpre

  BwdScratch(ScratchScope& scratch, const GemmKernels<T>& k, int64_t slots, int64_t H, int64_t I,
             int64_t width) {
    const int64_t ld = padded(k, std::max(H, width)), ld_u = padded(k, I);
    const int64_t elements = slots * padded(k, H) + kMaxMr * (ld_u + 3 * width) +
                             kKc * (2 * kLda + odd_ld(k, I) + odd_ld(k, H) + 2) + ld;
    Arena part(scratch, Scratch::kTile,
               elements * static_cast<int64_t>(sizeof(T)) +
                   3 * kKc * static_cast<int64_t>(sizeof(void*)) + 15 * 64);
    dx = part.take<T>(slots * padded(k, H));
    u = part.take<T>(kMaxMr * ld_u);
    pre = part.take<T>(kMaxMr * width);
    halves = part.take<T>(kMaxMr * width);
    grad_halves = part.take<T>(kMaxMr * width);
    gy = part.take<T>(kKc * kLda);
    dpre = part.take<T>(kKc * kLda);
    hidden = part.take<T>(kKc * odd_ld(k, I));
    x = part.take<T>(kKc * odd_ld(k, H));
    sum = part.take<T>(ld);
    weights = part.take<T>(kKc);
    dots = part.take<T>(kKc);
    gys = part.take<const void*>(kKc);
    xs = part.take<const void*>(kKc);
    dpres = part.take<const void*>(kKc);
    for (int64_t r = 0; r < kKc; ++r) dpres[r] = dpre + r * kLda;
  }
};

template <class T>
class Backward {
 public:
  Backward(const MoeFfnBwdParams& p, const Parallel& par)
      : p_(p),
        s_(p.desc),
        k_(gemm_kernels<T>()),
        par_(par),
        I_(s_.intermediate_size),
        H_(s_.hidden_size),
        E_(s_.routing.num_experts),
        width_(s_.width()),
        chunks_(num_chunks(s_.routing.num_tokens)),
        wants_up_(p.grad_w_gate_up != nullptr || p.grad_b_gate_up != nullptr),
        wants_down_(p.grad_w_down != nullptr || p.grad_b_down != nullptr),
        weights_from_x_(s_.apply_router_weight_on_input && p.grad_topk_weights != nullptr),
        need_dx_(p.grad_x != nullptr || weights_from_x_),
        panels_(scratch_.take<T>(Scratch::kTokens, down_panels() + up_panels())),
        down_(k_, transposed(p.w_down), E_, I_, H_, panels_),
        up_(k_, transposed(p.w_gate_up), need_dx_ ? E_ : 0, H_, width_, panels_ + down_panels()),
        sums_(scratch_.take<T>(Scratch::kRows, down_sum_elements() + up_sum_elements())),
        down_grads_{p.grad_w_down, p.grad_w_down_type,
                    p.accumulate_w_down ? s_.routing.expert_offsets : nullptr},
        up_grads_{p.grad_w_gate_up, p.grad_w_gate_up_type,
                  p.accumulate_w_gate_up ? s_.routing.expert_offsets : nullptr},
        down_sums_(k_, chunks_, E_, H_, I_, sums_, down_grads_),
        up_sums_(k_, chunks_, E_, width_, H_, sums_ + down_sum_elements(), up_grads_) {}

  void run() {
    T* grad_weights = static_cast<T*>(p_.grad_topk_weights);
    if (grad_weights != nullptr) std::fill_n(grad_weights, s_.routing.num_slots(), T(0));
    run_chunks(s_.routing, par_, blocks_cost(s_, 2),
               [&](int64_t chunk, const TokenBlock& b, bool first) { run_block(chunk, b, first); });
    if (wants_down_) down_sums_.add_up(down_grads_, p_.grad_b_down, p_.x.type, par_);
    if (wants_up_) up_sums_.add_up(up_grads_, p_.grad_b_gate_up, p_.x.type, par_);
  }

 private:
  int64_t down_panels() const { return PackedExperts<T>::elements(k_, E_, I_, H_); }
  int64_t up_panels() const {
    return PackedExperts<T>::elements(k_, need_dx_ ? E_ : 0, H_, width_);
  }
  int64_t down_sum_elements() const {
    return wants_down_ ? ChunkSums<T>::elements(k_, chunks_, E_, H_, I_) : 0;
  }
  int64_t up_sum_elements() const {
    return wants_up_ ? ChunkSums<T>::elements(k_, chunks_, E_, width_, H_) : 0;
  }

  void run_block(int64_t chunk, const TokenBlock& b, bool first) const {
    ScratchScope scratch;
    BwdScratch<T> t(scratch, k_, b.num_slots(), H_, I_, width_);
    const int64_t ld = padded(k_, H_);
    for (int64_t e = 0; e < E_; ++e) {
      const int64_t count = b.offsets[e + 1] - b.offsets[e];
      if (first && wants_up_) up_sums_.begin(chunk, e, count);
      if (first && wants_down_) down_sums_.begin(chunk, e, count);
      const int64_t parts = ceil_div(count, kKc);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t r0 = count * part / parts, m = count * (part + 1) / parts - r0;
        find_rows(s_, b, e, r0, m, RowStarts(p_.x), t.xs, t.weights);
        find_rows(s_, b, e, r0, m, RowStarts(p_.grad_y), t.gys, t.weights);
        run_tiles(e, b.sorted_rows[e] + r0, m, t, t.dx + (b.offsets[e] + r0) * ld);
        add_products(chunk, e, m, t, !first || part > 0);
      }
    }
    if (p_.grad_x == nullptr) return;
    const T* factors = s_.apply_router_weight_on_input
                           ? static_cast<const T*>(s_.topk_weights) + b.first
                           : nullptr;
    row_k_.combine_rows(
        {.type = p_.x.type,
         .rows = t.dx,
         .ld = ld,
         .index = b.rows,
         .weights = factors,
         .num_tokens = b.end - b.begin,
         .top_k = s_.routing.top_k,
         .n = H_,
         .out = static_cast<char*>(p_.grad_x) + b.begin * H_ * dtype_size(p_.x.type)});
  }

  // Computes, for rows `row` to row + count of expert e, weight * h and the gradients of the
  // pre-activation, of x by rows, and of the routing weights.
  void run_tiles(int64_t e, int64_t row, int64_t count, BwdScratch<T>& t, T* dx) const {
    const int64_t ld = padded(k_, H_);
    const DType type = p_.x.type;
    const bool on_input = s_.apply_router_weight_on_input;
    T* grad_weights = static_cast<T*>(p_.grad_topk_weights);
    const void* bias = on_input ? nullptr : vector_of(p_.b_down, e);
    for (RowTiles tile(count, k_.mr2); tile.next();) {
      const int64_t r0 = tile.begin, m = tile.height;
      T* dpre = t.dpre + r0 * kLda;
      // Tile by tile: rows are on their way while the tile before is being multiplied.
      row_k_.gather_rows({p_.grad_y.type, t.gys + r0, m, H_}, nullptr, t.gy + r0 * kLda, kLda);
      if (p_.grad_w_gate_up != nullptr) {
        row_k_.gather_rows({type, t.xs + r0, m, H_}, on_input ? t.weights + r0 : nullptr,
                           t.x + r0 * odd_ld(k_, H_), odd_ld(k_, H_));
      }
      // u stays unweighted: <h, u> is the gradient of the routing weight.
      multiply_tile<T>(k_, {.a = t.gy + r0 * kLda,
                            .m = m,
                            .depth = H_,
                            .panels = down_.of(e),
                            .outputs = I_,
                            .c = t.u});
      act_tile(row + r0, m, on_input ? nullptr : t.weights + r0, t.hidden + r0 * odd_ld(k_, I_),
               dpre, t);
      if (grad_weights != nullptr && !on_input) {
        for (int64_t r = 0; r < m; ++r) {
          T g = t.dots[r];
          if (bias != nullptr) {
            g += row_k_.dot_row(p_.b_down.type, bias, p_.grad_y.type, t.gys[r0 + r], H_);
          }
          grad_weights[s_.routing.row_to_slot[row + r0 + r]] = g;
        }
      }
      if (need_dx_) {
        multiply_tile<T>(k_, {.a = dpre,
                              .m = m,
                              .depth = width_,
                              .panels = up_.of(e),
                              .outputs = H_,
                              .c = dx + r0 * ld});
      }
    }
    if (!weights_from_x_) return;
    row_k_.dot_rows({type, t.xs, count, H_}, dx, ld, t.dots);
    for (int64_t r = 0; r < count; ++r) grad_weights[s_.routing.row_to_slot[row + r]] = t.dots[r];
  }

  // Computes, from u of m rows, h and the gradient of the pre-activation, times weight, and <h, u>
  // as dots.
  void act_tile(int64_t row, int64_t m, const T* weights, T* h, T* dpre, BwdScratch<T>& t) const {
    const DType type = p_.x.type;
    const bool gated = is_gated(s_.act.kind), interleaved = gated && s_.act.interleaved;
    const char* saved = element(p_.preact, type, row * width_);
    const T* gate = reinterpret_cast<const T*>(saved);
    if (type != kAccumulate<T>) {
      row_k_.load_rows({type, saved, width_, m, width_}, t.pre, width_, T(1));
      gate = t.pre;
    }
    T* grad = dpre;
    int64_t ld_grad = kLda;
    if (interleaved) {
      for (int64_t r = 0; r < m; ++r) {
        deinterleave(gate + r * width_, I_, t.halves + r * width_, t.halves + r * width_ + I_);
      }
      gate = t.halves;
      grad = t.grad_halves;
      ld_grad = width_;
    }
    const int64_t up_at = gated ? I_ : 0;
    act_k_.backward({s_.act.kind, m, I_, T(s_.act.alpha), T(s_.act.limit), gate, gate + up_at,
                     width_, t.u, padded(k_, I_), weights, h, odd_ld(k_, I_), grad, grad + up_at,
                     ld_grad, t.dots});
    for (int64_t r = 0; interleaved && r < m; ++r) {
      interleave(grad + r * width_, grad + r * width_ + I_, I_, dpre + r * kLda);
    }
  }

  // Adds the products of `count` rows to the sums of a chunk.
  void add_products(int64_t chunk, int64_t e, int64_t count, BwdScratch<T>& t, bool add) const {
    const bool on_input = s_.apply_router_weight_on_input;
    if (p_.grad_w_down != nullptr) {
      outer_product(k_, t.gy, H_, t.hidden, I_, count, down_sums_.matrix_of(chunk, e), add);
    }
    if (p_.grad_w_gate_up != nullptr) {
      outer_product(k_, t.dpre, width_, t.x, H_, count, up_sums_.matrix_of(chunk, e), add);
    }
    if (p_.grad_b_down != nullptr) {
      row_k_.weighted_sum({p_.grad_y.type, t.gys, count, H_}, on_input ? nullptr : t.weights,
                          t.sum);
      row_k_.axpy(kAccumulate<T>, t.sum, T(1), down_sums_.bias_of(chunk, e), H_);
    }
    if (p_.grad_b_gate_up != nullptr) {
      row_k_.weighted_sum({kAccumulate<T>, t.dpres, count, width_}, nullptr, t.sum);
      row_k_.axpy(kAccumulate<T>, t.sum, T(1), up_sums_.bias_of(chunk, e), width_);
    }
  }

  const MoeFfnBwdParams& p_;
  const MoeFfnDesc& s_;
  const GemmKernels<T>& k_;
  const RowKernels<T>& row_k_ = row_kernels<T>();
  const ActivationKernels<T>& act_k_ = activation_kernels<T>();
  const Parallel& par_;
  const int64_t I_, H_, E_, width_, chunks_;
  const bool wants_up_, wants_down_, weights_from_x_, need_dx_;
  ScratchScope scratch_;
  T* const panels_;
  const PackedExperts<T> down_, up_;
  T* const sums_;  // taken after the panels, whose packing uses the same block
  const MatrixGrads down_grads_, up_grads_;
  const ChunkSums<T> down_sums_, up_sums_;
};

// Returns whether the rows of every expert are in the order of their slots, each slot once.
bool is_sorted(const Routing& s) {
  const int64_t slots = s.num_tokens * s.top_k;
  for (int64_t e = 0; e < s.num_experts; ++e) {
    int64_t before = -1;
    for (int64_t r = s.expert_offsets[e]; r < s.expert_offsets[e + 1]; ++r) {
      const int64_t slot = s.row_to_slot[r];
      if (slot <= before || slot >= slots || s.slot_to_row[slot] != r) return false;
      before = slot;
    }
  }
  return true;
}

}  // namespace

bool takes_blocks(const MoeFfnParams& p) {
  if (p.low_rank != nullptr || p.x_scale != nullptr) return false;
  if (p.w_gate_up.panels != nullptr || p.w_down.panels != nullptr) return false;
  if (p.w_gate_up.quant.bits != 0 || p.w_down.quant.bits != 0) return false;
  return takes_blocks(sizes_of(p.desc, p.x.type));
}

bool takes_blocks(const MoeFfnBwdParams& p) {
  if (p.low_rank != nullptr) return false;
  if (p.w_gate_up.quant.bits != 0 || p.w_down.quant.bits != 0) return false;
  const int64_t tokens =
      std::min(p.desc.routing.num_tokens, chunk_tokens(p.desc.routing.num_tokens));
  if (tokens * p.desc.routing.top_k < kMinChunkRows * p.desc.routing.num_experts) return false;
  return takes_blocks(sizes_of(p.desc, p.x.type)) && is_sorted(p.desc.routing);
}

void moe_ffn_blocks(const MoeFfnParams& p, const Parallel& par) {
  p.x.type == DType::kFloat64 ? forward<double>(p, par) : forward<float>(p, par);
}

void moe_ffn_blocks_bwd(const MoeFfnBwdParams& p, const Parallel& par) {
  p.x.type == DType::kFloat64 ? Backward<double>(p, par).run() : Backward<float>(p, par).run();
}

}  // namespace moe_ops::cpu
