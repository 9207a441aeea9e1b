// 32 x 32 sums a warp, and as many corrections, as in grouped_gemm/generic_fp32.cu.
#include "cuda/moe_ffn_quantized/tile_kernel.cuh"

namespace moe_ops::cuda::quantized {

Status tiles_fp32(const QuantStage& s, Stream stream) {
  using Config = TileConfig<float, 64, 64, 32, 2, 2, 3, true, true, true>;
  return s.w.format.bits == 8 ? launch_tiles<Config, 8, 0, 2>(s, stream)
                              : launch_tiles<Config, 4, 0, 2>(s, stream);
}

}  // namespace moe_ops::cuda::quantized
