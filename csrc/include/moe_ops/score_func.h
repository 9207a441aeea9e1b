// The scores that routers give to experts.
#pragma once

#include <cstdint>

namespace moe_ops {

// A new one: its name here, its value and slope in cpu/kernels/router_score-inl.h and
// cuda/router_score.cuh. All are increasing functions of the logit.
enum class ScoreFunc : int { kSoftmax, kSigmoid, kSqrtSoftplus };

// In the order of the enum.
constexpr const char* kScoreFuncNames[] = {"softmax", "sigmoid", "sqrtsoftplus"};
constexpr int kScoreFuncs = sizeof(kScoreFuncNames) / sizeof(kScoreFuncNames[0]);

// Returns whether the score is a softmax, which is over all experts. Every other score is a
// function of one logit, so kernels treat them alike, and only the selected experts get a gradient.
constexpr bool is_softmax(ScoreFunc f) { return f == ScoreFunc::kSoftmax; }

}  // namespace moe_ops
