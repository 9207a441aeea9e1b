// Two serial passes over the slots, as in sort_by_expert: count the rows of each rank, then place
// them, which keeps tokens in order. The remaining entries are filled in per token, in parallel.
#include "moe_ops/dispatch_layout.h"

#include <vector>

#include "cpu/runtime/parallel.h"

namespace moe_ops::cpu {

namespace {

int64_t index_at(const IndexMap& map, int64_t i) {
  return map.is_64 ? static_cast<const int64_t*>(map.data)[i]
                   : static_cast<const int32_t*>(map.data)[i];
}

// Returns the expert of a slot if a rank has it, else -1.
int32_t expert_of(const DispatchLayoutParams& p, int64_t slot) {
  int64_t id = index_at(p.topk_ids, slot);
  if (id < 0 || id >= p.num_ids) return -1;
  if (p.physical.data != nullptr) id = index_at(p.physical, id);
  return id >= 0 && id < p.num_ranks * p.experts_per_rank ? static_cast<int32_t>(id) : -1;
}

}  // namespace

void dispatch_layout(const DispatchLayoutParams& p, const Parallel& par) {
  const int64_t T = p.num_tokens, K = p.top_k, ranks = p.num_ranks;
  const auto per_rank = static_cast<int32_t>(p.experts_per_rank);
  std::vector<int32_t> experts(static_cast<size_t>(T * K));
  // next[r] is the row that the next token of rank r takes, once rows are counted.
  std::vector<int32_t> next(static_cast<size_t>(ranks) + 1, 0);
  std::vector<int64_t> last_token(static_cast<size_t>(ranks), -1);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t s = t * K; s < (t + 1) * K; ++s) {
      experts[s] = expert_of(p, s);
      p.slot_to_row[s] = -1;
      if (experts[s] < 0) continue;
      const int32_t rank = experts[s] / per_rank;
      if (last_token[rank] == t) continue;
      last_token[rank] = t;
      p.slot_to_row[s] = rank;  // until the row is known
      ++next[rank + 1];
    }
  }
  for (int64_t r = 0; r < ranks; ++r) next[r + 1] += next[r];
  for (int64_t r = 0; r <= ranks; ++r) p.rank_offsets[r] = next[r];
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t s = t * K; s < (t + 1) * K; ++s) {
      if (p.slot_to_row[s] < 0) continue;
      const int32_t row = next[p.slot_to_row[s]]++;
      p.slot_to_row[s] = row;
      p.row_to_token[row] = static_cast<int32_t>(t);
    }
  }
  const int64_t rows = p.rank_offsets[ranks];
  std::fill(p.row_to_token + rows, p.row_to_token + p.num_rows(), -1);
  std::fill(p.local_ids + rows * K, p.local_ids + p.num_rows() * K, -1);
  const auto cost = static_cast<double>(K * std::min(K, ranks)) + 2;
  parallel_range(par, T, cost, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin * K; s < end * K; ++s) {
      if (p.slot_to_row[s] < 0) continue;
      const int32_t first = experts[s] / per_rank * per_rank;
      const int32_t* of_token = experts.data() + s / K * K;
      int32_t* local = p.local_ids + p.slot_to_row[s] * K;
      for (int64_t k = 0; k < K; ++k) {
        const int64_t id = int64_t{of_token[k]} - first;
        local[k] = id >= 0 && id < per_rank ? static_cast<int32_t>(id) : -1;
      }
    }
  });
}

}  // namespace moe_ops::cpu
