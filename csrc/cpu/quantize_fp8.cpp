#include "moe_ops/quantize_fp8.h"

#include "cpu/gemm/plan.h"
#include "cpu/gemm/quantize_fp8_row.h"

namespace moe_ops::cpu {

void quantize_fp8(const QuantizeFp8Params& p, const Parallel& par) {
  const Kernels<float>& k = kernels<float>();
  const int64_t D = p.row_length, blocks = ceil_div(D, kFp8Block);
  parallel_range(par, p.num_rows, D / 4.0 + 2, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      quantize_fp8_row(k, p.x.type, row_of(p.x, r), D, p.q + r * D, p.scale + r * blocks);
    }
  });
}

}  // namespace moe_ops::cpu
