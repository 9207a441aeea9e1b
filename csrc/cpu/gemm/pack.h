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

#include "cpu/isa/isa.h"
#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops::cpu {

struct PanelLayout {
  int64_t width;        // features of a panel
  int64_t depth;        // K as stored
  int64_t segments;     // runs of features
  int64_t count;        // panels of one segment
  int64_t panel_bytes;  // of one panel
  int64_t expert_bytes() const { return panel_bytes * count * segments; }
};

// For matrices [E, O, K] of `type`; O = segments * the features of one.
PanelLayout panel_layout(DType type, int64_t out_features, int64_t in_features, int64_t segments);

// Packs all experts. panels: num_experts * expert_bytes(), 64-byte aligned.
void pack_panels(const ExpertMatrices& w, int64_t num_experts, int64_t out_features,
                 int64_t in_features, int64_t segments, void* panels, const Parallel& par);

// Bytes of one expert in such panels.
MOE_OPS_API int64_t packed_expert_bytes(DType type, int64_t out_features, int64_t in_features,
                                        int64_t segments);

// Elements of the weights of an expert, and where its panels hold them: one of every 20th part of
// its features and of its depth, others at every call. Neighbours are less than 5/4 of a part
// apart, so a write over a 16th of either is found at once, and one to scattered elements with a
// probability that grows from call to call. Rows of weights are in pages of their own, and looking
// those up is what an element costs.
constexpr int64_t kMatchSamples = 20;
struct PanelSamples {
  int64_t count = 0, size = 0;  // size: bytes of an element
  const char *packed[kMatchSamples], *source[kMatchSamples];
};

// Chooses them and asks for their cache lines: two misses each, which overlap if the caller has
// something else to do before it compares.
PanelSamples sample_panels(const ExpertMatrices& w, const void* panels, int64_t e,
                           int64_t out_features, int64_t in_features, int64_t segments);

// Whether the panels hold the weights there.
bool samples_match(const PanelSamples& samples);

// How often samples_match has said no in this process.
MOE_OPS_API int64_t stale_panels();

}  // namespace moe_ops::cpu
