// Counting sort in two passes over the ids: count, then place. Serial on purpose: at 2 ns a slot it
// is below the cost of a parallel region until N is in the tens of thousands, and the placement
// pass is what keeps the order stable.
#include "moe_ops/sort_by_expert.h"

#include <vector>

namespace moe_ops::cpu {

namespace {

template <class Index>
void sort(const SortByExpertParams& p) {
  const int64_t E = p.routing.num_experts, N = p.routing.num_slots();
  const auto* ids = static_cast<const Index*>(p.routing.topk_ids.data);
  // next[e] is the row that the next slot of expert e takes; bucket E collects the tail.
  const auto bucket = [&](int64_t s) {
    return ids[s] >= 0 && ids[s] < E ? static_cast<int64_t>(ids[s]) : E;
  };
  std::vector<int32_t> next(static_cast<size_t>(E) + 2, 0);
  for (int64_t s = 0; s < N; ++s) ++next[bucket(s) + 1];
  for (int64_t e = 0; e <= E; ++e) next[e + 1] += next[e];
  for (int64_t e = 0; e <= E; ++e) p.expert_offsets[e] = next[e];
  for (int64_t s = 0; s < N; ++s) {
    const int32_t row = next[bucket(s)]++;
    p.row_to_slot[row] = static_cast<int32_t>(s);
    p.slot_to_row[s] = row;
  }
}

}  // namespace

void sort_by_expert(const SortByExpertParams& p) {
  p.routing.topk_ids.is_64 ? sort<int64_t>(p) : sort<int32_t>(p);
}

}  // namespace moe_ops::cpu
