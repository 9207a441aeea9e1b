// The inner loops, once per instruction set. T is the accumulate type: float for float32, bfloat16
// and float16 operands, double for float64 ones.
#pragma once

#include <cstdint>

#include "moe_ops/activation.h"
#include "moe_ops/common.h"
#include "moe_ops/mix_experts.h"

namespace moe_ops::cpu {

// Length of one step over the summed dimension. A broadcast block of 14 x 192 floats (10 KiB) and a
// vector panel of 192 x 32 (24 KiB) fit an L1 together; the AVX2 tile needs half of that.
constexpr int64_t kKc = 192;
// Row pitch of a broadcast block stored one row a line ("row form"): the pad keeps the rows of a
// block out of the same L1 set, and being a constant it turns every row into an address offset.
constexpr int64_t kLda = kKc + 16;
// The same for weights packed ahead. Their panels are read from L2 by every tile, which a core's
// window hides, so a block need not fit an L1, and each begins and ends with a tile of sums.
constexpr int64_t kPanelDepth = 1024;
constexpr int64_t kPanelLda = kPanelDepth + 16;
// Row pitch of a broadcast block stored one summed index a line ("column form").
constexpr int64_t kLdm = 128;
// Largest number of tokens that the dot kernel takes at once.
constexpr int64_t kDotFeatures = 4;
// Weight rows that one pass over the sums takes in rank_update.
constexpr int kRankRows = 4;

constexpr int kMaxMr = 24;

// Rows for which several panels of packed weights are read at once.
constexpr int kMaxStreamRows = 5;

// Of an AMX core's 8 tiles, 6 hold sums; the others an operand each.
constexpr int kAmxTokenTiles = 6;

// What a tile does beside its sums.
//
// It fetches weights that the next tiles will need, in rows of `bytes`. A row is a short run in a
// page of its own, so the hardware prefetcher would start anew, a DRAM latency late, on every one.
// While a tile steps over k it asks for `lines_per_step` cache lines every kPrefetchStep steps and
// moves on here. Spreading them matters: each line holds one of about 16 fill buffers for a DRAM
// latency, and the tile's own loads from L2 need the rest.
constexpr int64_t kPrefetchStep = 8;
struct TileHints {
  static constexpr int64_t kWholePanels = -1;
  const char* base = nullptr;
  int64_t stride = 0;  // bytes between rows
  int64_t rows = 0;    // rows left to ask for, in each half
  int64_t bytes = 0;   // of each row
  int64_t offset = 0;  // bytes of the first row that are done
  int64_t far = 0;     // bytes to the second half of the rows, whose lines take turns with these
  int64_t turn = 0;    // 0 or far
  int64_t lines_per_step = 0;
  // Store past the cache (column form, not accumulating): c and ldc are whole lines. Ignored where
  // a row of the tile is less than one. The caller orders the stores with stream_fence.
  bool stream = false;
  // c and ldc are of bfloat16, to which sums are rounded (column form of pairs, two vectors wide
  // and not accumulating): a row of the tile is one line.
  bool half = false;
  int64_t lda = kLdm;          // column form: elements between summed indices of a
  int64_t ldb = kWholePanels;  // the same of b, which may be 0

  // Spreads the rows over `steps` places that ask; in two halves where memory delivers them faster
  // (Kernels::fetch_halves).
  void spread(int64_t steps, bool halves) {
    const int64_t lines = rows * ((bytes + 63) / 64);
    lines_per_step = (lines + steps - 1) / (steps > 0 ? steps : 1);
    if (halves && rows > 1) {
      rows = (rows + 1) / 2;
      far = rows * stride;
    }
  }
};

// Weights of 8 or 4 bits (QuantFormat in grouped_gemm.h); quant8-inl.h, quant4-inl.h, bytes-inl.h
// and words-inl.h in kernels/.
constexpr int64_t kQuantBlock = 32;  // codes of 8 bits of a token that share a scale
// Most of them in a row of byte_tile: 4 to a float, and 2 floats more for each kQuantBlock.
constexpr int64_t kByteDepth = 512;
static_assert(kByteDepth % 128 == 0);
static_assert(kByteDepth / 4 + 2 * kByteDepth / kQuantBlock <= kLda);
// Tokens of many rows: as they are, as integers of 16 bits (code_tile), of 8 bits (byte_tile).
enum class TokenForm : int { kFloats, kPairs, kBytes };
struct QuantKernels {
  // Tokens for 8-bit weights: bytes of a row of k, in an order of the level's own; and x as
  // integers of 16 bits. x is readable and zero up to a multiple of 64.
  int64_t (*row8_bytes)(int64_t k);
  void (*row8)(int64_t k, const float* x, void* row);
  // Kernels::dot for such weights without their scales and such tokens: strides ldw and row_bytes
  // in bytes, features are 1 or dot8_features, tokens at most dot_tokens. `count` times: the next
  // features are those w_step bytes further, and their results come after these. Every 64 steps of
  // k it prefetches the next line of ahead_rows rows, ahead_pitch bytes apart; `ahead` moves as w
  // does.
  void (*dot8)(int features, int64_t count, int tokens, int64_t k, const void* w, int64_t w_step,
               int64_t ldw, const void* rows, int64_t row_bytes, float* out, int64_t ldo,
               int64_t out_step, const void* ahead, int64_t ahead_pitch, int ahead_rows);
  int dot8_features;
  // Up to k / dot8_depth_of_row rows, but no more than dot8_rows, it beats byte_tile or code_tile.
  int dot8_depth_of_row, dot8_rows;
  // The same for 4 bits: x as integers from -127 to 127, with a scale for each kQuantBlock of them.
  // x is readable and zero up to a multiple of that. features <= kDotFeatures, tokens <=
  // dot_tokens. Up to dot4_rows rows it beats byte_tile.
  int64_t (*row4_bytes)(int64_t k);
  void (*row4)(int64_t k, const float* x, void* row);
  void (*dot4)(int64_t group, int features, int64_t count, int tokens, int64_t k, const void* w,
               int64_t w_step, int64_t ldw, const float* scale, int64_t scale_step,
               int64_t ld_scale, const void* rows, int64_t row_bytes, float* out, int64_t ldo,
               int64_t out_step);
  int dot4_rows;
  // Weights k0 to k0 + n of `features` rows, ldw bytes apart, as a panel of words of 32 bits:
  // [words][2*lanes], word i with weights 32 / bits * i and on of a feature; with the upper bit of
  // each flipped or as they are. k0 is a multiple of 32; what n lacks to 32 bytes is zero or not
  // written, and what is past the last row anything.
  void (*words)(int bits, bool flipped, const void* w, int64_t ldw, int64_t features, int64_t k0,
                int64_t n, uint32_t* dst);
  // n <= 2 * kKc tokens of a row as integers of 16 bits, two in an element of dst, for code_tile;
  // in the order in which that takes words apart. Their scale goes to dst[kKc]. x is readable and
  // zero up to a multiple of 16. Null where code_tile is.
  void (*pairs)(int64_t n, const float* x, float* dst);
  // n <= kByteDepth tokens of a row as integers from -127 to 127 for byte_tile, four in an element
  // of dst; what belongs to each kQuantBlock of them goes to dst[kByteDepth / 4] and on. x is
  // readable and zero up to a multiple of kQuantBlock. Null where byte_tile is.
  void (*bytes)(int bits, int64_t n, const float* x, float* dst);
  // Kernels::panel_tile for `runs` times `count` such words, in two's complement: each run has one
  // scale a column, and these are 2*lanes apart. code_tile, of 8 bits: an element of a is two
  // integers, and row i has a scale a_scale[i * kLda] as well. It prefetches runs * count * 2*lanes
  // / 16 lines, ahead_step bytes apart. Index: [m - 1], tile [bits == 4][m - 1].
  using Tile = void (*)(int64_t runs, int64_t count, const float* a, const float* a_scale,
                        const uint32_t* words, const float* scale, float* c, int64_t ldc,
                        bool accumulate, const char* ahead, int64_t ahead_step);
  Tile tile[2][kMaxMr];
  Tile code_tile[kMaxMr];
  int code_rows;  // of the widest code_tile
  // The same for words of q plus 8 or 128; a and a_blocks are what `bytes` writes, of which a run
  // is whole blocks. For each of them it prefetches ahead_lines lines, up to bits * 2*lanes / 16.
  // Index: [bits == 4][m - 1]; null where the level has no such products.
  using ByteTile = void (*)(int64_t runs, int64_t count, const float* a, const float* a_blocks,
                            const uint32_t* words, const float* scale, float* c, int64_t ldc,
                            bool accumulate, const char* ahead, int ahead_lines);
  ByteTile byte_tile[2][kMaxMr];
  int byte_rows;  // of the widest byte_tile
  // row[i] *= factors[i]
  void (*multiply_row)(const float* factors, float* row, int64_t n);
};

// float8_e4m3fn with a scale for each kFp8Block of k; kernels/fp8-inl.h.
struct Fp8Kernels {
  // At most kFp8Block numbers as codes; the scale (moe_ops/quantize_fp8.h).
  float (*quantize)(const float* x, int64_t n, uint8_t* q);
  // Codes as numbers, exact in both types. The second where Kernels::pairs is true.
  void (*decode)(const uint8_t* q, float* dst, int64_t n);
  void (*decode_bf16)(const uint8_t* q, uint16_t* dst, int64_t n);
  // Kernels::dot of codes, at most kFp8DotTokens tokens, widened and zero up to a whole vector.
  // Scales of weight row f: w_scale[f], of token t: x_scale[t], one a block.
  void (*dot)(int features, int tokens, int64_t k, const uint8_t* w, int64_t ldw,
              const float* const* w_scale, const float* x, int64_t ldx, const float* const* x_scale,
              float* out, int64_t ldo, int64_t out_step);
  // The same, to the bit, of weights that are widened already.
  void (*dot_wide)(int features, int tokens, int64_t k, const float* w, int64_t ldw,
                   const float* const* w_scale, const float* x, int64_t ldx,
                   const float* const* x_scale, float* out, int64_t ldo, int64_t out_step);
  // sums[i][j] (+)= block[i][j] * row_scale[i] * col_scale[j]; cols is a multiple of lanes.
  void (*promote)(int64_t rows, int64_t cols, const float* block, int64_t ld_block,
                  const float* row_scale, const float* col_scale, float* sums, int64_t ld_sums,
                  bool accumulate);
};
constexpr int kFp8DotTokens = 2;
// Attention: the steps between its products, on scores [keys][width] of `width` rows of queries,
// one or two vectors. attention-inl.h in kernels/.
template <class T>
struct KeyIndexOf {
  using type = int32_t;  // as wide as T, so that lanes are compared with one vector
};
template <>
struct KeyIndexOf<double> {
  using type = int64_t;
};
template <class T>
using KeyIndex = typename KeyIndexOf<T>::type;
template <class T>
struct AttentionBlock {
  int64_t keys = 0;
  int width = 0;
  bool masked = false;                 // false: every row sees every key
  KeyIndex<T> begin = 0;               // number of the first key
  const KeyIndex<T>* first = nullptr;  // [width] row r sees keys from number first[r] ...
  const KeyIndex<T>* last = nullptr;   // ... to last[r] - 1
  T softcap = 0;  // scores become softcap * tanh(score / softcap); 0: they do not
  // For the narrow kernels, counted from the first key: no row sees one before `start`, and every
  // row sees those from all_first to all_last - 1.
  int64_t start = 0, all_first = 0, all_last = 0;
  // For the narrow kernels: keys and values that a row does not see are left out of its sums, not
  // multiplied by zero. The bits are the same where all numbers are finite.
  bool apart = false;
};
// Pitch of keys and values that the narrow kernels read, and their largest number of features.
constexpr int64_t kNarrowSize = 16;
// Keys that they take at once: sums of 16 features and scores of 8 keys leave 8 of 32 registers.
constexpr int64_t kNarrowKeys = 8;
template <class T>
struct AttentionKernels {
  T log_tiny;  // e^log_tiny is the smallest weight that is not zero
  T lowest;    // what `max` starts from
  // s becomes e^(s - max) with the larger of the old max and the scores; sum follows. factor: by
  // how much what was summed before shrinks; false where all are one.
  bool (*softmax)(const AttentionBlock<T>& b, T* s, T* max, T* sum, T* factor);
  // After the last block, for n rows, whole vectors: lse = max + log(sum), and by what sums of
  // values are multiplied, 1 / sum; -inf and 0 where sum is 0.
  void (*softmax_end)(int64_t n, const T* max, const T* sum, T* lse, T* factor);
  // s becomes the gradient of scores, of which ds_rows, pitch kLda, is a copy; p_rows: weights.
  void (*softmax_bwd)(const AttentionBlock<T>& b, T* s, const T* dp, const T* lse, const T* delta,
                      T* p_rows, T* ds_rows);
  // From the last key to the first: s becomes weights, log_rest [width] the log of what is left.
  // Returns the largest. stick_rest moves log_rest only.
  T (*stick)(const AttentionBlock<T>& b, T* s, T* log_rest);
  T (*stick_rest)(const AttentionBlock<T>& b, T* s, T* log_rest);
  // From the first block on, with the log_rest that the block started from. before [width]: the sum
  // of weight times gradient over all keys before. slopes: scratch like s, used with a softcap.
  void (*stick_bwd)(const AttentionBlock<T>& b, T* s, const T* dp, const T* log_rest, T* slopes,
                    T* before, T* p_rows, T* ds_rows);
  // Softmax of heads of up to narrow_size features, whole: scores, weights and products. One vector
  // of rows, no softcap. Keys and values are [keys][kNarrowSize] and zero from `size` on to 8 or
  // 16, q and what is summed [8 or 16][lanes]; q times keys is scores times power_scale, in which
  // max counts too. Null where narrow_size is 0.
  int narrow_size;
  T power_scale;
  // out += values times weights relative to max; max (from `lowest` on) and sum follow.
  void (*narrow)(int size, const AttentionBlock<T>& b, const T* keys, const T* values, const T* q,
                 T* out, T* max, T* sum);
  // Weights and gradients of scores, as softmax_bwd writes them but for keys before b.start, and
  // zeros for up to kNarrowKeys - 1 keys after the last; grad_q += keys times the latter.
  void (*narrow_bwd)(int size, const AttentionBlock<T>& b, const T* keys, const T* values,
                     const T* q, const T* grad_out, const T* lse, const T* delta, T* grad_q,
                     T* p_rows, T* ds_rows);
  // c[f * width + r] += the sum over the keys j that row r sees of a[j * lda + f] * s[j * width +
  // r], with the same bits as a tile's where all numbers are finite.
  void (*seen_sums)(const AttentionBlock<T>& b, const T* a, int64_t lda, const T* s,
                    int64_t features, T* c);
  // Neither infinity nor NaN among n numbers.
  bool (*all_finite)(const T* x, int64_t n);
  // c[i * width + j] *= factor[j]
  void (*multiply_lanes)(T* c, int64_t rows, int width, const T* factor);
  // out[r] = the product of row r of a and of b, n elements each, lda and ldb apart.
  void (*row_dots)(DType type, const void* a, int64_t lda, const void* b, int64_t ldb, int64_t rows,
                   int64_t n, T* out);
};

// add_rms_norm on `rows` contiguous rows of `cols`; norm-inl.h in kernels/. What may be null is
// said in moe_ops/add_rms_norm.h.
template <class T>
struct NormRows {
  DType type;  // of x, residual, y and sum
  int64_t rows, cols;
  T eps;
  const T *weight, *bias;
  T* wide;  // scratch, [cols]
  const void *x, *residual;
  void *y, *sum;
  T* rstd;
};
template <class T>
struct NormRowsBwd {
  DType type;  // of grad_y, grad_sum, sum and grad_x
  int64_t rows, cols;
  const T* weight;
  const void *grad_y, *grad_sum, *sum;
  const T* rstd;
  void* grad_x;
  T *weight_sum, *bias_sum;  // [cols], added to
};

// The activation of `rows` rows of n; functions-inl.h in kernels/.
template <class T>
struct ActRows {
  Activation kind;
  int64_t rows, n;
  T alpha, limit;
  const T *gate, *up;  // rows ld apart; `up` is read by activations with a gate alone
  int64_t ld;
  T* h;  // rows ld_h apart
  int64_t ld_h;
};
template <class T>
struct ActRowsBwd {
  Activation kind;
  int64_t rows, n;
  T alpha, limit;
  const T *gate, *up;
  int64_t ld;
  const T* dh;  // rows ld_dh apart
  int64_t ld_dh;
  const T* weights;  // [rows], factors of all that is written but dots; nullptr: ones
  T* h;              // may be where dh is
  int64_t ld_h;
  T *dgate, *dup;  // rows ld_grad apart
  int64_t ld_grad;
  T* dots;  // [rows], <h, dh>
};

// Steps between the products of dense_ffn, on rows of a block; dense-inl.h in kernels/. They write
// whole vectors: rows of targets and `sum` reach up to the next one. Panels are as those of
// pack_panels, [rows][2*lanes or lanes] each, one after the other.
template <class T>
struct DenseActTargets {  // nullptr: not wanted
  T* h_panels = nullptr;  // h, as panels of `rows` rows and n columns
  T* rows = nullptr;      // gradients of u, rows kLda apart
  T* columns = nullptr;   // the same, rows kLdm apart
  T* sum = nullptr;       // [n], they are added
};
template <class T>
struct DenseKernels {
  // Rows of src, ld apart, to first and second; sum += each row. nullptr: not wanted.
  void (*copy)(DType type, const void* src, int64_t ld, int64_t rows, int64_t n, T* first,
               int64_t ld_first, T* second, int64_t ld_second, T* sum);
  void (*panels)(DType type, const void* src, int64_t ld, int64_t rows, int64_t n, T* panels);
  // h = act(u), or u.
  void (*act)(bool has_act, Activation kind, int64_t rows, int64_t n, const T* u, int64_t ld_u,
              T* h, int64_t ld_h);
  // From d, the gradient of h, whose rows are readable up to the next whole vector; nullptr (and
  // ld_d 0): h alone.
  void (*act_bwd)(bool has_act, Activation kind, int64_t rows, int64_t n, const T* u, int64_t ld_u,
                  const T* d, int64_t ld_d, const DenseActTargets<T>& to);
};

// Mixtures; mix-inl.h in kernels/. Every count of elements is a multiple of lanes.
template <class T>
struct MixNormRows {  // of one token's outputs; mean == nullptr: no normalisation
  const T *mean = nullptr, *scale = nullptr, *shift = nullptr;  // n = (x - mean) * scale + shift
};
template <class T>
struct MixKernels {
  // z = act(n), slope = act'(n) where it is not nullptr.
  void (*act)(MixActivation kind, const MixNormRows<T>& norm, const T* x, int64_t n, T* z,
              T* slope);
  // c[i*pitch + j] = sum_k a[i*step_i + k*step_k] * b[k*pitch + j] for i < rows, j < pitch.
  void (*product)(int64_t rows, int64_t depth, const T* a, int64_t step_i, int64_t step_k,
                  const T* b, T* c, int64_t pitch);
  // out[i*count + e] = sum_j g[i*pitch + j] * z[e*pitch + j] for i < rows, e < count.
  void (*weight_grads)(int64_t rows, int64_t count, const T* g, const T* z, T* out, int64_t pitch);
  // d *= slope; sum += d, sum_x += d * (x - mean) where they are not nullptr.
  void (*slope)(int64_t n, const T* slope, const MixNormRows<T>& norm, const T* x, T* d, T* sum,
                T* sum_x);
  // out = scale * (d - at - by * (x - mean)), without the last two where at is nullptr.
  void (*norm_grad)(int64_t n, const MixNormRows<T>& norm, const T* at, const T* by, const T* x,
                    const T* d, T* out);
  // Means and sums of squared distances from them, over `count` rows of n.
  void (*moments)(int64_t count, int64_t n, const T* x, T* mean, T* squares);
};

// router_linear on rows of whole vectors, and experts in groups of so many; router-inl.h in
// kernels/.
constexpr int kRouterExperts = 4;
template <class T>
struct RouterLinearBwd {
  int64_t tokens, experts, n;
  const T* g;  // [tokens, experts], gradients of logits
  int64_t ld_g;
  const T* x;  // [tokens, n]
  int64_t ld_x;
  const T* w;  // [experts, n]
  int64_t ld_w;
  T* grad_x;  // [tokens, n], or nullptr
  int64_t ld_grad_x;
  T* grad_w;  // [experts, n], added to, or nullptr
  int64_t ld_grad_w;
};

// T as a tag.
template <class T>
constexpr DType kAccumulate = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// Elements of k for each row of an expert from which on strips beat transposed weights. A strip
// ends with as many sums of lanes for each row, whatever the depth.
struct StripDepths {
  int same;     // weights of type T
  int widened;  // of half types
  int pairs;    // of bfloat16, multiplied as they are
};

template <class T>
struct Kernels {
  int lanes;         // elements of T in a vector
  int mr1, mr2;      // rows of the widest tile that is one, two vectors wide
  int dot_tokens;    // tokens one call of dot handles
  bool streams;      // stores of `stream` tiles go past the cache
  int dot_max_rows;  // below or at this many rows the dot kernel beats the tiles
  StripDepths strip_depth_of_row;
  // Whether tiles that need not widen weights beat a second pass of rank_update (isa.h).
  bool rank_one_pass;

  // c[i*ldc + j] (+)= sum_k a(i, k) * b[k * nv*lanes + j] for i < m, j < nv*lanes.
  // row_a: a(i, k) = a[i*kLda + k]; col_a: a(i, k) = a[k*kLdm + i]. Index: [nv - 1][m - 1]. With
  // hints.lda, col_a takes another pitch, and both take another one of b with hints.ldb.
  using Micro = void (*)(int64_t kc, const T* a, const T* b, T* c, int64_t ldc, bool accumulate,
                         TileHints& hints);
  Micro row_a[2][kMaxMr];
  Micro col_a[2][kMaxMr];
  // row_a that also writes the rows of b side by side to `copy`, [kc][nv*lanes].
  using CopyingMicro = void (*)(int64_t kc, const T* a, const T* b, T* c, int64_t ldc,
                                bool accumulate, TileHints& hints, T* copy);
  CopyingMicro copying_row_a[2][kMaxMr];

  // Weights packed ahead of time, as the vector side (pack.h). For i < m, j < 2*lanes:
  // c[i*ldc + j] (+)= sum_k a[i*kPanelLda + k] * panel(k, j). A panel holds [kc][2*lanes] elements
  // of T, or pairs of k of a half type, [kc/2][2*lanes][2], kc even. Each step, one k or one pair,
  // the tile prefetches the line at `ahead` and, with tile_lines = 2, the one at `ahead + far`;
  // then `ahead` moves on by ahead_step. Index: [type, kFloat64 like kFloat32][m - 1].
  using PanelTile = void (*)(int64_t kc, const T* a, const void* panel, T* c, int64_t ldc,
                             bool accumulate, const char* ahead, int64_t far, int64_t ahead_step);
  int tile_lines;
  // Whether `far` is half a block, and the most rows of an item (isa.h).
  bool fetch_halves;
  int64_t panel_rows;
  PanelTile panel_tile[4][kMaxMr];
  // A block of a panel of a half type, kc even, as one of T: [kc][2*lanes]. T = float only. From so
  // many tiles of rows on it is faster than each of them widening the block for itself; 0: never.
  void (*widen_panel[4])(int64_t kc, const void* panel, T* dst);
  int widen_tiles[4];
  // The same for m <= stream_rows and num_panel_streams[m - 1] panels, `stride` bytes apart: the
  // sums of panel s go to c[s]. Index: [type][asks for what is `ahead` bytes further][m - 1].
  using PanelStreams = void (*)(int64_t kc, const T* a, const void* panel, int64_t stride,
                                T* const* c, int64_t ldc, bool accumulate, int64_t ahead);
  int stream_rows;  // at most kMaxStreamRows
  int num_panel_streams[kMaxStreamRows];
  int64_t stream_ahead, stream_ahead_bank;  // where asking pays (isa.h)
  PanelStreams panel_streams[4][2][kMaxStreamRows];

  // Products of bfloat16 operands without widening them: the same tiles where an element of a and
  // of b is a pair of bfloat16 of adjacent k in the bits of one T, and kc counts pairs. The panel
  // tiles take bfloat16 panels as they are. Only where `pairs` is true, as are the next two.
  bool pairs;
  // Rows of an expert up to which they are used; with more, widened operands are faster here.
  int64_t pairs_max_rows;
  Micro pair_row_a[2][kMaxMr];
  Micro pair_col_a[2][kMaxMr];
  PanelTile pair_panel_tile[kMaxMr];
  PanelStreams pair_panel_streams[2][kMaxStreamRows];
  // Panels of 32 columns, [num_rows/2][32][2] and `stride` elements apart, of a bfloat16 matrix
  // whose row r starts `offset` elements after rows[r]; rows[r] == nullptr is a row of zeros.
  // num_rows is even.
  void (*pack_pairs)(const uint16_t* const* rows, int64_t offset, int64_t num_rows, int64_t cols,
                     uint16_t* dst, int64_t stride);
  // dst[i] = (even[i], odd[i])
  void (*pair_rows)(const uint16_t* even, const uint16_t* odd, T* dst, int64_t n);

  // AMX: products of bfloat16 with sums in fp32 tiles of 16 x 16. Null at other levels. A thread
  // calls amx_begin before the first of a run of tiles and amx_end after the last.
  void (*amx_begin)();
  void (*amx_end)();
  // For i < 16*row_tiles (at most 2), j < 32: c[i*ldc + j] (+)= sum_k a[i*lda + k] * panel(k, j),
  // with k < 32*k_steps. `next` counts lines per step of 32 k.
  void (*amx_panel)(int64_t k_steps, const uint16_t* a, int64_t lda, int row_tiles,
                    const uint16_t* panel, T* c, int64_t ldc, bool accumulate, TileHints& next);
  // For f < 16, t < 16*token_tiles (at most kAmxTokenTiles): c[f*ldc + t] = sum_k w[f*ldw + k] *
  // x(t, k). Tile j of x starts at x + j*ldx and holds pairs of k: [16*k_steps][16][2].
  void (*amx_rows)(int64_t k_steps, const uint16_t* w, int64_t ldw, const uint16_t* x, int64_t ldx,
                   int token_tiles, T* c, int64_t ldc);

  // out[t*ldo + f*out_step + i] = sum_k w[i*w_step + f*ldw + k] * x[t*ldx + k] for f < features,
  // which are 1 or kDotFeatures, t < tokens <= dot_tokens and i < count. Rows of x are readable and
  // zero up to the next whole vector. For several tokens it prefetches what is `ahead` bytes
  // further on in each row of weights.
  void (*dot)(DType w_type, int features, int64_t count, int tokens, int64_t k, const void* w,
              int64_t w_step, int64_t ldw, const T* x, int64_t ldx, T* out, int64_t ldo,
              int64_t out_step, int64_t ahead);
  int64_t dot_ahead;  // `ahead` for weights of type T that several passes read (isa.h)
  // The same where an element of w and of x is a pair of bfloat16. Only where `pairs` is true.
  void (*pair_dot)(int features, int64_t count, int tokens, int64_t k, const void* w,
                   int64_t w_step, int64_t ldw, const T* x, int64_t ldx, T* out, int64_t ldo,
                   int64_t out_step, int64_t ahead);

  // The same for weights of type T and a block of k: lane l of vector (t * features + f) of sums
  // (+)= the products of every k of that lane, for tokens <= strip_tokens and features 1 or
  // kDotFeatures. `pair_strip`: an element of w and of x is a pair of bfloat16; where `pairs` is
  // true.
  using Strip = void (*)(int features, int tokens, int64_t k, const void* w, int64_t ldw,
                         const T* x, int64_t ldx, T* sums, bool accumulate, TileHints& hints);
  int strip_tokens;
  int64_t strip_block;           // steps of k (pairs) of a block (isa.h)
  int64_t strip_one_pass_depth;  // isa/isa.h
  // With more rows, transposing weights costs less than reading tokens once for four features.
  // Shallow products end there earlier (strip_depth_of_row).
  int64_t strip_max_rows;
  Strip strip, pair_strip;
  // The same for weights of a half type, T = float only; also wide[f*ld_wide + i] = w[f*ldw + i],
  // zeros up to the next whole vector.
  void (*strip_widen)(DType w_type, int features, int tokens, int64_t k, const void* w, int64_t ldw,
                      T* wide, int64_t ld_wide, const T* x, int64_t ldx, T* sums, bool accumulate,
                      TileHints& hints);
  // out[t*ldo + f] = the sum of the lanes of vector (t * features + f)
  void (*strip_sums)(int features, int64_t tokens, const T* sums, T* out, int64_t ldo);

  // c[t*ldc + j] (+)= sum_r a[t*lda + r] * w[r*ldw + j] for r < rows <= kRankRows, t < tokens, j <
  // n.
  void (*rank_update)(DType w_type, int rows, int64_t tokens, const void* w, int64_t ldw,
                      const T* a, int64_t lda, T* c, int64_t ldc, int64_t n, bool accumulate);

  // The same of bfloat16, two rows of which are multiplied as pairs with an element of a. Only
  // where `pairs` is true.
  void (*pair_rank_update)(int rows, int64_t tokens, const uint16_t* w, int64_t ldw, const T* a,
                           int64_t lda, T* c, int64_t ldc, int64_t n, bool accumulate);

  // dst[i] = scale * src[i]
  void (*load_row)(DType type, const void* src, T* dst, int64_t n, T scale);
  // load_row and store_row of `rows` rows of n, in strides of ld_src and ld_dst elements.
  void (*load_rows)(DType type, const void* src, int64_t ld_src, int64_t rows, int64_t n, T* dst,
                    int64_t ld_dst, T scale);
  void (*store_rows)(DType type, const T* src, int64_t ld_src, int64_t rows, int64_t n, void* dst,
                     int64_t ld_dst);
  // Panels of 2*lanes columns (the last one lanes or 2*lanes wide, zero-padded), `stride` elements
  // apart, of a matrix whose row r starts at rows[r] + byte_offset: dst[p*stride + r*width + c] for
  // column c of panel p. scales: one factor a row, or nullptr.
  void (*pack_panels)(DType type, const void* const* rows, int64_t byte_offset, int64_t num_rows,
                      int64_t cols, const T* scales, T* dst, int64_t stride);
  // dst[r*ld + i] = scales[r] * rows[r][i]; scales == nullptr means ones. And the way back.
  void (*gather_rows)(DType type, const void* const* rows, int64_t num_rows, int64_t n,
                      const T* scales, T* dst, int64_t ld);
  void (*scatter_rows)(DType type, const T* src, int64_t ld, int64_t num_rows, int64_t n,
                       const T* scales, void* const* rows);
  // out[r] = the sum over i of a[r][i] * b[r*ld + i]
  void (*dot_rows)(DType type, const void* const* a, const T* b, int64_t ld, int64_t num_rows,
                   int64_t n, T* out);
  // Row t of out, n wide and contiguous, is the sum of weights[t*top_k + s] * rows[i*ld] in the
  // order of s, with i = index[t*top_k + s]; those below 0 are left out. weights == nullptr: ones.
  void (*combine_rows)(DType type, const T* rows, int64_t ld, const int32_t* index,
                       const T* weights, int64_t num_tokens, int64_t top_k, int64_t n, void* out);
  void (*store_row)(DType type, const T* src, void* dst, int64_t n);
  // The same past the cache where the level can and dst and n are whole lines; stream_fence orders
  // it.
  void (*stream_row)(DType type, const T* src, void* dst, int64_t n);
  // dst[c*ld_dst + r] = src[r*ld_src + c] for r < rows, c < cols. `rows` is a multiple of lanes,
  // cols is anything; src must be readable up to the next whole vector of columns.
  void (*transpose)(const T* src, int64_t ld_src, int64_t rows, int64_t cols, T* dst,
                    int64_t ld_dst);

  // out[i] = sum_r weights[r] * rows[r][i], in the order of r; weights == nullptr means ones.
  void (*weighted_sum)(DType type, const void* const* rows, const T* weights, int64_t num_rows,
                       T* out, int64_t n);
  // acc[i] += scale * row[i]
  void (*axpy)(DType type, const void* row, T scale, T* acc, int64_t n);
  T (*dot_row)(DType a_type, const void* a, DType b_type, const void* b, int64_t n);

  void (*stream_fence)();

  QuantKernels quant;  // T = float only
  Fp8Kernels fp8;      // T = float only
  AttentionKernels<T> attention;
  DenseKernels<T> dense;
  MixKernels<T> mix;

  void (*norm_rows)(const NormRows<T>& p);
  void (*norm_rows_bwd)(const NormRowsBwd<T>& p);
  // out = in with features i and i + half of each of a row's heads turned by angle i of the row, or
  // by minus that (sign -1). cos and sin are [rows, half]; in and out may be the same.
  void (*rotate_rows)(int64_t rows, const T* in, int64_t ld_in, const T* cos, const T* sin, T sign,
                      int64_t heads, int64_t half, T* out, int64_t ld_out);

  // out[t*ld_out + e] = bias[e] + sum_i x[t*ld_x + i] * w[e*ld_w + i] for t < tokens, e < experts,
  // i < n.
  void (*router_linear)(int64_t tokens, int64_t experts, int64_t n, const T* x, int64_t ld_x,
                        const T* w, int64_t ld_w, const T* bias, T* out, int64_t ld_out);
  void (*router_linear_bwd)(const RouterLinearBwd<T>& p);

  // h = act(gate, up); `up` is ignored by activations that have no gate.
  void (*act_fwd)(Activation kind, const T* gate, const T* up, T* h, int64_t n, T alpha, T limit);
  // Given dh, writes the gradients of gate and up, and h itself when h != nullptr.
  void (*act_bwd)(Activation kind, const T* gate, const T* up, const T* dh, T* h, T* dgate, T* dup,
                  int64_t n, T alpha, T limit);
  // The same of many rows in a call; backward with a weight and <h, dh> a row.
  void (*act_rows)(const ActRows<T>& p);
  void (*act_bwd_rows)(const ActRowsBwd<T>& p);
};

template <class T>
const Kernels<T>& kernels();  // those of active_isa()

// Those of each level, in the file of its name. A level that the build lacks is declared only.
#define MOE_DECLARE_LEVEL(level) \
  namespace level {              \
  Kernels<float> kernels_f32();  \
  Kernels<double> kernels_f64(); \
  }
MOE_DECLARE_LEVEL(portable)
MOE_DECLARE_LEVEL(avx2)
MOE_DECLARE_LEVEL(avx512)
MOE_DECLARE_LEVEL(avx512_bf16)
MOE_DECLARE_LEVEL(amx)
#undef MOE_DECLARE_LEVEL

}  // namespace moe_ops::cpu
