#include "cuda/moe_ffn/sm90_up.cuh"

namespace moe_ops::cuda::sm90 {

template Status run_up<DType::kBFloat16, GateUp::kHalves, FfnTile::kLow>(const FfnUpParams&,
                                                                         Stream);
template Status run_up<DType::kBFloat16, GateUp::kHalves, FfnTile::kHigh>(const FfnUpParams&,
                                                                          Stream);
template Status run_up<DType::kBFloat16, GateUp::kHalves, FfnTile::kPair>(const FfnUpParams&,
                                                                          Stream);
template Status run_up<DType::kBFloat16, GateUp::kJoint, FfnTile::kLow>(const FfnUpParams&, Stream);
template Status run_up<DType::kBFloat16, GateUp::kJoint, FfnTile::kHigh>(const FfnUpParams&,
                                                                         Stream);
template Status run_up<DType::kBFloat16, GateUp::kJoint, FfnTile::kPair>(const FfnUpParams&,
                                                                         Stream);

}  // namespace moe_ops::cuda::sm90
