// Small experts go a block of tokens at a time (gemm/token_blocks.h). Otherwise slots are sorted,
// and the rest is grouped_gemm with row indices, unpermute, and in backward a pass over u = W^T
// grad_y by rows.
#include "moe_ops/moe_linear_reduce.h"

#include <cstring>

#include "cpu/gemm/gemm.h"
#include "cpu/gemm/routed_rows.h"
#include "cpu/gemm/token_blocks.h"

namespace moe_ops::cpu {

namespace {

template <class T>
void run_blocks(const MoeLinearReduceParams& p, const Parallel& par) {
  const GemmKernels<T>& k = gemm_kernels<T>();
  const Routing& s = p.routing;
  const DType type = p.w.type;
  const int64_t E = s.num_experts, H = p.hidden_size, D = p.in_features, size = dtype_size(type);
  const int64_t ld = padded(k, H);
  ScratchScope scratch;
  const PackedExperts<T> weights(scratch, k, p.w, E, H, D);
  parallel_blocks(s, par, slot_product_cost(s, H * D), [&](const TokenBlock& b) {
    ScratchScope scratch;
    const int64_t n = b.num_slots();
    const void** rows = scratch.take<const void*>(Scratch::kHidden, n);
    const RowStarts h(p.h, D * size);
    for (int64_t r = 0, valid = b.offsets[E]; r < valid; ++r) rows[r] = h[b.first + b.slots[r]];
    T* c = scratch.take<T>(Scratch::kTile, n * ld);
    for (int64_t e = 0; e < E; ++e) {
      const int64_t r = b.offsets[e];
      multiply_rows(k, {type, rows + r, b.offsets[e + 1] - r, D}, weights.of(e), H,
                    vector_of(p.bias, e), c + r * ld);
    }
    row_kernels<T>().combine_rows({.type = type,
                                   .rows = c,
                                   .ld = ld,
                                   .index = b.rows,
                                   .weights = static_cast<const T*>(p.topk_weights) + b.first,
                                   .num_tokens = b.end - b.begin,
                                   .top_k = s.top_k,
                                   .n = H,
                                   .out = static_cast<char*>(p.y) + b.begin * H * size});
  });
}

template <class T>
void run_blocks_bwd(const MoeLinearReduceBwdParams& p, const Parallel& par) {
  const GemmKernels<T>& k = gemm_kernels<T>();
  const Routing& s = p.routing;
  const DType type = p.w.type;
  const int64_t H = p.hidden_size, D = p.in_features, E = s.num_experts, size = dtype_size(type);
  const int64_t ld = padded(k, D);
  const bool sums = p.grad_w != nullptr || p.grad_bias != nullptr;
  const bool slots = p.grad_h != nullptr || p.grad_topk_weights != nullptr;
  const T* topk_weights = static_cast<const T*>(p.topk_weights);
  T* grad_weights = static_cast<T*>(p.grad_topk_weights);
  ScratchScope scratch;
  const PackedExperts<T> matrices(scratch, k, transposed(p.w), slots ? E : 0, D, H);
  const MatrixGrads grad_w{p.grad_w, type};
  const ChunkSums<T> chunks(scratch, s, H, D, k, sums, grad_w);
  const auto run_block = [&](int64_t chunk, const TokenBlock& b, bool first) {
    ScratchScope scratch;
    const int64_t n = b.num_slots(), valid = b.offsets[E];
    const void** grads = scratch.take<const void*>(Scratch::kHidden, 3 * n);
    const void** h = grads + n;
    void** grad_h = const_cast<void**>(h + n);
    T* c = scratch.take<T>(Scratch::kTile, n * (ld + 2));
    T *weights = c + n * ld, *dots = weights + n;
    const RowStarts grad_ys(p.grad_y), hs(p.h, D * size), grad_hs(p.grad_h, D * size);
    for (int64_t r = 0; r < valid; ++r) {
      const int64_t slot = b.first + b.slots[r];
      grads[r] = grad_ys[b.tokens[r]];
      h[r] = hs[slot];
      grad_h[r] = const_cast<void*>(grad_hs[slot]);
      weights[r] = topk_weights[slot];
    }
    for (int64_t e = 0; e < E; ++e) {
      const int64_t r = b.offsets[e], count = b.offsets[e + 1] - r;
      if (first && sums) chunks.begin(chunk, e, count);
      if (count == 0) continue;
      multiply_gradients<T>(k, {.grad = {type, grads + r, count, H},
                                .x = {type, h + r, count, D},
                                .scales = weights + r,
                                .c = p.grad_w == nullptr ? nullptr : chunks.matrix_of(chunk, e),
                                .accumulate = !first,
                                .panels = matrices.of(e),
                                .dx = slots ? c : nullptr});
      if (p.grad_bias != nullptr) {
        for (int64_t i = r; i < r + count; ++i) {
          row_kernels<T>().axpy(type, grads[i], weights[i], chunks.bias_of(chunk, e), H);
        }
      }
      if (!slots) continue;
      if (p.grad_h != nullptr)
        row_kernels<T>().scatter_rows(c, ld, weights + r, {type, grad_h + r, count, D});
      if (grad_weights == nullptr) continue;
      row_kernels<T>().dot_rows({type, h + r, count, D}, c, ld, dots);
      const void* bias = vector_of(p.bias, e);
      for (int64_t i = 0; i < count; ++i) {
        T g = dots[i];
        if (bias != nullptr) g += row_kernels<T>().dot_row(type, bias, type, grads[r + i], H);
        grad_weights[b.first + b.slots[r + i]] = g;
      }
    }
    if (valid == n) return;
    for (int64_t i = 0; i < n; ++i) {
      if (b.rows[i] >= 0) continue;
      if (grad_weights != nullptr) grad_weights[b.first + i] = T(0);
      if (p.grad_h != nullptr) {
        std::memset(static_cast<char*>(p.grad_h) + (b.first + i) * D * size, 0,
                    static_cast<size_t>(D * size));
      }
    }
  };
  run_chunks(s, par, slot_product_cost(s, 2 * H * D), run_block);
  if (sums) chunks.add_up(grad_w, p.grad_bias, type, par);
}

void run_rows(const MoeLinearReduceParams& p, const Parallel& par) {
  ScratchScope scratch(ScratchScope::Keep::kUpTo256MiB);
  const Routing r = sorted(scratch, p.routing);
  const int64_t H = p.hidden_size, D = p.in_features;
  const DType type = p.w.type, acc = accumulate_type(type);
  void* rows = scratch.take<char>(Scratch::kRows, r.num_valid_rows() * H * dtype_size(acc));
  grouped_gemm(
      routed_product(r, {p.h, type, D, r.row_to_slot}, p.w, p.bias, H, D, {rows, acc, H, nullptr}),
      par);
  unpermute(combination(r, rows, acc, H, p.topk_weights, p.y, type), par);
}

// Computes the gradients of slots and of their weights from u [rows, D].
template <class T>
void slot_gradients(const MoeLinearReduceBwdParams& p, const Routing& s, const RowMaps<T>& maps,
                    const T* u, const Parallel& par) {
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t D = p.in_features, row_bytes = D * dtype_size(p.w.type);
  const auto* h = static_cast<const char*>(p.h);
  Rows grad_y = p.grad_y;
  grad_y.index = maps.token;
  for (int64_t e = 0; e < s.num_experts; ++e) {
    const int64_t begin = s.expert_offsets[e];
    const void* bias = vector_of(p.bias, e);
    parallel_range(par, s.expert_offsets[e + 1] - begin, D / 4.0 + 2, [&](int64_t b, int64_t n) {
      ScratchScope scratch;
      T* grad = scratch.take<T>(Scratch::kTile, D);
      for (int64_t r = begin + b; r < begin + n; ++r) {
        const int64_t slot = s.row_to_slot[r];
        if (p.grad_topk_weights != nullptr) {
          T g = k.dot_row(p.w.type, h + slot * row_bytes, kAccumulate<T>, u + r * D, D);
          if (bias != nullptr) {
            g += k.dot_row(p.bias.type, bias, grad_y.type, row_of(grad_y, r), p.hidden_size);
          }
          static_cast<T*>(p.grad_topk_weights)[slot] = g;
        }
        if (p.grad_h != nullptr) {
          k.load_row(kAccumulate<T>, u + r * D, grad, D, maps.weight[r]);
          k.store_row(p.w.type, grad, static_cast<char*>(p.grad_h) + slot * row_bytes, D);
        }
      }
    });
  }
  if (p.grad_h != nullptr) zero_empty_slots(s, p.grad_h, row_bytes);
  if (p.grad_topk_weights != nullptr) zero_empty_slots(s, p.grad_topk_weights, sizeof(T));
}

template <class T>
void run_rows_bwd(const MoeLinearReduceBwdParams& p, const Parallel& par) {
  ScratchScope scratch(ScratchScope::Keep::kUpTo256MiB);
  const Routing r = sorted(scratch, p.routing);
  const RowMaps<T> maps = row_maps<T>(scratch, r, p.topk_weights);
  const int64_t H = p.hidden_size, D = p.in_features;
  const DType type = p.w.type;
  const Rows h = {p.h, type, D, r.row_to_slot};
  Rows grad_y = p.grad_y;
  grad_y.index = maps.token;
  if (p.grad_h != nullptr || p.grad_topk_weights != nullptr) {
    T* u = scratch.take<T>(Scratch::kRows, r.num_valid_rows() * D);
    grouped_gemm(
        routed_product(r, grad_y, transposed(p.w), {}, D, H, {u, kAccumulate<T>, D, nullptr}), par);
    slot_gradients(p, r, maps, u, par);
  }
  if (p.grad_w != nullptr) {
    GroupedWgradParams w = routed_wgrad(r, grad_y, H, h, D, p.grad_w, type);
    w.grad_scale = maps.weight;
    grouped_gemm_wgrad(w, par);
  }
  if (p.grad_bias != nullptr) {
    grouped_sum(routed_sum(r, grad_y, H, maps.weight, p.grad_bias, type), par);
  }
}

}  // namespace

void moe_linear_reduce(const MoeLinearReduceParams& p, const Parallel& par) {
  if (!takes_blocks(p.routing, p.hidden_size, p.in_features, p.w.type)) return run_rows(p, par);
  p.w.type == DType::kFloat64 ? run_blocks<double>(p, par) : run_blocks<float>(p, par);
}

void moe_linear_reduce_bwd(const MoeLinearReduceBwdParams& p, const Parallel& par) {
  const bool wide = p.w.type == DType::kFloat64;
  if (!takes_blocks(p.routing, p.hidden_size, p.in_features, p.w.type)) {
    return wide ? run_rows_bwd<double>(p, par) : run_rows_bwd<float>(p, par);
  }
  wide ? run_blocks_bwd<double>(p, par) : run_blocks_bwd<float>(p, par);
}

}  // namespace moe_ops::cpu
