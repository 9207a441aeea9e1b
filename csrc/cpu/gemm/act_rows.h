// One row of pre-activations through the activation, in the accumulate type, with either layout of
// gate and up. Shared by gated_act and moe_ffn.
#pragma once

#include <cstdint>

#include "moe_ops/activation.h"

namespace moe_ops::cpu {

// values [2n] with gate and up interleaved -> gate [n], up [n].
template <class T>
void deinterleave(const T* values, int64_t n, T* gate, T* up) {
  for (int64_t i = 0; i < n; ++i) {
    gate[i] = values[2 * i];
    up[i] = values[2 * i + 1];
  }
}

template <class T>
void interleave(const T* gate, const T* up, int64_t n, T* values) {
  for (int64_t i = 0; i < n; ++i) {
    values[2 * i] = gate[i];
    values[2 * i + 1] = up[i];
  }
}

// Splits a row [2n] (or [n] when not gated) into gate and up; `buffer` has room for 2n.
template <class T>
struct GateUp {
  T* gate;
  T* up;
};

template <class T>
GateUp<T> split_row(const ActivationParams& act, T* row, int64_t n, T* buffer) {
  if (!is_gated(act.kind)) return {row, row};
  if (!act.interleaved) return {row, row + n};
  deinterleave(row, n, buffer, buffer + n);
  return {buffer, buffer + n};
}

}  // namespace moe_ops::cpu
