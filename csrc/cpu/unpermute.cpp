#include "moe_ops/unpermute.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/kernels/rows.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"

namespace moe_ops::cpu {

namespace {

template <class T>
void run_tokens(const UnpermuteParams& p, int64_t begin, int64_t end) {
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t H = p.hidden_size, K = p.top_k, size = dtype_size(p.type);
  const char* rows = static_cast<const char*>(p.rows);
  const T* weights = static_cast<const T*>(p.topk_weights);
  std::vector<const void*> row(static_cast<size_t>(K));
  std::vector<T> weight(static_cast<size_t>(K));
  ScratchScope scratch;
  T* sum = scratch.take<T>(Scratch::kTile, H);
  const int64_t y_bytes = (p.y_stride != 0 ? p.y_stride : H) * dtype_size(p.y_type);
  for (int64_t t = begin; t < end; ++t) {
    int64_t n = 0;
    const int64_t first = p.token_starts == nullptr ? t * K : p.token_starts[t];
    const int64_t last = p.token_starts == nullptr ? first + K : p.token_starts[t + 1];
    if (last - first > static_cast<int64_t>(row.size())) {
      row.resize(static_cast<size_t>(last - first));
      weight.resize(static_cast<size_t>(last - first));
    }
    for (int64_t s = first; s < last; ++s) {
      if (p.slot_to_row[s] < 0 || p.slot_to_row[s] >= p.num_valid_rows) continue;
      row[n] = rows + p.slot_to_row[s] * p.row_stride * size;
      weight[n++] = weights != nullptr ? weights[s] : T(1);
    }
    k.weighted_sum({p.type, row.data(), n, H}, weights != nullptr ? weight.data() : nullptr, sum);
    k.store_row(p.y_type, sum, static_cast<char*>(p.y) + t * y_bytes, H);
  }
}

template <class T>
void run_bwd(const UnpermuteBwdParams& p, const Parallel& par) {
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t H = p.hidden_size, K = p.top_k, size = dtype_size(p.type);
  const T* weights = static_cast<const T*>(p.topk_weights);
  // From the row's side, so that each row of grad_rows is written once whatever the map holds. The
  // slots of a row are a list in their order: next of N is the end.
  const auto N = static_cast<int32_t>(p.num_tokens * K);
  std::vector<int32_t> first(static_cast<size_t>(p.num_rows), N), next(static_cast<size_t>(N));
  for (int32_t s = N - 1; s >= 0; --s) {
    if (p.slot_to_row[s] < 0) continue;
    next[s] = first[p.slot_to_row[s]];
    first[p.slot_to_row[s]] = s;
  }
  const auto grad_of = [&](int64_t s) {
    return static_cast<const char*>(p.grad_y) + s / K * p.grad_y_stride * size;
  };
  parallel_range(par, p.num_rows, H / 4.0 + 2, [&](int64_t begin, int64_t end) {
    ScratchScope scratch;
    T* grad = scratch.take<T>(Scratch::kTile, H);
    for (int64_t r = begin; r < end; ++r) {
      char* out = static_cast<char*>(p.grad_rows) + r * H * size;
      const int32_t s = first[r];
      if (s == N || r >= p.num_valid_rows) {
        std::memset(out, 0, static_cast<size_t>(H * size));
        continue;
      }
      k.load_row(p.type, grad_of(s), grad, H, weights != nullptr ? weights[s] : T(1));
      for (int32_t other = next[s]; other != N; other = next[other]) {
        k.axpy(p.type, grad_of(other), weights != nullptr ? weights[other] : T(1), grad, H);
      }
      k.store_row(p.type, grad, out, H);
    }
  });
  if (p.grad_weights == nullptr) return;
  T* grad_weights = static_cast<T*>(p.grad_weights);
  parallel_range(par, N, H / 8.0 + 2, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t r = p.slot_to_row[s];
      grad_weights[s] =
          r < 0 || r >= p.num_valid_rows
              ? T(0)
              : k.dot_row(p.type, static_cast<const char*>(p.rows) + r * p.row_stride * size,
                          p.type, grad_of(s), H);
    }
  });
}

}  // namespace

double unpermute_cost(const UnpermuteParams& p) {
  return static_cast<double>(p.top_k * p.hidden_size) / 8 + 4;
}

void unpermute_tokens(const UnpermuteParams& p, int64_t begin, int64_t end) {
  p.type == DType::kFloat64 ? run_tokens<double>(p, begin, end) : run_tokens<float>(p, begin, end);
}

void unpermute(const UnpermuteParams& p, const Parallel& par) {
  parallel_range(par, p.num_tokens, unpermute_cost(p),
                 [&](int64_t begin, int64_t end) { unpermute_tokens(p, begin, end); });
}

void unpermute_bwd(const UnpermuteBwdParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? run_bwd<double>(p, par) : run_bwd<float>(p, par);
}

}  // namespace moe_ops::cpu
