// Launching a kernel on as many blocks as the card runs at once.
#pragma once

#include <algorithm>

#include "cuda/launch.h"

namespace moe_ops::cuda::generic {

// tiles: an upper bound; blocks that find none leave at once.
template <auto kernel, class Params>
Status launch_tiles(const Params& params, int64_t tiles, int threads, int shared_bytes,
                    int blocks_per_sm, Stream stream) {
  if (tiles <= 0) return 0;
  const int64_t resident = int64_t{usable_sms()} * blocks_per_sm;
  const auto grid = static_cast<unsigned>(std::min(tiles, std::max<int64_t>(1, resident)));
  const Launch at{grid, static_cast<unsigned>(threads), stream, static_cast<size_t>(shared_bytes)};
  return launch_kernel<kernel>(at, params);
}

}  // namespace moe_ops::cuda::generic
