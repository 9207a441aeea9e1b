// moe_ffn of small experts, a block of tokens at a time.
#pragma once

#include "moe_ops/moe_ffn.h"

namespace moe_ops::cpu {

// Whether the functions below take a call, and are faster. By sizes, types and what
// operands there are; never by routing, unless maps of a backward are not those of a sort.
bool takes_blocks(const MoeFfnParams& p);
bool takes_blocks(const MoeFfnBwdParams& p);

void moe_ffn_blocks(const MoeFfnParams& p, const Parallel& par);
void moe_ffn_blocks_bwd(const MoeFfnBwdParams& p, const Parallel& par);

}  // namespace moe_ops::cpu
