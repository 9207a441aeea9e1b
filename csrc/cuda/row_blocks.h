// Partition of rows into blocks. Plain C++: no CUDA type, testable on any machine.
#pragma once

#include <cstdint>

#include "moe_ops/common.h"

namespace moe_ops::cuda {

// A block is kRowWarps warps on as many rows, each warp on the same stretch of its row: some
// accesses a lane.
constexpr int kRowWarps = 8;

// A grid: x runs over rows, up to 2^34 of them; y and z over stretches, stretch z * (blocks in y) +
// y. A grid has no more than 65535 blocks in y, which rows of 2^22 elements that are read one by
// one would pass; and with the smaller kMostStretches a test reaches z without a long row. Blocks
// past the last stretch find nothing to do.
constexpr int64_t kMostStretches = 4096;  // in y

struct RowBlocks {
  unsigned x, y, z;
};

// Returns the grid for rows of `accesses` accesses, `stretch` of them per block.
inline RowBlocks row_blocks(int64_t rows, int64_t accesses, int64_t stretch) {
  const int64_t stretches = ceil_div(accesses, stretch);
  const int64_t z = ceil_div(stretches, kMostStretches);
  return {static_cast<unsigned>(ceil_div<int64_t>(rows, kRowWarps)),
          static_cast<unsigned>(z > 1 ? ceil_div(stretches, z) : stretches),
          static_cast<unsigned>(z > 1 ? z : 1)};
}

}  // namespace moe_ops::cuda
