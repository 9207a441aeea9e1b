// Types that every contract header shares. No torch, no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace moe_ops {

// Element types of the floating-point operands. Sums run in fp32, or in fp64 for kFloat64.
enum class DType : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int64_t dtype_size(DType t) {
  return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2;
}

// Returns the type in which operands of type t are summed.
constexpr DType accumulate_type(DType t) {
  return t == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// float8_e4m3fn with scales: columns of a row, and rows of a weight, that share one; the largest
// number; the only NaN but for its sign.
constexpr int64_t kFp8Block = 128;
constexpr float kFp8Max = 448.0f;
constexpr uint8_t kFp8Nan = 0x7f;
// The largest magnitude of a block counts as at least this: its scale, that over 448, is then a
// normal float, and the inverse is finite. A block of zeros gets the smallest scale, 2^-126.
constexpr float kFp8MinAmax = 448.0f * 0x1p-126f;

// Encoding of quantized weights, before scales. Two 4-bit values share a byte, the even k in the
// low nibble, except in kQ4K.
enum class Codes : int {
  kInt8,   // int8
  kInt4,   // 4 bits, without sign; 8, or the zero point of the group, is taken off
  kMxfp4,  // e2m1 of the OCP microscaling formats
  kFp8,    // float8_e4m3fn with a scale per block of rows and columns
  kQ4K,    // ggml's q4_K: 256 codes of 4 bits, 32 bytes of low and high nibbles for each 64
  kQ6K,    // ggml's q6_K: 256 codes of 6 bits, 128 bytes of their low bits, then 64 of the others
  kNvfp4,  // e2m1; scales of e4m3, behind the float of a row that multiplies them
  kE4m3,   // float8_e4m3fn with a scale per row, or per group of a row
};
// Scales as they are stored; kBytes: a record of bytes that belongs to the format.
enum class ScaleType : int { kFloat32, kBFloat16, kFloat16, kBytes };
constexpr int64_t scale_size(ScaleType t) {
  return t == ScaleType::kFloat32 ? 4 : t == ScaleType::kBytes ? 1 : 2;
}

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

// Thread pool of a kernel: run(n, fn, ctx) calls fn(begin, end, ctx) for a partition of [0, n),
// possibly concurrently. The torch adapter passes torch's own pool, so no second one exists.
struct Parallel {
  int num_threads = 1;
  double start_cost = 1;  // of a loop, as a share of what a region of the pool costs
  void (*run)(int64_t n, void (*fn)(int64_t begin, int64_t end, void* ctx), void* ctx) = nullptr;
};

// Contiguous indices as a caller holds them. On the device, kernels pass over values out of range.
struct IndexMap {
  const void* data = nullptr;
  bool is_64 = false;  // int64, otherwise int32
};

// Argument and result types of device launchers; callers need no CUDA header.
namespace cuda {
using Stream = ::CUstream_st*;
using Status = int;  // a cudaError_t; 0: success
}  // namespace cuda

}  // namespace moe_ops
