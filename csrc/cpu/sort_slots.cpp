// Counting sort in two passes over the ids: count, then place. Serial on purpose: at 2 ns a slot it
// is below the cost of a parallel region until N is in the tens of thousands, and the placement
// pass is what keeps the order stable.
#include "moe_ops/sort_slots.h"

#include <vector>

namespace moe_ops::cpu {

void sort_slots(const SortSlotsParams& p) {
  const int64_t E = p.num_experts;
  // next[e] is the row that the next slot of expert e takes; bucket E collects the tail.
  std::vector<int32_t> next(static_cast<size_t>(E) + 2, 0);
  for (int64_t s = 0; s < p.num_slots; ++s) {
    const int64_t bucket = p.topk_ids[s] < 0 ? E : p.topk_ids[s];
    ++next[bucket + 1];
  }
  for (int64_t e = 0; e <= E; ++e) next[e + 1] += next[e];
  for (int64_t e = 0; e <= E; ++e) p.expert_offsets[e] = next[e];
  for (int64_t s = 0; s < p.num_slots; ++s) {
    const int64_t bucket = p.topk_ids[s] < 0 ? E : p.topk_ids[s];
    const int32_t row = next[bucket]++;
    p.row_to_slot[row] = static_cast<int32_t>(s);
    p.slot_to_row[s] = row;
  }
}

}  // namespace moe_ops::cpu
