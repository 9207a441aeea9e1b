// Products with 4 to 64 columns, made of dot products along H: a library for large matrices spends
// more on copies and padding there than on multiplying.
#include "moe_ops/router_linear.h"

#include <algorithm>

#include "cpu/gemm/blocking.h"
#include "cpu/kernels/router.h"
#include "cpu/kernels/rows.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"

namespace moe_ops::cpu {

namespace {

int64_t block_rows(int64_t n) {
  return std::clamp<int64_t>(8192 / std::max<int64_t>(n, 1) / 4 * 4, 4, kRouterLinearRows);
}

const char* at(const void* data, DType type, int64_t offset) {
  return static_cast<const char*>(data) + offset * dtype_size(type);
}

char* at(void* data, DType type, int64_t offset) {
  return static_cast<char*>(data) + offset * dtype_size(type);
}

// Rows of n elements as the kernels take them: a row of whole vectors, of the type of the sums.
// They lie in place, or are copied to `buffer`, and what is past their end there is zero.
template <class T>
struct WholeRows {
  const T* data;
  int64_t ld;
};

template <class T>
WholeRows<T> whole_rows(const RowKernels<T>& k, DType type, const void* src, int64_t ld,
                        int64_t rows, int64_t n, T* buffer, int64_t pitch) {
  k.load_rows({type, src, ld, rows, n}, buffer, pitch, T(1));
  if (n < pitch) {
    for (int64_t r = 0; r < rows; ++r)
      std::fill(buffer + r * pitch + n, buffer + (r + 1) * pitch, T(0));
  }
  return {buffer, pitch};
}

// Returns the weights [E, H] with E and H rounded up, for all threads, in scratch memory of the
// calling thread.
template <class T>
WholeRows<T> whole_weights(const RowKernels<T>& k, ScratchScope& scratch, DType type,
                           const void* weight, int64_t experts, int64_t hidden) {
  const int64_t padded = round_up<int64_t>(experts, kRouterExperts);
  const int64_t pitch = round_up<int64_t>(hidden, k.lanes);
  if (type == kAccumulate<T> && padded == experts && pitch == hidden) {
    return {static_cast<const T*>(weight), hidden};
  }
  T* const buffer = scratch.take<T>(Scratch::kPackB, padded * pitch);
  std::fill(buffer + experts * pitch, buffer + padded * pitch, T(0));
  return whole_rows(k, type, weight, hidden, experts, hidden, buffer, pitch);
}

template <class T>
void run(const RouterLinearParams& p, const Parallel& par) {
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t E = p.num_experts, H = p.hidden_size;
  const int64_t experts = round_up<int64_t>(E, kRouterExperts), n = round_up<int64_t>(H, k.lanes);
  ScratchScope scratch;
  const WholeRows<T> w = whole_weights(k, scratch, p.type, p.weight, E, H);
  T* const bias = scratch.take<T>(Scratch::kPackA, experts);
  std::fill(bias, bias + experts, T(0));
  if (p.bias != nullptr) k.load_row(p.type, p.bias, bias, E, T(1));
  const bool in_place = p.type == kAccumulate<T> && n == H;
  const bool out_in_place = p.logits_type == kAccumulate<T> && experts == E;
  const int64_t block = block_rows(n);
  const double cost = static_cast<double>(experts) * static_cast<double>(n) / 16 + 8;
  parallel_range(par, p.num_tokens, cost, [&](int64_t begin, int64_t end) {
    ScratchScope scratch;
    Arena arena(scratch, Scratch::kRows,
                block * (n + experts) * static_cast<int64_t>(sizeof(T)) + 2 * 64);
    T* const x_buffer = arena.take<T>(block * n);
    T* const sums = arena.take<T>(block * experts);
    const int64_t step = in_place && out_in_place ? end - begin : block;
    for (int64_t t = begin; t < end; t += step) {
      const int64_t m = std::min(step, end - t);
      const char* const from = at(p.x, p.type, t * p.x_stride);
      const WholeRows<T> x = in_place ? WholeRows<T>{reinterpret_cast<const T*>(from), p.x_stride}
                                      : whole_rows(k, p.type, from, p.x_stride, m, H, x_buffer, n);
      char* const to = at(p.logits, p.logits_type, t * E);
      T* const out = out_in_place ? reinterpret_cast<T*>(to) : sums;
      router_kernels<T>().linear({m, experts, n, x.data, x.ld, w.data, w.ld, bias, out, experts});
      if (!out_in_place) k.store_rows(out, experts, {p.logits_type, to, E, m, E});
    }
  });
}

// Returns the tokens per part: weight gradients are summed over parts of the tokens, which depend
// on sizes alone, and the parts are added in order, so results do not depend on the threads. The
// sums of all parts take at most 4 MiB, unless one takes more.
int64_t rows_of_part(const RouterLinearBwdParams& p) {
  const int64_t sums = std::max<int64_t>(1, p.num_experts * p.hidden_size);
  const int64_t parts =
      std::clamp<int64_t>(std::min((int64_t{1} << 20) / sums, p.num_tokens / 256), 1, 32);
  return round_up(ceil_div(std::max<int64_t>(1, p.num_tokens), parts), kRouterLinearRows);
}

template <class T>
void run_bwd(const RouterLinearBwdParams& p, const Parallel& par) {
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t E = p.num_experts, H = p.hidden_size;
  const int64_t experts = round_up<int64_t>(E, kRouterExperts), n = round_up<int64_t>(H, k.lanes);
  const bool need_x = p.grad_x != nullptr, need_w = p.grad_weight != nullptr;
  ScratchScope scratch;
  const WholeRows<T> w =
      need_x ? whole_weights(k, scratch, p.type, p.weight, E, H) : WholeRows<T>{nullptr, 0};
  const int64_t part_rows = rows_of_part(p), parts = ceil_div(p.num_tokens, part_rows);
  const int64_t step = experts * (n + 1);  // of sums: [experts, n], and the bias gradient [experts]
  T* const sums = scratch.take<T>(Scratch::kPackA, std::max<int64_t>(1, parts) * step);
  std::fill(sums, sums + std::max<int64_t>(1, parts) * step, T(0));
  const bool in_place = p.type == kAccumulate<T> && n == H;
  const bool g_in_place = p.grad_type == kAccumulate<T> && experts == E;
  const int64_t block = in_place ? kRouterLinearRows : block_rows(n);
  const double cost =
      static_cast<double>(p.num_tokens) * static_cast<double>(n) * static_cast<double>(experts) / 8;
  parallel_items(par, parts, cost, [&](int64_t part) {
    const int64_t begin = part * part_rows, end = std::min(p.num_tokens, begin + part_rows);
    ScratchScope scratch;
    Arena arena(scratch, Scratch::kRows,
                block * (2 * n + experts) * static_cast<int64_t>(sizeof(T)) + 3 * 64);
    T* const x_buffer = arena.take<T>(block * n);
    T* const grad_buffer = arena.take<T>(block * n);
    T* const g_buffer = arena.take<T>(block * experts);
    T* const bias_sums = sums + part * step + experts * n;
    RouterLinearBwd<T> rows = {};
    rows.experts = experts;
    rows.n = n;
    rows.w = w.data;
    rows.ld_w = w.ld;
    rows.grad_w = need_w ? sums + part * step : nullptr;
    rows.ld_grad_w = n;
    for (int64_t t = begin; t < end; t += block) {
      rows.tokens = std::min(block, end - t);
      const char* const grads = at(p.grad_logits, p.grad_type, t * E);
      const WholeRows<T> g =
          g_in_place ? WholeRows<T>{reinterpret_cast<const T*>(grads), E}
                     : whole_rows(k, p.grad_type, grads, E, rows.tokens, E, g_buffer, experts);
      rows.g = g.data;
      rows.ld_g = g.ld;
      if (p.grad_bias != nullptr) {
        for (int64_t r = 0; r < rows.tokens; ++r) {
          for (int64_t e = 0; e < experts; ++e) bias_sums[e] += g.data[r * g.ld + e];
        }
      }
      if (!need_x && !need_w) continue;
      const char* const from = at(p.x, p.type, t * p.x_stride);
      WholeRows<T> x = {reinterpret_cast<const T*>(from), p.x_stride};
      if (need_w && !in_place) {
        x = whole_rows(k, p.type, from, p.x_stride, rows.tokens, H, x_buffer, n);
      }
      rows.x = x.data;
      rows.ld_x = x.ld;
      char* const to = need_x ? at(p.grad_x, p.type, t * H) : nullptr;
      rows.grad_x = !need_x || in_place ? reinterpret_cast<T*>(to) : grad_buffer;
      rows.ld_grad_x = n;
      router_kernels<T>().linear_bwd(rows);
      if (need_x && !in_place) k.store_rows(grad_buffer, n, {p.type, to, H, rows.tokens, H});
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    k.axpy(kAccumulate<T>, sums + part * step, T(1), sums, step);
  }
  if (need_w) k.store_rows(sums, n, {p.type, p.grad_weight, H, E, H});
  if (p.grad_bias != nullptr) k.store_row(p.type, sums + experts * n, p.grad_bias, E);
}

}  // namespace

void router_linear(const RouterLinearParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? run<double>(p, par) : run<float>(p, par);
}

void router_linear_bwd(const RouterLinearBwdParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? run_bwd<double>(p, par) : run_bwd<float>(p, par);
}

}  // namespace moe_ops::cpu
