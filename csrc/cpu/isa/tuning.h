// Numbers that the processor decides beside the target: one table a microarchitecture.
#pragma once

#include <cstdint>
#include <limits>

namespace moe_ops::cpu {

struct Tuning {
  static constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
  // Most rows of an expert for which bf16 dot products (vdpbf16ps) are no slower than fp32.
  int64_t bf16_max_rows;
  // Prefetch distance of streams of packed weights, in bytes, and the size of the weights from
  // which on they are prefetched: more than an L3 holds.
  int64_t stream_distance, stream_min_bytes;
  bool avx2_prefetches_streams;
  // If true, prefetches of a tile alternate between two halves of the rows.
  bool prefetch_halves;
  // Most rows of an expert for which several packed panels are read at once.
  int stream_rows;
  // Rows of a work item of packed weights: their sums and a panel fit an L2.
  int64_t packed_max_rows;
  // Prefetch distance of a GEMV whose weights several passes of tokens read, in bytes.
  int64_t gemv_distance;
  // Most rows of an expert for a GEMV in passes of two tokens.
  int avx2_gemv_max_rows;
  // Most rows of an expert for a blocked GEMV, most steps of k of its blocks, and the depth from
  // which one pass of it beats two of GEMV.
  int64_t blocked_max_rows, blocked_k, blocked_one_pass_min_depth;
  // If true, tiles are faster than a second pass of outer products.
  bool outer_one_pass;
};

const Tuning& tuning();
// Returns the tuning of Intel's or another maker's processors, with an L2 that is not small.
const Tuning& tuning_of(bool intel);

}  // namespace moe_ops::cpu
