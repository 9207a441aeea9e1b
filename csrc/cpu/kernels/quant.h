// Products with weights of few bits (QuantFormat in moe_ops/grouped_gemm.h). For two formats of 8
// and 4 bits: few rows are dot products of integers along k; for more rows weights are repacked
// into panels, which tiles unpack to fp32, or multiply as they are with activations of 16 or 8
// bits. All others are decoded to fp32: for few rows in registers, for more in cache. NOTES.md has
// the arithmetic.
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

// out[t*ldo + f*out_step + i] as GEMV's (gemm.h), of quantized activations; strides of weights and
// activations are in bytes, those of scales in floats.
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
  // w4a8: scales of groups of `group` weights.
  int64_t group = 0;
  const float* scale = nullptr;
  int64_t scale_step = 0, ld_scale = 0;
  // w8a16: every 64 steps of k one line of each of `prefetch_rows` rows, prefetch_ld bytes apart;
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

// Steps [k0, k0 + n) of a row as float32.
struct DequantParams {
  CodeRows rows;
  int64_t row, k0, n;
  float* scratch;  // decoded_scratch(k)
  float* dst;
};

// out[t*ldo + f*out_step + i] as GEMV's (gemm.h), of weight rows `first` + f*step + i and of tokens
// as arrange_token leaves them, ldx floats apart.
struct DecodedDotParams {
  CodeRows rows;
  int64_t first, step;
  int features;
  int64_t count;
  int tokens;
  const float* x;
  int64_t ldx;
  float* scratch;  // features * decoded_scratch(k)
  float* out;
  int64_t ldo, out_step;
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
  // w4a8, with a scale for each kQuantBlock activations; x is readable and zero up to a multiple of
  // that. features <= kGemvFeatures. It beats the tiles up to w4_max_rows rows.
  int64_t (*w4_row_bytes)(int64_t k);
  void (*w4_quantize)(int64_t k, const float* x, void* row);
  void (*w4_dot)(const QuantDotParams& p);
  int w4_max_rows;

  void (*repack)(const RepackParams& p, uint32_t* dst);
  // n <= 2 * kKc activations as integers of 16 bits, two in an element of dst, in the order in
  // which int16_tile unpacks words; their scale goes to dst[kKc]. x is readable and zero up to a
  // multiple of 16. Null where int16_tile is.
  void (*quantize_int16)(int64_t n, const float* x, float* dst);
  // n <= kInt8Depth activations as integers from -127 to 127, four in an element of dst; what
  // belongs to each kQuantBlock of them goes to dst[kInt8Depth / 4] and on. x is readable and zero
  // up to a multiple of kQuantBlock. Null where int8_tile is.
  void (*quantize_int8)(int bits, int64_t n, const float* x, float* dst);
  // Words in two's complement, fp32 activations. Index: [bits == 4][m - 1].
  QuantTile tile[2][kMaxMr];
  // Words of 8 bits in two's complement; an element of a is two activations.
  QuantTile int16_tile[kMaxMr];
  int int16_rows;  // of the largest
  // Words of q plus 8 or 128. Index: [bits == 4][m - 1]; null where the target has no such
  // products.
  QuantTile int8_tile[2][kMaxMr];
  int int8_rows;

  // All formats, decoded to float32; tokens are not rounded.
  void (*dequantize)(const DequantParams& p);
  // Floats of a token of k features as decoded_dot reads it, and such a row of the token x, which
  // is readable and zero up to a multiple of 256.
  int64_t (*arranged_floats)(int64_t k);
  void (*arrange_token)(const CodeRows& rows, const float* x, float* row);
  void (*decoded_dot)(const DecodedDotParams& p);
};

const QuantKernels& quant_kernels();

}  // namespace moe_ops::cpu
