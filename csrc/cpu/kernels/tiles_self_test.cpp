// The microkernels of every height against their definition, and kernels for rare operands: which
// of them an op takes depends on its sizes, so the calls of isa/self_test.cpp do not reach all.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/isa/self_test.h"
#include "cpu/kernels/kernels.h"

namespace moe_ops::cpu {

namespace {

constexpr int64_t kDepth = 36;  // even, and no multiple of a step of prefetches

template <class T>
class TileTest {
 public:
  explicit TileTest(const Kernels<T>& k) : all_(k), k_(k.gemm), P_(2 * k.gemm.lanes) {
    for (int64_t i = 0; i < kMaxMr; ++i) {
      for (int64_t s = 0; s < kDepth; ++s) {
        rows_[i * kLda + s] = packed_[i * kPanelLda + s] = cols_[s * kLdm + i] = a(i, s);
      }
    }
  }

  const char* failed() {
    dense(k_.row_a, k_.col_a, kDepth, 1);
    packed_tiles(kAccumulate<T>);
    rare();
    if constexpr (sizeof(T) == 4) {
      packed_tiles(DType::kBFloat16);
      packed_tiles(DType::kFloat16);
      for (const int bits : {8, 4}) quantised(bits);
      if (k_.has_bf16) pairs();
    }
    return failed_;
  }

 private:
  // Numbers in [-1, 1) that all types hold exactly.
  static T number(int64_t i) { return static_cast<T>((i * 37 + i / 11 * 5) % 128 - 64) / T(64); }
  static T a(int64_t i, int64_t k) { return number(3 * i + 7 * k + i * k); }
  static T w(int64_t k, int64_t j) { return number(1000 + 5 * j + 11 * k + j * k); }

  // [rows][n]: the sums over k of a(i, k) * weight(k, j), and of their absolute values and 1. The
  // first rows are those of lower tiles.
  struct Sums {
    int64_t n;
    std::vector<double> sum, most;
  };
  template <class Weight>
  static Sums sums_of(int64_t rows, int64_t n, const Weight& weight, int64_t depth = kDepth) {
    Sums out = {n, std::vector<double>(static_cast<size_t>(rows * n)),
                std::vector<double>(static_cast<size_t>(rows * n), 1)};
    for (int64_t i = 0; i < rows * n; ++i) {
      for (int64_t k = 0; k < depth; ++k) {
        const double product = static_cast<double>(a(i / n, k)) * weight(k, i % n);
        out.sum[i] += product;
        out.most[i] += std::abs(product);
      }
    }
    return out;
  }

  // run(c) writes the first m rows of the sums.
  template <class Run>
  void check(const char* name, int m, const Sums& want, const Run& run,
             double relative = sizeof(T) == 8 ? 1e-13 : 1e-5) {
    std::vector<T> c(static_cast<size_t>(m * want.n), T(NAN));
    run(c.data());
    for (int64_t i = 0; i < m * want.n; ++i) {
      if (!(std::abs(c[i] - want.sum[i]) <= relative * want.most[i]) && failed_ == nullptr) {
        failed_ = name;
      }
    }
  }

  // b: w, [depth][width] elements of `pair` steps of k.
  void dense(const MicroKernel<T> (*row_a)[kMaxMr], const MicroKernel<T> (*col_a)[kMaxMr],
             int64_t depth, int pair) {
    for (int nv = 1; nv <= 2; ++nv) {
      const int64_t width = nv * k_.lanes;
      const std::vector<T> b = panel(width, pair == 2 ? DType::kBFloat16 : kAccumulate<T>, pair);
      std::vector<T> copy(b.size());
      TileOptions o;
      const int most = nv == 1 ? k_.mr1 : k_.mr2;
      const Sums want = sums_of(most, width, w);
      for (int m = 1; m <= most; ++m) {
        check("tile, row-major A", m, want, [&](T* c) {
          row_a[nv - 1][m - 1](depth, rows_.data(), b.data(), {c, width, false}, o);
        });
        check("tile, column-major A", m, want, [&](T* c) {
          col_a[nv - 1][m - 1](depth, cols_.data(), b.data(), {c, width, false}, o);
        });
        if (pair == 2 || m > k_.mr2) continue;
        check("copying tile", m, want, [&](T* c) {
          k_.copying_row_a[nv - 1][m - 1](depth, rows_.data(), b.data(), {c, width, false}, o,
                                          copy.data());
        });
        if (copy != b && failed_ == nullptr) failed_ = "copying tile";
      }
    }
  }

  // Columns first and on of w: [kDepth / pair][width][pair] numbers of a type, in elements of T.
  static std::vector<T> panel(int64_t width, DType type, int pair, int64_t first = 0) {
    std::vector<char> bytes(static_cast<size_t>(kDepth * width * dtype_size(type)));
    for (int64_t i = 0; i < kDepth * width; ++i) {
      const int64_t k = i / (width * pair) * pair + i % pair, j = i / pair % width;
      encode(type, w(k, first + j), &bytes[i * dtype_size(type)]);
    }
    std::vector<T> out(bytes.size() / sizeof(T));
    std::memcpy(static_cast<void*>(out.data()), bytes.data(), bytes.size());
    return out;
  }

  void packed_tiles(DType type) {
    const int i = static_cast<int>(type), pair = dtype_size(type) == 2 ? 2 : 1;
    packed(k_.packed.tile[i], k_.packed.streams[i], type, pair, kDepth);
    if (type != DType::kFloat16) return;
    std::vector<T> wide(static_cast<size_t>(kDepth * P_));
    k_.packed.widen_fp16(kDepth, panel(P_, type, pair).data(), wide.data());
    if (wide != panel(P_, kAccumulate<T>, 1) && failed_ == nullptr) failed_ = "widened panel";
  }

  void packed(const typename PackedGemmKernels<T>::Tile* tile,
              const typename PackedGemmKernels<T>::Streams (*streams)[kMaxStreamRows], DType type,
              int pair, int64_t depth) {
    std::vector<T> panels;
    for (int64_t s = 0; s < 4; ++s) {
      const std::vector<T> one = panel(P_, type, pair, s * P_);
      panels.insert(panels.end(), one.begin(), one.end());
    }
    const auto bytes = static_cast<int64_t>(panels.size() * sizeof(T) / 4);
    const Sums want = sums_of(k_.mr2, P_, w);
    for (int m = 1; m <= k_.mr2; ++m) {
      for (const int64_t step : {64, 4}) {  // a prefetch a step, and one for several
        check("packed tile", m, want, [&](T* c) {
          tile[m - 1](depth, packed_.data(), panels.data(), {c, P_, false},
                      {reinterpret_cast<const char*>(panels.data()), 0, step});
        });
      }
      if (m > k_.packed.stream_rows) continue;
      const int64_t n = k_.packed.num_streams[m - 1] * P_;
      const Sums streamed = sums_of(m, n, w);
      for (const bool prefetch : {false, true}) {
        check("packed streams", m, streamed, [&](T* c) {
          T* sums[4] = {c, c + P_, c + 2 * P_, c + 3 * P_};
          streams[prefetch][m - 1](depth, packed_.data(), {panels.data(), bytes, 0},
                                   {sums, n, false});
        });
      }
    }
  }

  // The same with elements that are pairs of bfloat16; and tiles that round their sums.
  void pairs() {
    for (int64_t i = 0; i < kMaxMr; ++i) {
      for (int64_t s = 0; s < kDepth; ++s) {
        const int64_t at = 2 * (s % 2);
        encode(DType::kBFloat16, a(i, s), reinterpret_cast<char*>(&rows_[i * kLda + s / 2]) + at);
        encode(DType::kBFloat16, a(i, s),
               reinterpret_cast<char*>(&packed_[i * kPanelLda + s / 2]) + at);
        encode(DType::kBFloat16, a(i, s), reinterpret_cast<char*>(&cols_[s / 2 * kLdm + i]) + at);
      }
    }
    dense(k_.bf16_row_a, k_.bf16_col_a, kDepth / 2, 2);
    packed(k_.packed.bf16_tile, k_.packed.bf16_streams, DType::kBFloat16, 2, kDepth / 2);
    // Few tokens: weights dense along k, and along features.
    constexpr int64_t kN = 37;
    std::vector<char> along_k(2 * kGemvFeatures * kDepth), along_n(2 * 2 * kOuterRows * kN);
    for (int64_t i = 0; i < kGemvFeatures * kDepth; ++i) {
      encode(DType::kBFloat16, w(i % kDepth, i / kDepth), &along_k[2 * i]);
    }
    for (int64_t i = 0; i < kOuterRows * kN; ++i) {
      encode(DType::kBFloat16, w(i / kN, i % kN), &along_n[2 * i]);
    }
    const Sums tokens = sums_of(k_.gemv.max_tokens, kGemvFeatures, w);
    for (int m = 1; m <= k_.gemv.max_tokens; ++m) {
      check("GEMV of bfloat16", m, tokens, [&](T* c) {
        k_.gemv.run_bf16({DType::kBFloat16, kGemvFeatures, 1, m, kDepth / 2, along_k.data(), 0,
                          kDepth / 2, rows_.data(), kLda, c, kGemvFeatures, 1, 0});
      });
    }
    for (int rows = 1; rows <= kOuterRows; ++rows) {
      const auto weight = [=](int64_t k, int64_t j) { return k < rows ? w(k, j) : T(0); };
      check("outer product of bfloat16", 7, sums_of(7, kN, weight, kOuterRows), [&](T* c) {
        k_.outer.run_bf16(
            {DType::kBFloat16, rows, 7, along_n.data(), kN, rows_.data(), kLda, c, kN, kN, false});
      });
    }
    const std::vector<T> b = panel(P_, DType::kBFloat16, 2);
    const Sums want = sums_of(k_.mr2, P_, w);
    for (int m = 1; m <= k_.mr2; ++m) {
      check(
          "tile to bfloat16", m, want,
          [&](T* c) {
            alignas(64) uint16_t halves[kMaxMr * 32];
            TileOptions o;
            o.bf16_out = true;
            o.stream = m % 2 == 0;
            k_.bf16_col_a[1][m - 1](kDepth / 2, cols_.data(), b.data(),
                                    {reinterpret_cast<T*>(halves), P_, false}, o);
            all_.rows.stream_fence();
            all_.rows.load_row(DType::kBFloat16, halves, c, m * P_, T(1));
          },
          1.0 / 256);
    }
  }

  // Stores past the cache, attention with numbers that are not finite and sticks of many blocks.
  void rare() {
    alignas(64) T line[2][64] = {};
    all_.rows.stream_row(kAccumulate<T>, rows_.data(), line[0], 64);
    all_.rows.stream_fence();
    bool right = std::equal(line[0], line[0] + 64, rows_.data());
    const AttentionKernels<T>& t = all_.attention;
    const int width = k_.lanes;
    right &= t.all_finite(cols_.data(), kLdm);
    std::vector<KeyIndex<T>> first(width, 1), last(width, 5);
    AttentionBlock<T> block = {6, width, true, 0, first.data(), last.data()};
    std::vector<T> s(cols_.begin(), cols_.begin() + 6 * width), again = s;
    const auto seen = [&](int64_t k, int64_t j) {
      return k >= 1 && k < 5 ? s[k * width + j] : T(0);
    };
    check("attention seen_sums", 3, sums_of(3, width, seen, 6), [&](T* c) {
      std::fill_n(c, 3 * width, T(0));
      t.seen_sums(block, cols_.data(), kLdm, s.data(), 3, c);
    });
    std::vector<T> rest(width), same(width);
    right &=
        t.stick(block, s.data(), rest.data()) == t.stick_rest(block, again.data(), same.data());
    again[3] = T(INFINITY);
    right &= rest == same && !t.all_finite(again.data(), 6 * width);
    if constexpr (sizeof(T) == 4) {
      uint8_t codes[kDepth];
      float widened[64] = {}, sums[2] = {};
      const float one = 1, *scale = &one;
      all_.fp8.quantize(packed_.data(), kDepth, codes);
      all_.fp8.decode(codes, widened, kDepth);
      Fp8DotParams p = {1,    1,      kDepth, codes, kDepth, &scale, rows_.data(),
                        kLda, &scale, sums,   1,     1};
      all_.fp8.dot(p);
      p.w = widened;
      p.out = sums + 1;
      all_.fp8.dot_widened(p);
      right &= sums[0] == sums[1] && sums[0] != 0;
    }
    if (!right && failed_ == nullptr) failed_ = "rare operands";
  }

  // Weights q of 8 or 4 bits, of which 32 share a scale of 1 / 16, 1 / 8.
  void quantised(int bits) {
    const QuantKernels& q = all_.quant;
    constexpr int64_t kK = 32, kRow = 64;
    const auto code = [=](int64_t k, int64_t j) {
      return static_cast<int>((k * 29 + j * 13) % (bits == 8 ? 255 : 15)) - (bits == 8 ? 127 : 7);
    };
    const auto weight = [=](int64_t k, int64_t j) { return code(k, j) / (j % 2 ? 8.0 : 16.0); };
    std::vector<uint8_t> codes(static_cast<size_t>(P_ * kRow));
    std::vector<float> scales;
    for (int64_t j = 0; j < P_; ++j) {
      for (int64_t k = 0; k < kK; ++k) {
        uint8_t& byte = codes[j * kRow + k * bits / 8];
        byte = static_cast<uint8_t>(bits == 8 ? code(k, j) : byte | (code(k, j) + 8) << k % 2 * 4);
      }
      scales.push_back(j % 2 ? 1 / 8.0f : 1 / 16.0f);
    }
    std::vector<uint32_t> words(static_cast<size_t>(8 * P_));  // 32 bytes of each row
    const Sums want = sums_of(kMaxMr, P_, weight, kK);
    for (const Activations form : {Activations::kFloat, Activations::kInt16, Activations::kInt8}) {
      const bool int16 = form == Activations::kInt16, int8 = form == Activations::kInt8;
      const QuantTile* tiles = int8    ? q.int8_tile[bits == 4]
                               : int16 ? q.int16_tile
                                       : q.tile[bits == 4];
      if (tiles[0] == nullptr || (int16 && bits == 4)) continue;
      std::vector<float> rows(kMaxMr * kLda);
      for (int64_t i = 0; i < kMaxMr; ++i) {
        float* row = &rows[i * kLda];
        float x[kK];
        for (int64_t k = 0; k < kK; ++k) x[k] = a(i, k);
        if (int16) q.quantize_int16(kK, x, row);
        if (int8) q.quantize_int8(bits, kK, x, row);
        if (form == Activations::kFloat) std::copy_n(x, kK, row);
      }
      q.repack({bits, int8 != (bits == 4), codes.data(), kRow, P_, 0, kK}, words.data());
      const int most = int8 ? q.int8_rows : int16 ? q.int16_rows : k_.mr2;
      for (int m = 1; m <= most; ++m) {
        check(
            "quantised tile", m, want,
            [&](float* c) {
              const float* scale = rows.data() + (int8 ? kInt8Depth / 4 : kKc);
              tiles[m - 1]({1,
                            kK * bits / 32,
                            rows.data(),
                            scale,
                            words.data(),
                            scales.data(),
                            {c, P_, false},
                            nullptr,
                            0});
            },
            int8    ? 5e-3
            : int16 ? 3e-5
                    : 1e-5);
      }
    }
  }

  const Kernels<T>& all_;
  const GemmKernels<T>& k_;
  const int64_t P_;
  std::vector<T> rows_ = std::vector<T>(kMaxMr * kLda), cols_ = std::vector<T>(kDepth * kLdm);
  std::vector<T> packed_ = std::vector<T>(kMaxMr * kPanelLda);
  const char* failed_ = nullptr;
};

}  // namespace

template <class T>
const char* failing_tile(const Kernels<T>& k) {
  return TileTest<T>(k).failed();
}

template const char* failing_tile<float>(const Kernels<float>&);
template const char* failing_tile<double>(const Kernels<double>&);

}  // namespace moe_ops::cpu
