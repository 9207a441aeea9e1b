// Whether the bits of a token's output must not depend on the other tokens of a call: neither on
// their number, nor on how they are routed. docs/numerics.md says what is promised, and what it
// costs.
//
// It is one setting of the process. A product reads it once, when it is described (GemmDesc in
// gemm/plan.h), so that a change while it runs cannot split it.
#pragma once

#include "cpu/isa/isa.h"

namespace moe_ops::cpu {

// Off, unless the environment variable MOE_OPS_BATCH_INVARIANT is 1, or set_batch_invariant was
// called.
MOE_OPS_API bool batch_invariant();
MOE_OPS_API void set_batch_invariant(bool on);

}  // namespace moe_ops::cpu
