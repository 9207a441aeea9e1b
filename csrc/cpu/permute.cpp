#include "moe_ops/permute.h"

#include <cstring>
#include <vector>

#include "cpu/runtime/parallel.h"
#include "moe_ops/unpermute.h"

namespace moe_ops::cpu {

namespace {

// Sorts the rows that have a slot by slot, then by row; returns where the rows of each token start.
std::vector<int64_t> sort_rows_by_slot(const PermuteBwdParams& p, std::vector<int32_t>& rows) {
  const int64_t N = p.num_rows, T = p.num_tokens, K = p.top_k;
  const int32_t* slots = p.row_to_slot;
  std::vector<int64_t> starts(static_cast<size_t>(T * K) + 1);
  for (int64_t r = 0; r < N; ++r) {
    if (slots[r] >= 0) ++starts[slots[r] + 1];
  }
  for (int64_t s = 0; s < T * K; ++s) starts[s + 1] += starts[s];
  std::vector<int64_t> token_starts(static_cast<size_t>(T) + 1);
  for (int64_t t = 0; t <= T; ++t) token_starts[t] = starts[t * K];
  rows.resize(static_cast<size_t>(N));
  for (int64_t r = 0; r < N; ++r) {
    if (slots[r] >= 0) rows[starts[slots[r]]++] = static_cast<int32_t>(r);
  }
  return token_starts;
}

}  // namespace

void permute(const PermuteParams& p, const Parallel& par) {
  const int64_t size = dtype_size(p.type), bytes = p.hidden_size * size;
  const char* x = static_cast<const char*>(p.x);
  char* rows = static_cast<char*>(p.rows);
  const auto top_k = static_cast<int32_t>(p.top_k);
  if (bytes == 0) return;
  parallel_range(par, p.num_rows, bytes / 16.0 + 2, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (r < p.num_valid_rows && p.row_to_slot[r] >= 0) {
        std::memcpy(rows + r * bytes, x + p.row_to_slot[r] / top_k * p.x_stride * size, bytes);
      } else {
        std::memset(rows + r * bytes, 0, bytes);
      }
    }
  });
}

void permute_bwd(const PermuteBwdParams& p, const Parallel& par) {
  std::vector<int32_t> slot_to_row(static_cast<size_t>(p.num_tokens * p.top_k), -1);
  bool repeats = false;
  for (int64_t r = 0; r < p.num_rows; ++r) {
    if (p.row_to_slot[r] < 0) continue;
    int32_t& row = slot_to_row[p.row_to_slot[r]];
    repeats |= row >= 0;
    row = static_cast<int32_t>(r);
  }
  std::vector<int64_t> token_starts;
  if (repeats) token_starts = sort_rows_by_slot(p, slot_to_row);
  UnpermuteParams u;
  u.rows = p.grad_rows;
  u.type = u.y_type = p.type;
  u.row_stride = p.grad_stride;
  u.hidden_size = p.hidden_size;
  u.num_tokens = p.num_tokens;
  u.top_k = p.top_k;
  u.num_valid_rows = p.num_valid_rows;
  u.slot_to_row = slot_to_row.data();
  u.token_starts = repeats ? token_starts.data() : nullptr;
  u.topk_weights = nullptr;
  u.y = p.grad_x;
  unpermute(u, par);
}

}  // namespace moe_ops::cpu
