// A row [2I] of gate and up, as halves or interleaved, or [I] of an activation without a gate.
#pragma once

#include "cuda/vec.cuh"
#include "moe_ops/activation.h"

namespace moe_ops::cuda {

// Loads columns c to c + V of gate and up in a row of gate_up. With halves they are one access
// each; interleaved, two neighboring accesses hold as many pairs.
template <Activation A, class S, int V>
__device__ __forceinline__ void load_gate_up(const S* row, int64_t c, int64_t size,
                                             bool interleaved, Wide<S, V>& gate, Wide<S, V>& up) {
  if constexpr (is_gated(A)) {
    if (!interleaved) {
      gate = load_wide<V>(row + c);
      up = load_wide<V>(row + size + c);
      return;
    }
    Wide<S, V> part[2] = {load_wide<V>(row + 2 * c), load_wide<V>(row + 2 * c + V)};
#pragma unroll
    for (int v = 0; v < V; ++v) {
      gate.v[v] = part[2 * v / V].v[2 * v % V];
      up.v[v] = part[(2 * v + 1) / V].v[(2 * v + 1) % V];
    }
  } else {
    gate = load_wide<V>(row + c);
    up = Wide<S, V>{};
  }
}

template <Activation A, class S, int V>
__device__ __forceinline__ void store_gate_up(S* row, int64_t c, int64_t size, bool interleaved,
                                              const Wide<S, V>& gate, const Wide<S, V>& up) {
  if constexpr (is_gated(A)) {
    if (!interleaved) {
      store_wide<V>(row + c, gate);
      store_wide<V>(row + size + c, up);
      return;
    }
    Wide<S, V> part[2];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      part[2 * v / V].v[2 * v % V] = gate.v[v];
      part[(2 * v + 1) / V].v[(2 * v + 1) % V] = up.v[v];
    }
    store_wide<V>(row + 2 * c, part[0]);
    store_wide<V>(row + 2 * c + V, part[1]);
  } else {
    store_wide<V>(row + c, gate);
  }
}

}  // namespace moe_ops::cuda
