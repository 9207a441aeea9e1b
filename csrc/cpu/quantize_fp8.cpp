#include "moe_ops/quantize_fp8.h"

#include <cstring>
#include <vector>

#include "cpu/gemm/desc.h"
#include "cpu/gemm/quantize_fp8_row.h"
#include "cpu/runtime/parallel.h"

namespace moe_ops::cpu {

void quantize_fp8(const QuantizeFp8Params& p, const Parallel& par) {
  const int64_t D = p.row_length, blocks = ceil_div(D, kFp8Block);
  parallel_range(par, p.num_rows, D / 4.0 + 2, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      quantize_fp8_row(p.x.type, row_of(p.x, r), D, p.q + r * D, p.scale + r * blocks);
    }
  });
}

// Transposes some of a group's columns at a time to rows of 128 in cache, and quantizes those rows.
void quantize_fp8_columns(const QuantizeFp8ColumnsParams& p, const Parallel& par) {
  constexpr int64_t kLine = kFp8Block + 16;
  const int64_t D = p.row_length, G = fp8_groups(p.num_rows, p.num_experts), C = G * kFp8Block;
  struct Group {
    int64_t begin = 0, count = 0;
  };
  std::vector<Group> groups(static_cast<size_t>(G));
  for (int64_t e = 0; e < p.num_experts; ++e) {
    const int64_t begin = p.expert_offsets[e], end = p.expert_offsets[e + 1];
    auto g = static_cast<size_t>(fp8_first_group(begin, e));
    for (int64_t r = begin; r < end; r += kFp8Block) {
      groups[g++] = {r, std::min(kFp8Block, end - r)};
    }
  }
  const GemmKernels<float>& k = gemm_kernels<float>();
  const int64_t blocks = ceil_div(D, kFp8Columns);
  parallel_range(par, G * blocks, kFp8Block * kFp8Columns / 2.0, [&](int64_t first, int64_t last) {
    ScratchScope scratch;
    float* rows = scratch.take<float>(Scratch::kTokens, kFp8Block * kFp8Columns);
    float* columns = scratch.take<float>(Scratch::kTile, kFp8Columns * kLine);
    for (int64_t i = first; i < last; ++i) {
      const int64_t g = i / blocks, d = i % blocks * kFp8Columns,
                    width = std::min(kFp8Columns, D - d);
      const auto [begin, count] = groups[static_cast<size_t>(g)];
      for (int64_t r = 0; r < count; ++r) {
        int64_t source = begin + r;
        float factor = 1.0f;
        if (p.row_to_slot != nullptr) {
          const int64_t slot = p.row_to_slot[begin + r];
          source = slot / p.top_k;
          if (p.topk_weights != nullptr) factor = p.topk_weights[slot];
        }
        const char* x =
            static_cast<const char*>(p.x.data) + (source * p.x.stride + d) * dtype_size(p.x.type);
        row_kernels<float>().load_row(p.x.type, x, rows + r * kFp8Columns, width, factor);
        std::fill(rows + r * kFp8Columns + width, rows + (r + 1) * kFp8Columns, 0.0f);
      }
      const int64_t padded = round_up<int64_t>(count, k.lanes);
      std::fill(rows + count * kFp8Columns, rows + padded * kFp8Columns, 0.0f);
      k.transpose(rows, kFp8Columns, padded, width, columns, kLine);
      for (int64_t c = 0; c < width; ++c) {
        uint8_t* q = p.q + (d + c) * C + g * kFp8Block;
        p.scale[g * D + d + c] = fp8_kernels().quantize(columns + c * kLine, count, q);
        std::memset(q + count, 0, static_cast<size_t>(kFp8Block - count));
      }
    }
  });
}

}  // namespace moe_ops::cpu
