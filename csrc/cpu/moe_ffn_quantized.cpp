// The loops are those of moe_ffn; gemm/quant.h has what differs in an item; quant_w8-inl.h,
// quant_w4-inl.h and quant_repack-inl.h in kernels/ the rest.
#include "moe_ops/moe_ffn_quantized.h"

namespace moe_ops::cpu {

void moe_ffn_quantized(const MoeFfnQuantizedParams& p, const Parallel& par) {
  MoeFfnParams f;
  f.desc = p.desc;
  f.x = p.x;
  f.x_scale = p.x_scale;
  f.w_gate_up = matrices_of(p.w_gate_up, p.x.type);
  f.w_down = matrices_of(p.w_down, p.x.type);
  f.b_gate_up = p.b_gate_up;
  f.b_down = p.b_down;
  f.y = p.y;
  f.y_type = p.x.type;
  f.preact = p.preact;
  moe_ffn(f, par);
}

}  // namespace moe_ops::cpu
