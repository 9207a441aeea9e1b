// The half of the self-test that calls products.
#include "cpu/isa/self_test.h"

#include <cmath>
#include <utility>

#include "cpu/gemm/gemm.h"

namespace moe_ops::cpu {

namespace {

constexpr Parallel kAlone;

// Products C = A W^T. Those of A [kRows, kDepth] and W [kFeatures, kDepth] have sums that fp32
// holds exactly.
constexpr int64_t kRows = 48, kFeatures = 128, kDepth = 70;
constexpr int64_t kWidth = 35;  // vectors, one that is alone, and features that fill none
float a_at(int64_t r, int64_t k) { return number(3 * r + 7 * k + r * k); }
float w_at(int64_t j, int64_t k) { return number(1000 + 5 * j + 11 * k + j * k); }

// By definition, of elements a(r, k) and w(j, k).
struct Right {
  template <class A, class W>
  Right(int64_t rows, int64_t features, int64_t depth, const A& a, const W& w)
      : ld(features), c(rows * features) {
    std::vector<float> column(features);
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < features; ++j) column[j] = w(j, k);
      for (int64_t r = 0; r < rows; ++r) {
        const float x = a(r, k);
        for (int64_t j = 0; j < features; ++j) c[r * features + j] += x * column[j];
      }
    }
  }
  int64_t ld;
  std::vector<float> c;
};

template <class T>
class Products {
 public:
  Products(const Kernels<T>& kernels, DType type, bool poison)
      : all_(kernels), k_(kernels.gemm), type_(type), poison_(poison) {}

  const char* failing() {
    static const Right right(kRows, kFeatures, kDepth, a_at, w_at);
    right_ = &right;
    algorithms<Wide>();
    if (type_ == kAccumulate<T>) tiles<Wide>();
    if constexpr (sizeof(T) == 4) {
      if (type_ == DType::kBFloat16 && k_.has_bf16) {
        algorithms<Bf16>();
        tiles<Bf16>();
      }
      for (const int bits : {8, 4}) {
        if (type_ == DType::kFloat32) integers(bits);
      }
      if (type_ == DType::kFloat32) doubled_e2m1();
    }
    return failed_;
  }

 private:
  // Checks a product; run(c) writes its rows [0, m) and features [0, n).
  template <class Run>
  void check(const char* name, int64_t m, int64_t n, const Run& run, double tolerance = 0) {
    alignas(64) T c[kRows * kFeatures];
    std::fill(c, c + m * n, T(NAN));
    if (poison_) poison_scratch(size_t{1} << 16);
    run(c);
    for (int64_t i = 0; i < m * n; ++i) {
      const double error = std::abs(c[i] - right_->c[i / n * right_->ld + i % n]);
      if (!(error <= tolerance) && failed_ == nullptr) failed_ = name;
    }
  }

  // Checks a product with an algorithm, for row counts from `first` to `last`.
  void product(const char* name, const GemmConfig& config, const GemmDesc<T>& d, int64_t first,
               int64_t last, int64_t n, double tolerance = 0) {
    for (int64_t m = first; m <= last; ++m) {
      const auto run = [&](T* c) {
        run_item(d, k_, {config, 0, 0, m, 0, n}, nullptr,
                 [&](int64_t, int64_t r, int64_t f, int64_t count, const T* sums, T*) {
                   std::copy_n(sums, count, c + r * n + f);
                 });
      };
      check(name, m, n, run, tolerance);
    }
  }
  GemmDesc<T> desc(int64_t features, int64_t depth, const void* a, const ExpertMatrices& b) const {
    GemmDesc<T> d;
    d.num_experts = 1;
    d.features = features;
    d.in_features = depth;
    d.invariant = false;
    d.a = {a, type_, depth};
    d.b = b;
    return d;
  }

  template <class Op>
  void algorithms() {
    const std::vector<char> a = matrix(type_, kRows, kDepth, a_at);
    const std::vector<char> w = matrix(type_, kFeatures, kDepth, w_at);
    const std::vector<char> columns = w_columns(1);
    const auto run = [&](const char* name, Algorithm algorithm, const ExpertMatrices& b,
                         int64_t last, int64_t width = kWidth, int64_t first = 1) {
      GemmConfig config{algorithm, Op::kBf16 ? Operand::kBf16 : Operand::kWide};
      config.depth = kKc;
      config.one_run = width == kFeatures;
      product(name, config, desc(kFeatures, kDepth, a.data(), b), first, last, width);
    };
    ExpertMatrices b = {columns.data(), type_, 0, 1, kFeatures};
    run("outer product", Algorithm::kOuter, b, 3);
    if (!Op::kBf16) run("outer product, one run", Algorithm::kOuter, b, kOneRunRows, kFeatures);
    run("tile, packed B", Algorithm::kRowMajorB, b, 2);
    if (type_ == kAccumulate<T>) {  // as it lies, and copied on the way
      run("tile, row-major B", Algorithm::kRowMajorB, b, 3 * k_.mr2, 3 * k_.lanes, 3 * k_.mr2);
    }
    b = {w.data(), type_, 0, kDepth, 1};
    run("GEMV", Algorithm::kGemv, b, k_.gemv.max_tokens + 1);
    run("blocked GEMV", Algorithm::kGemvBlocked, b, k_.blocked_gemv.max_tokens + 1);
    run("tile, packed B^T", Algorithm::kPackBt, b, 2);
    std::vector<char> panels(packed_expert_bytes(type_, kFeatures, kDepth, 1) + 64);
    void* aligned = panels.data() + (64 - reinterpret_cast<uintptr_t>(panels.data()) % 64);
    pack_panels(b, 1, kFeatures, kDepth, 1, aligned, kAlone);
    b.panels = aligned;
    // Numbers of the table choose: streams with and without prefetches, tiles of few rows, and of
    // panels that are widened first.
    const PackedGemmKernels<T> tuned = k_.packed;
    for (const int64_t bytes : {int64_t{0}, Tuning::kNoLimit}) {
      k_.packed.stream_min_bytes = bytes;
      run("packed streams", Algorithm::kPackedB, b, tuned.stream_rows, kFeatures);
    }
    k_.packed.stream_rows = 0;
    run("packed tile", Algorithm::kPackedB, b, k_.mr2);
    k_.packed.widen_tiles = 1;
    if (type_ == DType::kFloat16) run("widened panel", Algorithm::kPackedB, b, 1);
    k_.packed = tuned;
  }

  // Checks tiles of every size on operands in cache; tiles of whole lines also with non-temporal
  // stores.
  template <class Op>
  void tiles() {
    const int64_t depth = kDepth / Op::kSteps;
    const std::vector<char> a_rows = matrix(type_, kMaxMr, Op::kSteps * kLda, a_at);
    const std::vector<char> columns = a_columns(Op::kSteps), w = w_columns(Op::kSteps);
    const T *rows = data(a_rows), *a = data(columns), *b = data(w);
    std::vector<T> copy(kDepth * 2 * k_.lanes);
    TileOptions as_it_lies, packed;
    as_it_lies.ldb = kFeatures;
    for (int nv = 1; nv <= 2; ++nv) {
      const int64_t n = nv * k_.lanes;
      const auto &row_tiles = Op::row_a(k_)[nv - 1], &column_tiles = Op::col_a(k_)[nv - 1];
      for (int m = 1; m <= (nv == 1 ? k_.mr1 : k_.mr2); ++m) {
        check("tile, row-major A", m, n,
              [&](T* c) { row_tiles[m - 1](depth, rows, b, {c, n, false}, as_it_lies); });
        check("tile, column-major A", m, n,
              [&](T* c) { column_tiles[m - 1](depth, a, b, {c, n, false}, as_it_lies); });
        if (m > k_.mr2) continue;
        if constexpr (!Op::kBf16) {
          check("copying tile", m, n, [&](T* c) {
            k_.copying_row_a[nv - 1][m - 1](depth, rows, b, {c, n, false}, as_it_lies, copy.data());
          });
          check("copying tile", m, n,
                [&](T* c) { row_tiles[m - 1](depth, rows, copy.data(), {c, n, false}, packed); });
        }
        if (nv == 1) continue;
        const auto run = [&](T* c) {
          TileOptions o = as_it_lies;
          o.stream = true;
          o.bf16_out = Op::kBf16;
          alignas(64) uint16_t halves[kMaxMr * 32];
          T* out = Op::kBf16 ? reinterpret_cast<T*>(halves) : c;
          column_tiles[m - 1](depth, a, b, {out, n, false}, o);
          all_.rows.stream_fence();
          if (Op::kBf16) all_.rows.load_row(DType::kBFloat16, halves, c, m * n, T(1));
        };
        check("tile past the cache", m, n, run, Op::kBf16 ? kHalfError : 0);
      }
    }
    const std::vector<T> row(right_->c.begin(), right_->c.begin() + kFeatures);
    check("row past the cache", 1, kFeatures, [&](T* c) {
      all_.rows.stream_row(kAccumulate<T>, row.data(), c, kFeatures);
      all_.rows.stream_fence();
    });
  }

  // Checks weights of 8 and 4 bits. Activations of 8 bits are exact: each 32 have a 127 / 64 among
  // them.
  void integers(int bits) {
    constexpr int64_t K = 256, N = 35, kGroup = 32;
    const bool eight = bits == 8;
    const int64_t groups = eight ? 1 : K / kGroup;
    const QuantKernels& q = all_.quant;
    std::vector<uint8_t> codes(N * K);
    std::vector<float> scales(N * groups);
    const auto a = [](int64_t r, int64_t k) { return k % 32 == 0 ? 127 / 64.0f : a_at(r, k); };
    const Right right(kMaxMr, N, K, a, [&](int64_t j, int64_t k) {
      const auto code =
          static_cast<int>((k * 29 + j * 13) % (eight ? 255 : 15) - (eight ? 127 : 7));
      uint8_t& byte = codes[(j * K + k) * bits / 8];
      byte = static_cast<uint8_t>(eight ? code : byte | (code + 8) << k % 2 * 4);
      float& scale = scales[j * groups + (eight ? 0 : k / kGroup)];
      scale = (j + (eight ? 0 : k / kGroup)) % 2 == 0 ? 1 / 8.0f : 1 / 16.0f;
      return static_cast<float>(code) * scale;
    });
    const std::vector<char> x = matrix(type_, kMaxMr, K, a);
    ExpertMatrices b = {codes.data(), type_, 0, K, 1};
    b.quant = {bits, K / groups, scales.data(), 0, groups};
    b.quant.codes = eight ? Codes::kInt8 : Codes::kInt4;
    b.quant.scales = scales.data();
    const Right* other = std::exchange(right_, &right);
    const auto run = [&](Algorithm algorithm, Operand operand, int64_t last) {
      product(eight ? "product with int8" : "product with int4", {algorithm, operand},
              desc(N, K, x.data(), b), 1, last, N, operand == Operand::kInt16 ? 0.05 : 0);
    };
    run(Algorithm::kGemv, eight ? Operand::kInt16 : Operand::kInt8, k_.gemv.max_tokens + 1);
    if (q.tile[bits == 4][0] != nullptr) run(Algorithm::kRepackB, Operand::kWide, k_.mr2);
    if (eight && q.quantize_int16 != nullptr) {
      run(Algorithm::kRepackB, Operand::kInt16, q.int16_rows);
    }
    if (q.int8_tile[bits == 4][0] != nullptr) {
      run(Algorithm::kRepackB, Operand::kInt8, q.int8_rows);
      if (!eight) run(Algorithm::kRepackB, Operand::kTwoInt8, q.int8_rows);
      b.quant.has_kernels = false;
      run(Algorithm::kRepackB, Operand::kInt8, 1);
    }
    run(Algorithm::kDequant, Operand::kWide, 2);
    run(Algorithm::kGemv, Operand::kDecoded, k_.gemv.max_tokens);
    right_ = other;
  }

  // Checks the tiles of mxfp4, like integers().
  void doubled_e2m1() {
    constexpr int64_t K = 128, N = 35;
    if (all_.quant.int8_tile[2][0] == nullptr) return;
    constexpr float kValues[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    std::vector<uint8_t> codes(N * K / 2), scales(N * K / kQuantBlock);
    const auto a = [](int64_t r, int64_t k) { return k % 32 == 0 ? 127 / 64.0f : a_at(r, k); };
    const Right right(kMaxMr, N, K, a, [&](int64_t j, int64_t k) {
      const auto code = static_cast<int>((k * 29 + j * 13) % 15);
      uint8_t& byte = codes[(j * K + k) / 2];
      byte = static_cast<uint8_t>(byte | code << k % 2 * 4);
      uint8_t& scale = scales[(j * K + k) / kQuantBlock];
      scale = (j + k / kQuantBlock) % 2 == 0 ? 124 : 123;
      return std::ldexp(code < 8 ? kValues[code] : -kValues[code - 8], scale - 127);
    });
    const std::vector<char> x = matrix(type_, kMaxMr, K, a);
    ExpertMatrices b = {codes.data(), type_, 0, K, 1};
    b.quant = {4, kQuantBlock, nullptr, 0, K / kQuantBlock};
    b.quant.codes = Codes::kMxfp4;
    b.quant.scale_type = ScaleType::kBytes;
    b.quant.scales = scales.data();
    b.quant.has_kernels = false;
    const Right* other = std::exchange(right_, &right);
    product("product with mxfp4", {Algorithm::kRepackB, Operand::kInt8}, desc(N, K, x.data(), b), 1,
            all_.quant.int8_rows, N, 0);
    right_ = other;
  }

  // Matrices with features or rows dense, `pair` steps of k side by side.
  std::vector<char> a_columns(int64_t pair) const {
    return matrix(type_, kDepth / pair, pair * kLdm,
                  [=](int64_t k, int64_t i) { return a_at(i / pair, k * pair + i % pair); });
  }
  std::vector<char> w_columns(int64_t pair) const {
    return matrix(type_, kDepth / pair, pair * kFeatures,
                  [=](int64_t k, int64_t i) { return w_at(i / pair, k * pair + i % pair); });
  }
  static const T* data(const std::vector<char>& m) { return reinterpret_cast<const T*>(m.data()); }

  static constexpr double kHalfError = 1.0 / 16;  // of sums below 32
  const Kernels<T>& all_;
  GemmKernels<T> k_;
  DType type_;
  bool poison_;
  const Right* right_ = nullptr;
  const char* failed_ = nullptr;
};

}  // namespace

template <class T>
const char* failing_product(const Kernels<T>& kernels, DType type, bool poison) {
  return Products<T>(kernels, type, poison).failing();
}

template const char* failing_product<float>(const Kernels<float>&, DType, bool);
template const char* failing_product<double>(const Kernels<double>&, DType, bool);

}  // namespace moe_ops::cpu
