// Which tile a stage of moe_ffn gets, by the model of cuda/grouped_gemm/choose.h. Plain C++.
#pragma once

#include "cuda/grouped_gemm/choose.h"
#include "cuda/moe_ffn/config.h"

namespace moe_ops::cuda {

// Returns the tile that the model finds fastest; on equal terms the smaller one. In the
// batch-invariant mode the one for many rows.
template <size_t n>
FfnTile choose_ffn_tile(const GemmDesc& d, const std::array<GemmConfig, n>& configs) {
  size_t best = 0;
  for (size_t i = 1; i < n; ++i)
    if (d.num_sms >= configs[i].cluster &&
        (d.invariant || estimate_cycles(d, configs[i]) < 0.97 * estimate_cycles(d, configs[best])))
      best = i;
  return static_cast<FfnTile>(best);
}

}  // namespace moe_ops::cuda
