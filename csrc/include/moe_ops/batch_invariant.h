// Whether the bits of a token's output must not depend on the other tokens of a call: neither on
// their number, nor on how they are routed. docs/numerics.md says what is promised, and what it
// costs.
//
// It is one setting of the process, which kernels of both backends follow. A product reads it once,
// when it is described (GemmProblem of the CPU, GemmDesc of CUDA), so that a change while it runs
// cannot split it.
#pragma once

namespace moe_ops {

// Off, unless the environment variable MOE_OPS_BATCH_INVARIANT is 1, or set_batch_invariant was
// called.
bool batch_invariant();
void set_batch_invariant(bool on);

}  // namespace moe_ops
