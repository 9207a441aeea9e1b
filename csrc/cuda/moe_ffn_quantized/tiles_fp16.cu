#include "cuda/moe_ffn_quantized/tile_kernel.cuh"

namespace moe_ops::cuda::quantized {

Status tiles_fp16(const QuantStage& s, Stream stream) { return run_half_tiles<fp16>(s, stream); }

}  // namespace moe_ops::cuda::quantized
