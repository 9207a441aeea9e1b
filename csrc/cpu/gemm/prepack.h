// Weights packed ahead of time for products along k: panels of 2*lanes features, stored in the
// order in which the tiles read them.
//
//   fp32, fp64    panel = [K][2*lanes]
//   half types    panel = [Kp/2][2*lanes][2]: pairs of k side by side, Kp = K rounded up to 32. One
//                 shift or mask widens a vector of pairs to 16 floats, and AMX takes it as it is.
//
// Features come in `segments` runs (gate and up): panel i of the first, panel i of the second, then
// the next i, so that an item reads both as one stream. Missing features and steps of k are zero.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/isa/isa.h"
#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"
#include "moe_ops/routing.h"

namespace moe_ops::cpu {

struct PanelLayout {
  int64_t width;        // features of a panel
  int64_t depth;        // K as stored
  int64_t segments;     // runs of features
  int64_t count;        // panels of one segment
  int64_t panel_bytes;  // of one panel
  int64_t expert_bytes() const { return panel_bytes * count * segments; }
};

// Returns the layout for matrices [E, O, K] of `type`; O = segments * features per segment.
PanelLayout panel_layout(DType type, int64_t out_features, int64_t in_features, int64_t segments);

// Packs all experts. panels: num_experts * expert_bytes(), 64-byte aligned.
void pack_panels(const ExpertMatrices& w, int64_t num_experts, int64_t out_features,
                 int64_t in_features, int64_t segments, void* panels, const Parallel& par);

// Returns the bytes of one expert in such panels.
int64_t packed_expert_bytes(DType type, int64_t out_features, int64_t in_features,
                            int64_t segments);

// A weight [E, out_features, in_features] whose `panels` are a packed copy.
struct PackedWeight {
  ExpertMatrices* w;
  int64_t out_features, in_features, segments;
};

// Takes away the panels of each weight that has been written since they were packed, judged by a
// few elements of every expert that has rows: weights can be written in ways that no version
// counter sees.
void drop_stale_panels(const Routing& routing, std::span<const PackedWeight> weights);

// Returns how many stale panels of experts drop_stale_panels has found in this process.
int64_t stale_panels();

}  // namespace moe_ops::cpu
