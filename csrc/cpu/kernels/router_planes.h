// Rows of a token each to the planes of RouterLanes, and back.
#pragma once

#include <algorithm>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/router_row.h"

namespace moe_ops::cpu {

template <int64_t kWidth, class From, class To>
void to_planes_of(const From* rows, int64_t stride, int64_t tokens, int64_t width, To* planes) {
  const int64_t n = kWidth > 0 ? kWidth : width;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < n; ++i) {
      planes[i * kLaneTokens + t] = static_cast<To>(rows[t * stride + i]);
    }
  }
}

// Lanes after the last token, up to the end of their vector, become `rest`.
template <class From, class To>
void to_planes(const From* rows, int64_t stride, int64_t tokens, int64_t width, To* planes,
               To rest) {
  const int64_t end = round_up(tokens, kRowUnit);
  for (int64_t i = 0; tokens < end && i < width; ++i) {
    std::fill(planes + i * kLaneTokens + tokens, planes + i * kLaneTokens + end, rest);
  }
  // Loops of a known length have no branch in them.
  if (width == 2) return to_planes_of<2>(rows, stride, tokens, width, planes);
  if (width == 4) return to_planes_of<4>(rows, stride, tokens, width, planes);
  to_planes_of<0>(rows, stride, tokens, width, planes);
}

template <int64_t kWidth, class From, class To>
void from_planes_of(const From* planes, int64_t tokens, int64_t width, To* rows) {
  const int64_t n = kWidth > 0 ? kWidth : width;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < n; ++i) rows[t * n + i] = static_cast<To>(planes[i * kLaneTokens + t]);
  }
}

template <class From, class To>
void from_planes(const From* planes, int64_t tokens, int64_t width, To* rows) {
  if (width == 2) return from_planes_of<2>(planes, tokens, width, rows);
  if (width == 4) return from_planes_of<4>(planes, tokens, width, rows);
  from_planes_of<0>(planes, tokens, width, rows);
}

// What the router's parameters, forward or backward, say of them; planes are to come.
template <class T, class Params>
RouterLanes<T> lanes_of(const Params& p) {
  RouterLanes<T> lanes = {};
  lanes.experts = p.num_experts;
  lanes.top_k = p.top_k;
  lanes.softmax = p.score_func == ScoreFunc::kSoftmax;
  lanes.topk_first = p.topk_first;
  lanes.renormalize = p.renormalize;
  lanes.scale = static_cast<T>(p.routed_scaling_factor);
  return lanes;
}

// Logits of tokens t and on; `rows`: scratch, [tokens, experts].
template <class T>
void logits_to_planes(const Kernels<T>& kernel, DType type, const void* logits, int64_t stride,
                      int64_t t, int64_t tokens, int64_t experts, T* rows, T* planes) {
  const char* const from = static_cast<const char*>(logits) + t * stride * dtype_size(type);
  if (type == kAccumulate<T>) {
    return to_planes(reinterpret_cast<const T*>(from), stride, tokens, experts, planes, T(0));
  }
  if (stride == experts) {
    kernel.load_row(type, from, rows, tokens * experts, T(1));
  } else {
    kernel.load_rows(type, from, stride, tokens, experts, rows, experts, T(1));
  }
  to_planes(rows, experts, tokens, experts, planes, T(0));
}

}  // namespace moe_ops::cpu
