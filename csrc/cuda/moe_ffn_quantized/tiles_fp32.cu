// 32 x 16 sums a warp, and as many corrections: half as many as in grouped_gemm/generic_fp32.cu, as
// the codes on their way take registers too.
#include "cuda/moe_ffn_quantized/tile_kernel.cuh"

namespace moe_ops::cuda::quantized {

Status tiles_fp32(const QuantStage& s, Stream stream) {
  using Config = TileConfig<float, 64, 64, 32, 2, 4, 3, true, true, true>;
  return s.w.format.bits == 8 ? launch_tiles<Config, 8, 0, 1>(s, stream)
                              : launch_tiles<Config, 4, 0, 1>(s, stream);
}

}  // namespace moe_ops::cuda::quantized
