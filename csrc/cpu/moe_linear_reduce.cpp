#include "moe_ops/moe_linear_reduce.h"

#include <cstring>

#include "cpu/gemm/gemm.h"
#include "cpu/gemm/slot_blocks.h"

namespace moe_ops::cpu {

namespace {

template <class T>
void run(const MoeLinearReduceBwdParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
  const int64_t D = p.in_features;
  const T* u = static_cast<const T*>(p.u);
  const T* weights = static_cast<const T*>(p.row_weights);
  for (int64_t e = 0; e < p.num_experts; ++e) {
    const int64_t begin = p.expert_offsets[e];
    parallel_range(par, p.expert_offsets[e + 1] - begin, D / 4.0 + 2, [&](int64_t b, int64_t n) {
      ScratchScope scratch;
      T* grad = scratch.take<T>(Scratch::kTile, D);
      for (int64_t r = begin + b; r < begin + n; ++r) {
        const int64_t slot = p.row_to_slot[r];
        if (p.grad_topk_weights != nullptr) {
          T g = k.dot_row(p.h.type, row_of(p.h, r), kAccumulate<T>, u + r * D, D);
          if (p.bias.data != nullptr) {
            g += k.dot_row(p.bias.type, element(p.bias.data, p.bias.type, e * p.bias.stride_e),
                           p.grad_y.type, row_of(p.grad_y, r), p.hidden_size);
          }
          static_cast<T*>(p.grad_topk_weights)[slot] = g;
        }
        if (p.grad_h != nullptr) {
          k.load_row(kAccumulate<T>, u + r * D, grad, D, weights[r]);
          k.store_row(p.h.type, grad,
                      static_cast<char*>(p.grad_h) + slot * D * dtype_size(p.h.type), D);
        }
      }
    });
  }
}

template <class T>
void run_blocks(const MoeLinearReduceParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
  const SlotProduct& s = p.s;
  const DType type = p.w.type;
  const int64_t H = s.rows, D = s.cols, size = dtype_size(type), ld = padded(k, H);
  ScratchScope scratch;
  const PanelBank<T> bank(scratch, k, p.w, s.num_experts, H, D);
  parallel_items(
      par, ceil_div(s.num_tokens, kBlockTokens), slot_product_cost(s, 1), [&](int64_t item) {
        const int64_t begin = item * kBlockTokens;
        ScratchScope scratch;
        const SlotBlock b =
            slot_block(scratch, s, begin, std::min(s.num_tokens, begin + kBlockTokens));
        const int64_t n = (b.end - b.begin) * s.top_k;
        const void** rows = scratch.take<const void*>(Scratch::kHidden, n);
        const RowStarts h(p.h, D * size);
        for (int64_t r = 0, valid = b.offsets[s.num_experts]; r < valid; ++r) {
          rows[r] = h[b.first + b.slots[r]];
        }
        T* c = scratch.take<T>(Scratch::kTile, n * ld);
        for (int64_t e = 0; e < s.num_experts; ++e) {
          const int64_t r = b.offsets[e];
          multiply_slots(
              k, type, rows + r, b.offsets[e + 1] - r, D, bank.of(e), H,
              p.bias.data == nullptr ? nullptr : element(p.bias.data, type, e * p.bias.stride_e),
              c + r * ld);
        }
        k.combine_rows(type, c, ld, b.rows, static_cast<const T*>(p.topk_weights) + b.first,
                       b.end - b.begin, s.top_k, H, static_cast<char*>(p.y) + b.begin * H * size);
      });
}

template <class T>
void run_blocks_bwd(const MoeLinearReduceBlocksBwdParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
  const SlotProduct& s = p.s;
  const DType type = p.w.type;
  const int64_t H = s.rows, D = s.cols, E = s.num_experts, size = dtype_size(type);
  const int64_t ld = padded(k, D);
  const bool sums = p.grad_w != nullptr || p.grad_bias != nullptr;
  const bool slots = p.grad_h != nullptr || p.grad_topk_weights != nullptr;
  const T* topk_weights = static_cast<const T*>(p.topk_weights);
  T* grad_weights = static_cast<T*>(p.grad_topk_weights);
  ScratchScope scratch;
  const PanelBank<T> bank(scratch, k, transposed(p.w), slots ? E : 0, D, H);
  const MatrixGrads grad_w{p.grad_w, type};
  const ChunkSums<T> chunks(scratch, s, k, sums, grad_w);
  const auto run_block = [&](int64_t chunk, int64_t begin, int64_t end, bool first) {
    ScratchScope scratch;
    const SlotBlock b = slot_block(scratch, s, begin, end);
    const int64_t n = (end - begin) * s.top_k, valid = b.offsets[E];
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
      multiply_gradients(k, type, grads + r, H, h + r, D, weights + r, count,
                         p.grad_w == nullptr ? nullptr : chunks.matrix_of(chunk, e), !first,
                         bank.of(e), slots ? c : nullptr);
      if (p.grad_bias != nullptr) {
        for (int64_t i = r; i < r + count; ++i) {
          k.axpy(type, grads[i], weights[i], chunks.bias_of(chunk, e), H);
        }
      }
      if (!slots) continue;
      if (p.grad_h != nullptr) k.scatter_rows(type, c, ld, count, D, weights + r, grad_h + r);
      if (grad_weights == nullptr) continue;
      k.dot_rows(type, h + r, c, ld, count, D, dots);
      for (int64_t i = 0; i < count; ++i) {
        T g = dots[i];
        if (p.bias.data != nullptr) {
          g += k.dot_row(type, element(p.bias.data, type, e * p.bias.stride_e), type, grads[r + i],
                         H);
        }
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
  run_chunks(s.num_tokens, par, slot_product_cost(s, 2), run_block);
  if (sums) chunks.add_up(grad_w, p.grad_bias, type, par);
}

}  // namespace

void moe_linear_reduce(const MoeLinearReduceParams& p, const Parallel& par) {
  p.w.type == DType::kFloat64 ? run_blocks<double>(p, par) : run_blocks<float>(p, par);
}

void moe_linear_reduce_bwd(const MoeLinearReduceBlocksBwdParams& p, const Parallel& par) {
  p.w.type == DType::kFloat64 ? run_blocks_bwd<double>(p, par) : run_blocks_bwd<float>(p, par);
}

void moe_linear_reduce_bwd(const MoeLinearReduceBwdParams& p, const Parallel& par) {
  p.h.type == DType::kFloat64 ? run<double>(p, par) : run<float>(p, par);
}

}  // namespace moe_ops::cpu
