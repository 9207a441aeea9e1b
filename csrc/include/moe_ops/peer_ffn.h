// peer_ffn: y[t] = the sum over k of weight[t, k] * act(u_e . x[t]) * v_e, e = id[t, k]: experts of
// one neuron, whose vectors are rows of two tables that are gathered and not multiplied as
// matrices. With a gated activation an expert has two vectors u.
#pragma once

#include <cstdint>

#include "moe_ops/activation.h"
#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"
#include "moe_ops/routing.h"

namespace moe_ops {

// A table of vectors [E, G, H]: vector (e, g) is dense and begins at e * stride_e + g * stride_g.
struct NeuronTable {
  const void* data = nullptr;
  int64_t stride_e = 0, stride_g = 0;  // elements
};

// Description shared by forward and backward.
struct PeerFfnDesc {
  DType type;                // of x, the tables and y
  Activation act;            // with its usual alpha and limit
  Routing routing;           // with topk_ids; any K
  int64_t hidden_size;       // H
  NeuronTable w_gate_up;     // [E, G, H], G = 2 with a gate (the gate first), else 1
  NeuronTable w_down;        // [E, 1, H]
  const void* topk_weights;  // [T, K] in the accumulate type
  Rows x;                    // [T, H], no index

  constexpr int64_t vectors() const { return is_gated(act) ? 2 : 1; }  // G
};

struct PeerFfnParams {
  PeerFfnDesc desc;
  void* y;       // [T, H] contiguous, out
  void* preact;  // [T, G, K] u . x in the accumulate type, 0 of empty slots, out; nullptr: not
                 // wanted (CPU)
  void* workspace = nullptr;  // CUDA: [T, K] in the accumulate type
};

// Outputs that are nullptr are not wanted.
struct PeerFfnBwdParams {
  PeerFfnDesc desc;
  Rows grad_y;         // [T, H], no index
  const void* preact;  // [T, G, K]
  // Which row of the gradients of the tables a slot adds to: topk_ids and E, or numbers of the rows
  // that are asked for, their ids in num_experts. CUDA: with the maps that sort_by_expert made.
  Routing rows;
  void* grad_x;               // [T, H] contiguous
  void* grad_w_gate_up;       // [rows, G, H] contiguous
  void* grad_w_down;          // [rows, 1, H] contiguous
  void* grad_topk_weights;    // [T, K] in the accumulate type
  void* workspace = nullptr;  // CUDA: [T, G + 1, K] in the accumulate type
};

namespace cpu {
void peer_ffn(const PeerFfnParams& p, const Parallel& par);
void peer_ffn_bwd(const PeerFfnBwdParams& p, const Parallel& par);
}  // namespace cpu

namespace cuda {
Status peer_ffn(const PeerFfnParams& p, Stream stream);
Status peer_ffn_bwd(const PeerFfnBwdParams& p, Stream stream);
}  // namespace cuda

}  // namespace moe_ops
