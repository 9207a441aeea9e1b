// Which kernel a stage runs on.
#include <cstdlib>

#include "cuda/check.h"
#include "cuda/grouped_gemm/sm90_operands.h"
#include "cuda/moe_ffn/choose.h"
#include "cuda/moe_ffn/sm90_stages.h"
#include "cuda/moe_ffn/stages.h"
#include "cuda/runtime.h"
#include "moe_ops/batch_invariant.h"

namespace moe_ops::cuda {

namespace {

// Returns MOE_OPS_FFN_TILE: low, high or pair selects that tile if the stage has it, composed
// disables these kernels. For tests and benchmarks.
std::string_view forced_tile() {
  const char* s = std::getenv("MOE_OPS_FFN_TILE");
  return s != nullptr ? s : "";
}

template <size_t n>
FfnTile tile_of(const GemmDesc& d, const std::array<GemmConfig, n>& configs) {
  for (size_t i = 0; i < n; ++i)
    if (kFfnTileNames[i] == forced_tile()) return static_cast<FfnTile>(i);
  return choose_ffn_tile(d, configs);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Returns whether sizes and gathered rows meet the requirements of all stages: rows of 16-byte
// pieces, counted in 32 bits with room for a tile past the last one.
template <class Params>
bool usable(const Params& p, const DeviceRows& rows) {
  constexpr int64_t kMost = INT32_MAX - 1024;
  const DType type = p.w.type;
  return device_info().capability == 90 && forced_tile() != "composed" &&
         (type == DType::kBFloat16 || type == DType::kFloat16) && rows.type == type &&
         aligned(rows.data) && rows.stride % 8 == 0 && p.w.quant.bits == 0 && p.hidden_size >= 8 &&
         p.intermediate_size >= 8 && p.hidden_size % 8 == 0 && p.intermediate_size % 8 == 0 &&
         p.num_experts >= 1 && p.num_rows >= 1 && rows.limit >= 1 && p.num_experts <= kMost &&
         p.num_rows <= kMost && rows.limit <= kMost && p.hidden_size <= kMost &&
         2 * p.intermediate_size <= kMost && tensor_map_possible(sm90::ffn_weights(p));
}

template <DType type>
Status run_few(const sm90::FewProduct& f, int64_t num_tokens, Stream stream) {
  return num_tokens <= 32 ? sm90::run_few<type, 32>(f, stream) : sm90::run_few<type, 64>(f, stream);
}

Status run_few(const sm90::FewProduct& f, int64_t num_tokens, Stream stream) {
  return f.rows.type == DType::kBFloat16 ? run_few<DType::kBFloat16>(f, num_tokens, stream)
                                         : run_few<DType::kFloat16>(f, num_tokens, stream);
}

template <class Params>
GemmDesc gemm_desc(const Params& p, Product product, int64_t n) {
  GemmDesc d;
  d.product = product;
  d.rows = p.num_rows;
  d.num_experts = p.num_experts;
  d.n = n;
  d.k = p.hidden_size;
  d.num_sms = usable_sms();
  d.invariant = batch_invariant();
  return d;
}

// Returns whether a call with so many tokens may use the kernels for few tokens; batch-invariant
// mode excludes them.
bool takes_few(int64_t num_tokens) {
  return num_tokens <= kFfnFewTokens && forced_tile() == "" && !batch_invariant();
}

// Returns whether a call has few tokens; for inference only, as training needs the pre-activation.
bool few_tokens(const FfnUpParams& p) {
  return takes_few(p.x.limit) && p.preact == nullptr &&
         tensor_map_possible(sm90::few_product(p).block[0]);
}

template <DType type, sm90::GateUp layout>
Status select_up(FfnTile tile, const FfnUpParams& p, Stream stream) {
  switch (tile) {
    case FfnTile::kLow:
      return sm90::run_up<type, layout, FfnTile::kLow>(p, stream);
    case FfnTile::kHigh:
      return sm90::run_up<type, layout, FfnTile::kHigh>(p, stream);
    default:
      return sm90::run_up<type, layout, FfnTile::kPair>(p, stream);
  }
}

template <DType type>
Status select_up(FfnTile tile, const FfnUpParams& p, Stream stream) {
  return is_gated(p.act.kind) && !p.act.interleaved
             ? select_up<type, sm90::GateUp::kHalves>(tile, p, stream)
             : select_up<type, sm90::GateUp::kJoint>(tile, p, stream);
}

template <DType type>
Status select_down_bwd(FfnTile tile, const FfnDownBwdParams& p, Stream stream) {
  return tile == FfnTile::kLow ? sm90::run_down_bwd<type, FfnTile::kLow>(p, stream)
                               : sm90::run_down_bwd<type, FfnTile::kHigh>(p, stream);
}

}  // namespace

sm90::FewProduct sm90::few_product(const FfnUpParams& p) {
  FewProduct f;
  f.expert_offsets = p.expert_offsets;
  f.num_experts = p.num_experts;
  f.num_rows = p.num_rows;
  f.out_features = p.intermediate_size;
  f.in_features = p.hidden_size;
  f.gated = is_gated(p.act.kind);
  f.activate = true;
  f.act = p.act;
  f.rows = p.x;
  f.scale = p.x_scale;
  f.sort = p.sort;
  f.bias = p.bias;
  f.out = p.h;
  f.along_k = dense_along_k(p.w);
  f.block[0] = f.block[1] = ffn_weights(p);
  if (f.gated && !p.act.interleaved) {
    // Halves of the features, so that a tile past the last one reads zeros and not the other half.
    f.block[0].size[f.along_k ? 1 : 0] = p.intermediate_size;
    f.block[1] = f.block[0];
    f.block[1].data = static_cast<const char*>(p.w.data) +
                      p.intermediate_size * p.w.stride_o * dtype_size(p.w.type);
  }
  return f;
}

sm90::FewProduct sm90::few_product(const FfnDownParams& p) {
  FewProduct f;
  f.expert_offsets = p.expert_offsets;
  f.num_experts = p.num_experts;
  f.num_rows = p.num_rows;
  f.out_features = p.hidden_size;
  f.in_features = p.intermediate_size;
  f.rows = p.h;
  f.bias = p.bias;
  f.out = p.out;
  f.along_k = dense_along_k(p.w);
  f.block[0] = f.block[1] = ffn_weights(p);
  return f;
}

bool supports(const FfnUpParams& p) {
  return usable(p, p.x) && p.x.index != nullptr &&
         (p.bias.data == nullptr || p.bias.type == p.w.type) && aligned(p.h) && aligned(p.preact);
}

bool sorts_few(const FfnUpParams& p) {
  return few_tokens(p) && p.x_scale.data == nullptr && p.num_rows <= kFewSortByExpert &&
         p.num_experts <= kFewSortExperts;
}

Status ffn_up(const FfnUpParams& p, Stream stream) {
  if (few_tokens(p)) return run_few(sm90::few_product(p), p.x.limit, stream);
  const int64_t width = p.intermediate_size * (is_gated(p.act.kind) ? 2 : 1);
  const FfnTile tile = tile_of(gemm_desc(p, Product::kGatherNT, width), kFfnUpConfigs);
  return p.w.type == DType::kBFloat16 ? select_up<DType::kBFloat16>(tile, p, stream)
                                      : select_up<DType::kFloat16>(tile, p, stream);
}

bool supports(const FfnDownParams& p) {
  return takes_few(p.num_tokens) && usable(p, p.h) &&
         (p.bias.data == nullptr || p.bias.type == p.w.type) && aligned(p.out);
}

Status ffn_down(const FfnDownParams& p, Stream stream) {
  return run_few(sm90::few_product(p), p.num_tokens, stream);
}

bool supports(const FfnDownBwdParams& p) {
  return usable(p, p.grad_y) && p.grad_y.index != nullptr && aligned(p.preact) && aligned(p.dpre) &&
         aligned(p.dpre_weighted) && aligned(p.h);
}

Status ffn_down_bwd(const FfnDownBwdParams& p, Stream stream) {
  const GemmDesc d = gemm_desc(p, Product::kGatherNN, p.intermediate_size);
  const FfnTile tile = tile_of(d, kFfnDownBwdConfigs);
  return p.w.type == DType::kBFloat16 ? select_down_bwd<DType::kBFloat16>(tile, p, stream)
                                      : select_down_bwd<DType::kFloat16>(tile, p, stream);
}

}  // namespace moe_ops::cuda
