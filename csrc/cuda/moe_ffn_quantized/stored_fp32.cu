#include "cuda/moe_ffn_quantized/stored_kernel.cuh"

namespace moe_ops::cuda::quantized {

Status stored_fp32(const QuantStage& s, Stream stream) { return run_stored<float>(s, stream); }

}  // namespace moe_ops::cuda::quantized
