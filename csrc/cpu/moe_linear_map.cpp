// Small experts go a block of tokens at a time (gemm/token_blocks.h). Otherwise slots are sorted,
// and the rest is grouped_gemm with row indices, and unpermute.
#include "moe_ops/moe_linear_map.h"

#include <cstring>

#include "cpu/gemm/routed_rows.h"
#include "cpu/gemm/token_blocks.h"

namespace moe_ops::cpu {

namespace {

template <class T>
void run_blocks(const MoeLinearMapParams& p, const Parallel& par) {
  const GemmKernels<T>& k = gemm_kernels<T>();
  const Routing& s = p.routing;
  const int64_t E = s.num_experts, O = p.out_features, size = dtype_size(p.x.type);
  ScratchScope scratch;
  const PackedExperts<T> weights(scratch, k, p.w, E, O, p.in_features);
  parallel_blocks(s, par, slot_product_cost(s, O * p.in_features), [&](const TokenBlock& b) {
    ScratchScope scratch;
    const int64_t n = b.num_slots(), valid = b.offsets[E];
    char* h = static_cast<char*>(p.h) + b.first * O * size;
    const void** rows = scratch.take<const void*>(Scratch::kHidden, 2 * n);
    void** out = const_cast<void**>(rows + n);
    const RowStarts x(p.x), hs(h, O * size);
    for (int64_t r = 0; r < valid; ++r) {
      rows[r] = x[b.tokens[r]];
      out[r] = const_cast<void*>(hs[b.slots[r]]);
    }
    T* c = scratch.take<T>(Scratch::kTile, n * padded(k, O));
    for (int64_t e = 0; e < E; ++e) {
      const int64_t r = b.offsets[e], count = b.offsets[e + 1] - r;
      if (count == 0) continue;
      multiply_rows(k, {p.x.type, rows + r, count, p.in_features}, weights.of(e), O,
                    vector_of(p.bias, e), c);
      row_kernels<T>().scatter_rows(c, padded(k, O), nullptr, {p.x.type, out + r, count, O});
    }
    if (valid == n) return;
    for (int64_t i = 0; i < n; ++i) {
      if (b.rows[i] < 0) std::memset(h + i * O * size, 0, static_cast<size_t>(O * size));
    }
  });
}

template <class T>
void run_blocks_bwd(const MoeLinearMapBwdParams& p, const Parallel& par) {
  const GemmKernels<T>& k = gemm_kernels<T>();
  const Routing& s = p.routing;
  const DType type = p.x.type;
  const int64_t O = p.out_features, H = p.in_features, E = s.num_experts, size = dtype_size(type);
  const bool sums = p.grad_w != nullptr || p.grad_bias != nullptr;
  ScratchScope scratch;
  const PackedExperts<T> weights(scratch, k, transposed(p.w), p.grad_x != nullptr ? E : 0, H, O);
  const MatrixGrads grad_w{p.grad_w, type};
  const ChunkSums<T> chunks(scratch, s, O, H, k, sums, grad_w);
  const auto run_block = [&](int64_t chunk, const TokenBlock& b, bool first) {
    ScratchScope scratch;
    const int64_t n = b.num_slots(), ld = padded(k, H);
    const void** grads = scratch.take<const void*>(Scratch::kHidden, 2 * n);
    const void** tokens = grads + n;
    const RowStarts x(p.x), grad_h(p.grad_h, O * size);
    for (int64_t r = 0, valid = b.offsets[E]; r < valid; ++r) {
      grads[r] = grad_h[b.first + b.slots[r]];
      tokens[r] = x[b.tokens[r]];
    }
    T* c = scratch.take<T>(Scratch::kTile, n * ld);
    for (int64_t e = 0; e < E; ++e) {
      const int64_t r = b.offsets[e], count = b.offsets[e + 1] - r;
      if (first && sums) chunks.begin(chunk, e, count);
      if (count == 0) continue;
      multiply_gradients<T>(k, {.grad = {type, grads + r, count, O},
                                .x = {type, tokens + r, count, H},
                                .scales = nullptr,
                                .c = p.grad_w == nullptr ? nullptr : chunks.matrix_of(chunk, e),
                                .accumulate = !first,
                                .panels = weights.of(e),
                                .dx = p.grad_x == nullptr ? nullptr : c + r * ld});
      if (p.grad_bias != nullptr) {
        for (int64_t i = r; i < r + count; ++i) {
          row_kernels<T>().axpy(type, grads[i], T(1), chunks.bias_of(chunk, e), O);
        }
      }
    }
    if (p.grad_x == nullptr) return;
    row_kernels<T>().combine_rows({.type = type,
                                   .rows = c,
                                   .ld = ld,
                                   .index = b.rows,
                                   .weights = nullptr,
                                   .num_tokens = b.end - b.begin,
                                   .top_k = s.top_k,
                                   .n = H,
                                   .out = static_cast<char*>(p.grad_x) + b.begin * H * size});
  };
  run_chunks(s, par, slot_product_cost(s, 2 * O * H), run_block);
  if (sums) chunks.add_up(grad_w, p.grad_bias, type, par);
}

void run_rows(const MoeLinearMapParams& p, const Parallel& par) {
  ScratchScope scratch(ScratchScope::Keep::kUpTo256MiB);
  const Routing r = sorted(scratch, p.routing);
  const int64_t O = p.out_features;
  const DType type = p.x.type;
  Rows x = p.x;
  x.index = row_maps<float>(scratch, r, nullptr).token;
  grouped_gemm(routed_product(r, x, p.w, p.bias, O, p.in_features, {p.h, type, O, r.row_to_slot}),
               par);
  zero_empty_slots(r, p.h, O * dtype_size(type));
}

void run_rows_bwd(const MoeLinearMapBwdParams& p, const Parallel& par) {
  ScratchScope scratch(ScratchScope::Keep::kUpTo256MiB);
  const Routing r = sorted(scratch, p.routing);
  const int64_t O = p.out_features, H = p.in_features;
  const DType type = p.x.type, acc = accumulate_type(type);
  const Rows grad = {p.grad_h, type, O, r.row_to_slot};
  Rows x = p.x;
  x.index = row_maps<float>(scratch, r, nullptr).token;
  if (p.grad_x != nullptr) {
    void* rows = scratch.take<char>(Scratch::kRows, r.num_valid_rows() * H * dtype_size(acc));
    grouped_gemm(routed_product(r, grad, transposed(p.w), {}, H, O, {rows, acc, H, nullptr}), par);
    unpermute(combination(r, rows, acc, H, nullptr, p.grad_x, type), par);
  }
  if (p.grad_w != nullptr) {
    grouped_gemm_wgrad(routed_wgrad(r, grad, O, x, H, p.grad_w, type), par);
  }
  if (p.grad_bias != nullptr) grouped_sum(routed_sum(r, grad, O, nullptr, p.grad_bias, type), par);
}

}  // namespace

void moe_linear_map(const MoeLinearMapParams& p, const Parallel& par) {
  if (!takes_blocks(p.routing, p.out_features, p.in_features, p.x.type)) return run_rows(p, par);
  p.x.type == DType::kFloat64 ? run_blocks<double>(p, par) : run_blocks<float>(p, par);
}

void moe_linear_map_bwd(const MoeLinearMapBwdParams& p, const Parallel& par) {
  if (!takes_blocks(p.routing, p.out_features, p.in_features, p.x.type)) {
    return run_rows_bwd(p, par);
  }
  p.x.type == DType::kFloat64 ? run_blocks_bwd<double>(p, par) : run_blocks_bwd<float>(p, par);
}

}  // namespace moe_ops::cpu
