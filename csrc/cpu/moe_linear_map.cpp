#include "moe_ops/moe_linear_map.h"

#include <cstring>

#include "cpu/gemm/slot_blocks.h"

namespace moe_ops::cpu {

namespace {

template <class T>
void run(const MoeLinearMapParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
  const SlotProduct& s = p.s;
  const int64_t O = s.rows, size = dtype_size(p.x.type);
  ScratchScope scratch;
  const PanelBank<T> bank(scratch, k, p.w, s.num_experts, O, s.cols);
  parallel_items(par, ceil_div(s.num_tokens, kBlockTokens), slot_product_cost(s, 1),
                 [&](int64_t item) {
                   const int64_t begin = item * kBlockTokens;
                   ScratchScope scratch;
                   const SlotBlock b =
                       slot_block(scratch, s, begin, std::min(s.num_tokens, begin + kBlockTokens));
                   const int64_t n = (b.end - b.begin) * s.top_k, valid = b.offsets[s.num_experts];
                   char* h = static_cast<char*>(p.h) + b.first * O * size;
                   const void** rows = scratch.take<const void*>(Scratch::kHidden, 2 * n);
                   void** out = const_cast<void**>(rows + n);
                   const RowStarts x(p.x), hs(h, O * size);
                   for (int64_t r = 0; r < valid; ++r) {
                     rows[r] = x[b.tokens[r]];
                     out[r] = const_cast<void*>(hs[b.slots[r]]);
                   }
                   T* c = scratch.take<T>(Scratch::kTile, n * padded(k, O));
                   for (int64_t e = 0; e < s.num_experts; ++e) {
                     const int64_t r = b.offsets[e], count = b.offsets[e + 1] - r;
                     if (count == 0) continue;
                     multiply_slots(k, p.x.type, rows + r, count, s.cols, bank.of(e), O,
                                    p.bias.data == nullptr
                                        ? nullptr
                                        : element(p.bias.data, p.bias.type, e * p.bias.stride_e),
                                    c);
                     k.scatter_rows(p.x.type, c, padded(k, O), count, O, nullptr, out + r);
                   }
                   if (valid == n) return;
                   for (int64_t i = 0; i < n; ++i) {
                     if (b.rows[i] < 0)
                       std::memset(h + i * O * size, 0, static_cast<size_t>(O * size));
                   }
                 });
}

template <class T>
void run_bwd(const MoeLinearMapBwdParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
  const SlotProduct& s = p.s;
  const DType type = p.x.type;
  const int64_t O = s.rows, H = s.cols, E = s.num_experts, size = dtype_size(type);
  const bool sums = p.grad_w != nullptr || p.grad_bias != nullptr;
  ScratchScope scratch;
  const PanelBank<T> bank(scratch, k, transposed(p.w), p.grad_x != nullptr ? E : 0, H, O);
  const MatrixGrads grad_w{p.grad_w, type};
  const ChunkSums<T> chunks(scratch, s, k, sums, grad_w);
  const auto run_block = [&](int64_t chunk, int64_t begin, int64_t end, bool first) {
    ScratchScope scratch;
    const SlotBlock b = slot_block(scratch, s, begin, end);
    const int64_t n = (end - begin) * s.top_k, ld = padded(k, H);
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
      multiply_gradients<T>(k, type, grads + r, O, tokens + r, H, nullptr, count,
                            p.grad_w == nullptr ? nullptr : chunks.matrix_of(chunk, e), !first,
                            bank.of(e), p.grad_x == nullptr ? nullptr : c + r * ld);
      if (p.grad_bias != nullptr) {
        for (int64_t i = r; i < r + count; ++i) {
          k.axpy(type, grads[i], T(1), chunks.bias_of(chunk, e), O);
        }
      }
    }
    if (p.grad_x == nullptr) return;
    k.combine_rows(type, c, ld, b.rows, nullptr, end - begin, s.top_k, H,
                   static_cast<char*>(p.grad_x) + begin * H * size);
  };
  run_chunks(s.num_tokens, par, slot_product_cost(s, 2), run_block);
  if (sums) chunks.add_up(grad_w, p.grad_bias, type, par);
}

}  // namespace

bool takes_slot_product(const SlotProduct& s, DType type) {
  return takes_blocks({s.num_tokens, s.top_k, s.num_experts, std::min(s.rows, s.cols),
                       std::max(s.rows, s.cols), s.rows * s.cols, type});
}

void moe_linear_map(const MoeLinearMapParams& p, const Parallel& par) {
  p.x.type == DType::kFloat64 ? run<double>(p, par) : run<float>(p, par);
}

void moe_linear_map_bwd(const MoeLinearMapBwdParams& p, const Parallel& par) {
  p.x.type == DType::kFloat64 ? run_bwd<double>(p, par) : run_bwd<float>(p, par);
}

}  // namespace moe_ops::cpu
