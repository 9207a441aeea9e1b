#include "cuda/moe_ffn_quantized/few_kernel.cuh"

namespace moe_ops::cuda::quantized {

Status few_bf16(const QuantStage& s, Stream stream) { return run_few<bf16>(s, stream); }

}  // namespace moe_ops::cuda::quantized
