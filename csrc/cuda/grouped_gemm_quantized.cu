// One stage of moe_ffn_quantized, without an activation.
#include "cuda/check.h"
#include "cuda/moe_ffn_quantized/stage.h"
#include "moe_ops/grouped_gemm_quantized.h"

namespace moe_ops::cuda {

int64_t grouped_gemm_quantized_workspace(const GroupedGemmQuantizedParams& p) {
  if (!quantized::needs_copy(p.a, p.in_features, nullptr)) return 0;
  return p.num_rows * quantized::padded(p.in_features) * dtype_size(p.a.type);
}

Status grouped_gemm_quantized(const GroupedGemmQuantizedParams& p, Stream stream) {
  DeviceRows rows{p.a.data, p.a.type, p.a.stride, nullptr, 1, p.num_rows};
  if (quantized::needs_copy(p.a, p.in_features, nullptr)) {
    MOE_TRY(quantized::copy_rows(p.a, nullptr, p.num_rows, p.in_features, p.workspace, stream));
    rows.data = p.workspace;
    rows.stride = quantized::padded(p.in_features);
  }
  QuantStage s;
  s.expert_offsets = p.expert_offsets;
  s.num_experts = p.num_experts;
  s.num_rows = s.num_tokens = p.num_rows;
  s.depth = p.in_features;
  s.features = p.out_features;
  s.a = rows;
  s.w = p.b;
  s.bias = p.bias;
  s.out = p.out;
  s.out_stride = p.out_features;
  s.zero_tail = true;
  return quantized::run_stage(s, stream);
}

}  // namespace moe_ops::cuda
