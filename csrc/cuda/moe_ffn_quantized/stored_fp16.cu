#include "cuda/moe_ffn_quantized/stored_kernel.cuh"

namespace moe_ops::cuda::quantized {

Status stored_fp16(const QuantStage& s, Stream stream) { return run_stored<fp16>(s, stream); }

}  // namespace moe_ops::cuda::quantized
