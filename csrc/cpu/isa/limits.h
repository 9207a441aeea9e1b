// Peak rates of one core of this machine, with which moe_ops.bench compares kernels.
#pragma once

#include <cstddef>
#include <vector>

#include "cpu/isa/isa.h"

namespace moe_ops::cpu {

// One rate a pass, measured on the calling thread. Other load only lowers a rate, so the largest
// pass is the limit of a core that works alone.
struct Limits {
  std::vector<double> fp32_flops;  // multiply-adds in registers, two operations each
  std::vector<double> bf16_flops;  // the same with bfloat16 pairs, where the target multiplies them
  std::vector<double> read_bytes;  // sequential reads of a buffer in four streams
};

// Measures the rates of the target `isa`, which this machine must support. `bytes`: size of the
// buffer, which is read repeatedly; several times the last-level cache for the rate of memory.
// `seconds`: time for each of the three.
Limits measure_limits(Isa isa, size_t bytes, double seconds);

}  // namespace moe_ops::cpu
