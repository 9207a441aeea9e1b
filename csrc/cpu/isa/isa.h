// Which instruction set the CPU kernels use: the best one that this machine has, or a lower one
// named by the environment variable MOE_OPS_CPU_ISA (portable, avx2, avx512, avx512_bf16, amx).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#if defined(_WIN32)
#define MOE_OPS_API __declspec(dllexport)
#else
#define MOE_OPS_API __attribute__((visibility("default")))
#endif

namespace moe_ops::cpu {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

MOE_OPS_API const char* isa_name(Isa isa);
// The highest level that both this machine and this build have.
MOE_OPS_API Isa detected_isa();
// detected_isa(), lowered by MOE_OPS_CPU_ISA if that is set, and to a level that passes its
// self-test. Decided once.
MOE_OPS_API Isa active_isa();
// Names of all levels up to the detected one.
MOE_OPS_API std::vector<std::string> supported_isas();
// Empty, or a sentence about a value of MOE_OPS_CPU_ISA that could not be followed or a level that
// failed its self-test.
MOE_OPS_API std::string isa_warning();
// What the processor decides beside the level, measured on one of each kind; what was measured, and
// how much it gave, is said in isa/isa.cpp.
struct Tuning {
  // Rows of an expert up to which products of bfloat16 pairs (vdpbf16ps) are no slower than fp32
  // ones.
  int64_t pairs_max_rows;
  // How far ahead of itself, in bytes, a stream of packed weights asks where the bank is not found
  // in an L3: from stream_ahead_bank bytes of it on.
  int64_t stream_ahead, stream_ahead_bank;
  bool avx2_streams_ahead;  // whether with AVX2 too
  // Whether what tiles ask for comes faster from its two halves in turns.
  bool fetch_halves;
  // Rows of an expert up to which several packed panels are read at once without asking, where the
  // level has the registers.
  int stream_rows;
  // Tokens of one item of packed weights: what leaves an L2 room for panels and sums.
  int64_t panel_rows;
  // How far ahead of itself, in bytes, a stream of rows that several passes of tokens read asks.
  int64_t dot_ahead;
  // Most rows of an expert that are no slower in passes of two tokens over weights as they lie.
  int dot_rows_by_two;
  // Most rows of an expert that strips of weights take, and most steps of k of a strip that all of
  // them meet before the next ones.
  int64_t strip_max_rows, strip_block;
  // Fewest steps of k from which one pass of strips beats two of dot where weights are not widened.
  int64_t strip_one_pass_depth;
  // Whether tiles beat a second pass of tokens over weights dense along features.
  bool rank_one_pass;
};
const Tuning& tuning();
// nullptr, or the kernel of this level that does not compute what the portable one does.
MOE_OPS_API const char* failing_kernel(Isa isa);

}  // namespace moe_ops::cpu
