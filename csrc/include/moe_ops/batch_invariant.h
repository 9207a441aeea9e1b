// Batch-invariant mode: if it is on, a token's output must not depend bitwise on the other tokens
// of a call, neither on their number nor on their routing. docs/numerics.md states the guarantee
// and its cost.
//
// The mode is a process-wide setting that kernels of both backends follow. A GEMM reads it once,
// when it is described (GemmProblem on the CPU, GemmDesc on CUDA), so a change during a GEMM does
// not affect that GEMM.
#pragma once

namespace moe_ops {

// Returns whether the mode is on. It is off unless the environment variable MOE_OPS_BATCH_INVARIANT
// is 1 or set_batch_invariant was called.
bool batch_invariant();
void set_batch_invariant(bool on);

}  // namespace moe_ops
