// Products with weights of few bits (QuantFormat in moe_ops/grouped_gemm.h). For weights of 4 bits
// and int8: few rows are dot products of integers along k; for more rows weights are repacked into
// panels, which tiles unpack to fp32, or multiply as they are with activations of 16 or 8 bits. All
// others are decoded to fp32 or bfloat16: for few rows in registers, for more in cache. NOTES.md
// has the arithmetic.
#pragma once

#include "cpu/kernels/gemm.h"

namespace moe_ops::cpu {

constexpr int64_t kQuantBlock = 32;  // activations of 8 bits that share a scale
// Most k in a row of int8 activations: four to a float, and two floats more for each kQuantBlock.
constexpr int64_t kInt8Depth = 512;
static_assert(kInt8Depth % 128 == 0);
static_assert(kInt8Depth / 4 + 2 * kInt8Depth / kQuantBlock <= kLda);
// Type to which the activations of many rows are converted for the GEMM.
enum class Activations : int { kFloat, kInt16, kInt8 };

// out[t*ldo + f*out_step + i] as GEMV's (gemm.h), of activations of 16 bits; strides of weights and
// activations are in bytes.
struct QuantDotParams {
  int features;
  int64_t count;
  int tokens;
  int64_t k;
  const void* w;
  int64_t w_step, ldw;
  const void* x;
  int64_t x_bytes;
  float* out;
  int64_t ldo, out_step;
  // Every 64 steps of k one line of each of `prefetch_rows` rows, prefetch_ld bytes apart;
  // `prefetch` moves on as w does.
  const void* prefetch = nullptr;
  int64_t prefetch_ld = 0;
  int prefetch_rows = 0;
};

// Weights k0 to k0 + n of `features` rows, ldw bytes apart, as a panel of 32-bit words,
// [words][2*lanes]: word i has weights 32 / bits * i and on of a feature, the upper bit of each
// flipped or not. k0 is a multiple of 32. dst has room for whole runs of 32 bytes of a row; words
// past n are zero or not written, columns past the last feature are anything.
struct RepackParams {
  int bits;
  bool flip;
  const void* w;
  int64_t ldw, features, k0, n;
};

// A tile over `runs` times `count` words of a panel; each run has one scale a column, 2*lanes
// apart.
struct QuantTileParams {
  int64_t runs, count;
  const float* a;        // rows kLda apart
  const float* a_scale;  // int16: of row i at i * kLda; int8: what quantize_int8 wrote behind a row
  const uint32_t* words;
  const float* scale;
  const float* offset;  // int8 of 4 bits: what a run adds to its weights, as scales; or nullptr
  TileOut<float> out;
  const char* prefetch;
  // fp32, int16: bytes between the runs * count * 2*lanes / 16 lines. int8: lines for each
  // kQuantBlock of k, up to bits * 2*lanes / 16.
  int64_t prefetch_step;
};
using QuantTile = void (*)(const QuantTileParams& p);

// The weights of an expert as they are stored (QuantFormat); strides are in bytes.
struct CodeRows {
  Codes codes;
  int64_t k;  // codes of a row
  ScaleType scale_type;
  int64_t group;  // steps that share a scale, where `codes` does not say how many
  const void* w;
  int64_t ldw;
  const void* scale;
  int64_t ld_scale, scale_rows;  // rows of weights that share a row of scales
  const uint8_t* zero;           // or nullptr: 8
  int64_t ld_zero;
};

// Floats of scratch in which a kernel keeps the scales of a row of codes.
constexpr int64_t decoded_scratch(int64_t k) { return 2 * (k / 16 + 32); }

// Floats of the scales of four rows in the order of w4_dot, and of the scratch of a dot.
constexpr int64_t w4_unit_floats(int64_t k) { return k / 4 + 64; }
constexpr int64_t codes_scratch(int64_t k) {
  return kGemvFeatures * decoded_scratch(k) + 2 * w4_unit_floats(k);
}

constexpr int64_t e4m3_row_floats(int64_t k) { return (k + 127) / 128 * 64; }

// Steps [k0, k0 + n) of a row as float32.
struct DequantParams {
  CodeRows rows;
  int64_t row, k0, n;
  float* scratch;  // decoded_scratch(k)
  float* dst;
};

// out[t*ldo + f*out_step + i] as GEMV's (gemm.h), of weight rows `first` + f*step + i and of tokens
// as arrange_token or w4_quantize leaves them.
struct CodesDotParams {
  CodeRows rows;
  int64_t first, step;
  int features;
  int64_t count;
  int tokens;
  const void* x;
  int64_t x_bytes;  // between tokens
  float* scratch;   // codes_scratch(k)
  float* out;
  int64_t ldo, out_step;
  const float* const* x_scale = nullptr;  // e4m3_dot of blocks: of each token, one a block, or none
};

struct QuantKernels {
  // w8a16. Bytes of a row of k activations of 16 bits, in an order of the target's own, and x as
  // such a row; x is readable and zero up to a multiple of 64. features: 1 or w8_features.
  int64_t (*w8_row_bytes)(int64_t k);
  void (*w8_quantize)(int64_t k, const float* x, void* row);
  void (*w8_dot)(const QuantDotParams& p);
  int w8_features;
  // It beats the tiles up to k / w8_min_depth_per_row rows, but no more than w8_max_rows.
  int w8_min_depth_per_row, w8_max_rows;
  // w4a8, with a scale for each kQuantBlock activations, of the codes int4, mxfp4 and nvfp4; x is
  // readable and zero up to a multiple of kQuantBlock. features <= kGemvFeatures. It beats the
  // tiles up to w4_max_rows rows.
  int64_t (*w4_row_bytes)(int64_t k);
  void (*w4_quantize)(Codes codes, int64_t k, const float* x, void* row);
  void (*w4_dot)(const CodesDotParams& p);
  // w8a16 of int8 with a scale per group; tokens as w8_quantize writes them.
  void (*w8_grouped_dot)(const CodesDotParams& p);
  int w4_max_rows;
  // The scales and offsets of a row of int4, mxfp4 or int8 for each kQuantBlock steps; with zero
  // points, else offsets are left alone. Both have room for a vector more; scratch:
  // decoded_scratch(k).
  void (*w4_scales)(const CodeRows& rows, int64_t row, float* scratch, float* scales,
                    float* offsets);

  void (*repack)(const RepackParams& p, uint32_t* dst);
  // n <= 2 * kKc activations as integers of 16 bits, two in an element of dst, in the order in
  // which int16_tile unpacks words; their scale goes to dst[kKc]. x is readable and zero up to a
  // multiple of 16. Null where int16_tile is.
  void (*quantize_int16)(int64_t n, const float* x, float* dst);
  // n <= kInt8Depth activations as integers from -127 to 127, four in an element of dst; what
  // belongs to each kQuantBlock of them goes to dst[kInt8Depth / 4] and on. x is readable and zero
  // up to a multiple of kQuantBlock; with `rest` it becomes what the integers leave. Null where
  // int8_tile is.
  void (*quantize_int8)(Codes codes, int64_t n, float* x, float* dst, bool rest);
  // Words in two's complement, fp32 activations. Index: [bits == 4][m - 1]; of 4 bits null where
  // int8_tile is not.
  QuantTile tile[2][kMaxMr];
  // Words of 8 bits in two's complement; an element of a is two activations.
  QuantTile int16_tile[kMaxMr];
  int int16_rows;  // of the largest
  // Words of q plus 8 or 128, or of e2m1. Index: [int8, int4, mxfp4][m - 1]; null where the target
  // has no such products.
  QuantTile int8_tile[3][kMaxMr];
  int int8_rows;

  // All formats, decoded to float32; tokens are not rounded.
  void (*dequantize)(const DequantParams& p);
  // Floats of a token of k features as decoded_dot reads it, and such a row of the token x, which
  // is readable and zero up to a multiple of 256.
  int64_t (*arranged_floats)(int64_t k);
  void (*arrange_token)(const CodeRows& rows, const float* x, float* row);
  void (*decoded_dot)(const CodesDotParams& p);
  // Products in bfloat16 with e4m3 codes that have a float32 scale per row or are of the format
  // "fp8": a token x, which is readable and zero up to a multiple of 256, as a row of
  // e4m3_row_floats(k), and the dot. Null without bf16 dot products.
  void (*e4m3_arrange)(int64_t k, const float* x, float* row);
  void (*e4m3_dot)(const CodesDotParams& p);
};

const QuantKernels& quant_kernels();

}  // namespace moe_ops::cpu
