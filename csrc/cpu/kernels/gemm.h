// Microkernels of dense products: C = A B with operands of the accumulate type, of a half type that
// is widened on the way, or of pairs of bfloat16 (vdpbf16ps). One table an algorithm; cpu/gemm/
// chooses among them and cuts a product into their calls.
#pragma once

#include <cstdint>

#include "cpu/kernels/rows.h"
#include "moe_ops/common.h"

namespace moe_ops::cpu {

// Depth of one step over k. A row-major block of A of 14 x 192 floats (10 KiB) and a packed panel
// of B of 192 x 32 (24 KiB) fit an L1 together; the AVX2 tile needs half of that.
constexpr int64_t kKc = 192;
// Leading dimension of a row-major block of A. The pad keeps rows out of the same L1 set, and a
// constant makes every row an address offset.
constexpr int64_t kLda = kKc + 16;
// Depth of a block of B that is packed ahead of time. Its panels are read from L2 by every tile,
// whose latency a core hides, so a block need not fit an L1, and fewer blocks mean fewer passes
// over C.
constexpr int64_t kPanelDepth = 1024;
constexpr int64_t kPanelLda = kPanelDepth + 16;
// Leading dimension of a column-major block of A.
constexpr int64_t kLdm = 128;
// Most rows of C in a tile.
constexpr int kMaxMr = 24;
// Features (rows of weights) that a GEMV takes at once.
constexpr int64_t kGemvFeatures = 4;
// Rows of B that one pass of the outer product takes.
constexpr int kOuterRows = 4;
// Most rows of C for which several packed panels are read at once.
constexpr int kMaxStreamRows = 5;
// And for which they prefetch: with more, sums in two panels at once leave the hardware prefetcher
// time.
constexpr int kStreamPrefetchRows = 3;
// Tiles that hold sums of tokens, among the 8 of an AMX core; the others hold one operand each.
constexpr int kAmxTokenTiles = 6;

// Prefetches of the weights that later tiles need, in rows of `bytes`. A row is a short run in a
// page of its own, so the hardware prefetcher starts anew, a DRAM latency late, on every one. A
// tile prefetches lines_per_step cache lines every kPrefetchStep steps of k and advances this
// state. Spreading them matters: each line holds one of about 16 fill buffers for a DRAM latency,
// and the tile's own loads from L2 need the rest.
constexpr int64_t kPrefetchStep = 8;
struct TilePrefetch {
  const char* base = nullptr;
  int64_t stride = 0;  // bytes between rows
  int64_t rows = 0;    // rows left, in each half
  int64_t bytes = 0;   // of each row
  int64_t offset = 0;  // bytes of the first row that are done
  int64_t half = 0;    // bytes from the first half of the rows to the second; lines alternate
  int64_t turn = 0;    // 0 or `half`
  int64_t lines_per_step = 0;

  // Spreads the rows over `steps` steps; in two halves where memory delivers them faster
  // (GemmKernels::prefetch_halves).
  void spread(int64_t steps, bool halves) {
    const int64_t lines = rows * ((bytes + 63) / 64);
    lines_per_step = (lines + steps - 1) / (steps > 0 ? steps : 1);
    if (halves && rows > 1) {
      rows = (rows + 1) / 2;
      half = rows * stride;
    }
  }
};

// Optional work of a tile besides its sums, and leading dimensions other than the defaults.
struct TileOptions : TilePrefetch {
  static constexpr int64_t kPacked = -1;
  // Non-temporal stores (column-major A, not accumulating). Rows of C are whole lines; ignored
  // where a row of the tile is less than one. The caller ends with stream_fence.
  bool stream = false;
  // C is bfloat16 (column-major A of pairs, two vectors wide, not accumulating).
  bool bf16_out = false;
  int64_t lda = kLdm;     // of a column-major A
  int64_t ldb = kPacked;  // of B, which may be 0
};

// Where sums go: c[i * ldc + j] = or += sum. Passed by reference, as all structs of more than 16
// bytes are: a copy on the stack reads in one piece what was just written in two, which waits for
// every store before it.
template <class C>
struct TileOut {
  C* c;
  int64_t ldc;
  bool accumulate;
};

// C[i][j] (+)= sum_k A(i, k) * b[k * nv*lanes + j] for i < m, j < nv*lanes. Index of a table of
// these: [nv - 1][m - 1]. An element of A and B is a pair of bfloat16 in those named bf16; kc then
// counts pairs.
template <class T>
using MicroKernel = void (*)(int64_t kc, const T* a, const T* b, const TileOut<T>& out,
                             TileOptions& o);

// Products with B as it lies (through options.ldb) or packed just before, and the packing.
template <class T>
struct GemmTiles {
  int lanes;     // elements of T in a vector
  int mr1, mr2;  // rows of the largest tile that is one, two vectors wide
  bool streams;  // whether TileOptions::stream is followed
  bool prefetch_halves;
  MicroKernel<T> row_a[2][kMaxMr];  // A(i, k) = a[i * kLda + k]
  MicroKernel<T> col_a[2][kMaxMr];  // A(i, k) = a[k * options.lda + i]
  // row_a that also writes the rows of B side by side to `copy`, [kc][nv*lanes].
  using Copying = void (*)(int64_t kc, const T* a, const T* b, const TileOut<T>& out,
                           TileOptions& o, T* copy);
  Copying copying_row_a[2][kMaxMr];
  // Panels of 2*lanes columns, `stride` elements apart, of the rows from byte_offset on: element
  // (r, c) of panel p goes to dst[p*stride + r*width + c]. The last panel is lanes or 2*lanes wide
  // and zero-padded. scales: one factor a row, or nullptr.
  void (*pack_b)(const RowPointers& rows, int64_t byte_offset, const T* scales, T* dst,
                 int64_t stride);
  // dst[c*ld_dst + r] = src[r*ld_src + c] for r < rows, c < cols. `rows` is a multiple of lanes;
  // src is readable up to the next whole vector of columns.
  void (*transpose)(const T* src, int64_t ld_src, int64_t rows, int64_t cols, T* dst,
                    int64_t ld_dst);

  // bfloat16 operands multiplied as pairs of adjacent k, without widening: only where has_bf16.
  bool has_bf16;
  int64_t bf16_max_rows;  // rows of an expert up to which they beat widened operands
  MicroKernel<T> bf16_row_a[2][kMaxMr], bf16_col_a[2][kMaxMr];
  // Panels of 32 columns, [rows/2][32][2], `stride` elements apart, of rows from `offset` elements
  // on; nullptr is a row of zeros. The count of rows is even.
  void (*bf16_pack_b)(const uint16_t* const* rows, int64_t offset, int64_t num_rows, int64_t cols,
                      uint16_t* dst, int64_t stride);
  // dst[i] = the pair (even[i], odd[i])
  void (*bf16_interleave)(const uint16_t* even, const uint16_t* odd, T* dst, int64_t n);
};

// Weights packed ahead of time (gemm/prepack.h): a panel holds [kc][2*lanes] elements of T, or
// pairs of k of a half type, [kc/2][2*lanes][2] with kc even. Tables are indexed by the type of the
// weights.
template <class T>
struct PackedGemmKernels {
  // Each step, one k or one pair, a tile prefetches the line at `next` and, with prefetch_lines =
  // 2, the one `half` bytes further; then `next` moves on by `step`.
  struct Prefetch {
    const char* next;
    int64_t half, step;
  };
  // C[i][j] (+)= sum_k a[i*kPanelLda + k] * panel(k, j) for i < m, j < 2*lanes. Index: [m - 1].
  using Tile = void (*)(int64_t kc, const T* a, const void* panel, const TileOut<T>& out,
                        const Prefetch& prefetch);
  Tile tile[4][kMaxMr], bf16_tile[kMaxMr];
  int prefetch_lines;
  int64_t max_rows;  // of a work item (isa/tuning.h)
  // One block of float16, kc even, as one of T, [kc][2*lanes]; T = float. From widen_tiles tiles on
  // that is faster than each tile widening for itself.
  void (*widen_fp16)(int64_t kc, const void* panel, T* dst);
  int widen_tiles;
  // Kernels for m <= stream_rows rows and num_streams[m - 1] panels at once, `stride` bytes apart:
  // sums of panel s go to out.c[s]. Index: [prefetches `distance` bytes ahead][m - 1]; null where m
  // > kStreamPrefetchRows would prefetch.
  struct Panels {
    const void* first;
    int64_t stride, distance;
  };
  using Streams = void (*)(int64_t kc, const T* a, const Panels& panels,
                           const TileOut<T* const>& out);
  Streams streams[4][2][kMaxStreamRows], bf16_streams[2][kMaxStreamRows];
  int stream_rows;
  int num_streams[kMaxStreamRows];
  int64_t stream_distance, stream_min_bytes;  // where prefetching pays (isa/tuning.h)
};

// A few tokens times weights dense along k, each weight row read once:
// out[t*ldo + f*out_step + i] = sum_k w[i*w_step + f*ldw + k] * x[t*ldx + k] for f < features (1 or
// kGemvFeatures), t < tokens <= max_tokens, i < count. Rows of x are readable and zero up to the
// next whole vector.
template <class T>
struct GemvParams {
  DType w_type;  // ignored where elements are pairs of bfloat16
  int features;
  int64_t count;
  int tokens;
  int64_t k;
  const void* w;
  int64_t w_step, ldw;
  const T* x;
  int64_t ldx;
  T* out;
  int64_t ldo, out_step;
  int64_t prefetch_distance;  // bytes; used with several tokens
};
template <class T>
struct GemvKernels {
  void (*run)(const GemvParams<T>& p);
  void (*run_bf16)(const GemvParams<T>& p);
  int max_tokens;
  int max_rows;               // rows of an expert up to which this beats the tiles
  int64_t prefetch_distance;  // for weights of type T that several passes read (isa/tuning.h)
};

// A blocked GEMV: the weights of a block of k stay in L1 while the tokens pass, max_tokens at a
// time. Lane l of vector (t * features + f) of `sums` (+)= the products of every k of that lane.
template <class T>
struct BlockedGemvParams {
  DType w_type;
  int features, tokens;
  int64_t k;
  const void* w;
  int64_t ldw;
  const T* x;
  int64_t ldx;
  T* sums;
  bool accumulate;
  T* wide;  // run_widening: [features][ld_wide], receives the weights as T
  int64_t ld_wide;
};
template <class T>
struct BlockedGemvKernels {
  using Run = void (*)(const BlockedGemvParams<T>& p, TilePrefetch& prefetch);
  Run run, run_bf16;  // weights of type T, pairs of bfloat16
  Run run_widening;   // weights of a half type, T = float
  // out[t*ldo + f] = the sum of the lanes of vector (t * features + f)
  void (*reduce)(int features, int64_t tokens, const T* sums, T* out, int64_t ldo);
  int max_tokens;
  int64_t max_rows;            // with more, transposing the weights costs less
  int64_t block_k;             // steps of k (pairs) in a block
  int64_t one_pass_min_depth;  // from which one pass beats two of GEMV (isa/tuning.h)
  // Elements of k for each row of an expert from which on this beats transposed weights: each row
  // ends with as many lanes to reduce, whatever the depth.
  struct MinDepth {
    int same, widened, bf16;
  } min_depth_per_row;
};

// A few tokens times weights dense along the features:
// c[t*ldc + j] (+)= sum_r a[t*lda + r] * w[r*ldw + j] for r < rows, in that order.
template <class T>
struct OuterParams {
  DType w_type;
  int64_t rows;  // kOuterRows are added up at once, any other number one after the other
  int64_t tokens;
  const void* w;
  int64_t ldw;
  int64_t ahead;  // from a weight to the one that is prefetched with it
  const T* a;
  int64_t lda;
  T* c;
  int64_t ldc, n;
  bool accumulate;
};
template <class T>
struct OuterKernels {
  void (*run)(const OuterParams<T>& p);
  void (*run_bf16)(const OuterParams<T>& p);  // an element of a is a pair of k
  bool one_pass;  // whether tiles that need not widen weights beat a second pass (isa/tuning.h)
};

// AMX: bfloat16 operands, sums in fp32 tiles of 16 x 16. Null at other targets. A thread calls
// begin before the first of a run of tiles and end after the last.
struct AmxPanelParams {
  int64_t k_steps;  // of 32
  const uint16_t* a;
  int64_t lda;
  int row_tiles;  // 1 or 2
  const uint16_t* panel;
};
struct AmxRowsParams {
  int64_t k_steps;
  const uint16_t* w;
  int64_t ldw;
  const uint16_t* x;
  int64_t ldx;
  int token_tiles;
};
struct AmxKernels {
  void (*begin)();
  void (*end)();
  // C[i][j] (+)= sum_k a[i*lda + k] * panel(k, j) for i < 16*row_tiles, j < 32.
  void (*panel)(const AmxPanelParams& p, const TileOut<float>& out, TilePrefetch& prefetch);
  // c[f*ldc + t] = sum_k w[f*ldw + k] * x(t, k) for f < 16, t < 16*token_tiles. Tile j of x starts
  // at x + j*ldx and holds pairs of k: [16*k_steps][16][2].
  void (*rows)(const AmxRowsParams& p, float* c, int64_t ldc);
};

// All algorithms of a product.
template <class T>
struct GemmKernels : GemmTiles<T> {
  PackedGemmKernels<T> packed;
  GemvKernels<T> gemv;
  BlockedGemvKernels<T> blocked_gemv;
  OuterKernels<T> outer;
  AmxKernels amx;
};

template <class T>
const GemmKernels<T>& gemm_kernels();  // of active_target()

}  // namespace moe_ops::cpu
