// moe_ffn of small experts, a block of tokens at a time.
#pragma once

#include "moe_ops/moe_ffn.h"

namespace moe_ops::cpu {

// Returns whether the functions below support a call and are faster. The decision depends on sizes,
// types and which operands are given, not on the routing, unless the maps of a backward do not come
// from a sort.
bool takes_blocks(const MoeFfnParams& p);
bool takes_blocks(const MoeFfnBwdParams& p);

void moe_ffn_blocks(const MoeFfnParams& p, const Parallel& par);
void moe_ffn_blocks_bwd(const MoeFfnBwdParams& p, const Parallel& par);

}  // namespace moe_ops::cpu
