// A stage of moe_ffn_quantized: a product with quantized weights, and what follows each sum.
//
//   v[r, f] = factor(r) * <w[e(r), f], a[r]> + bias[e(r), f]
//
// out[r] holds v, or with a gate act(v[gate f], v[up f]), or act(v). int8 with a scale per line and
// int4 in groups of 32, 64 or 128 with float32 scales have a kernel for few tokens and one for
// many; other formats have one for few rows per expert, which is right for any number of them.
// Nothing is rounded but out: codes are exact in a's type (in two tf32 terms for float32), products
// are summed in fp32 and scales multiply these sums; with float32 and 4 bits in tiles, weights of
// code times scale, rounded once to float32.
#pragma once

#include "moe_ops/moe_ffn_quantized.h"

namespace moe_ops::cuda {

struct QuantStage {
  const int32_t* expert_offsets = nullptr;  // [E+1]
  int64_t num_experts = 0;                  // E
  int64_t num_rows = 0;                     // N
  int64_t num_tokens = 0;                   // T
  int64_t depth = 0;                        // D
  // Features of out; w has twice as many with a gate.
  int64_t features = 0;
  DeviceRows a;     // [N, D]; rows start on 16 bytes, with zeros up to a multiple of 16 elements
  RowScale factor;  // [N] fp32
  QuantizedMatrices w;
  ExpertVectors bias;
  bool gated = false, activate = false;
  ActivationParams act;
  // [N, features] rows out_stride elements apart, out; zeros from `features` up to the stride,
  // which is less than 16 further.
  void* out = nullptr;
  int64_t out_stride = 0;
  bool zero_tail = false;  // rows from expert_offsets[E] on become zero; otherwise they stay
};

// Up to so many tokens, or rows an expert on the average, weights are read straight into registers
// (few_kernel.cuh).
constexpr int64_t kQuantFewTokens = 64, kQuantFewRows = 16;

namespace quantized {

// Returns the stride, in elements, of rows that kernels read 16 at a time.
inline int64_t padded(int64_t size) { return round_up<int64_t>(size, 16); }

// Returns whether rows x [rows, size] must be copied for the kernels: because factors multiply
// them, or as they do not start on 16 bytes with whole 16 elements.
bool needs_copy(const Rows& x, int64_t size, const float* factors);

// Copies rows, times factors [size] unless nullptr, to rows padded(size) elements apart, with zeros
// between them.
Status copy_rows(const Rows& x, const float* factors, int64_t num_rows, int64_t size, void* out,
                 Stream stream);

// Computes a stage by the kernel that suits it.
Status run_stage(const QuantStage& s, Stream stream);

Status few_bf16(const QuantStage& s, Stream stream);
Status few_fp16(const QuantStage& s, Stream stream);
Status few_fp32(const QuantStage& s, Stream stream);
Status stored_bf16(const QuantStage& s, Stream stream);
Status stored_fp16(const QuantStage& s, Stream stream);
Status stored_fp32(const QuantStage& s, Stream stream);
Status tiles_bf16(const QuantStage& s, Stream stream);
Status tiles_fp16(const QuantStage& s, Stream stream);
Status tiles_fp32(const QuantStage& s, Stream stream);
}  // namespace quantized

}  // namespace moe_ops::cuda
