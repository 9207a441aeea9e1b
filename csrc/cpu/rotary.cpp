#include "moe_ops/rotary.h"

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace moe_ops::cpu {

namespace {

// Half a head is often less than a vector of the higher levels (8 floats at d = 16), so rows of all
// heads are converted at those levels and turned by the compiler's own vectors here.
template <class T>
void turn(T* row, const T* cos, const T* sin, T sign, int64_t heads, int64_t half) {
  for (int64_t h = 0; h < heads; ++h) {
    T *a = row + 2 * h * half, *b = a + half;
    for (int64_t i = 0; i < half; ++i) {
      const T x = a[i], y = b[i], s = sign * sin[i];
      a[i] = x * cos[i] - y * s;
      b[i] = y * cos[i] + x * s;
    }
  }
}

template <class T>
void run(const RotaryParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
  const int64_t n = p.heads * 2 * p.half, size = dtype_size(p.type);
  const T sign = p.inverse ? T(-1) : T(1);
  const bool direct = p.type == kAccumulate<T>;
  parallel_range(par, p.batch * p.num_tokens, static_cast<double>(n) / 2 + 4,
                 [&](int64_t begin, int64_t end) {
                   T* buffer = scratch<T>(Scratch::kTile, n);
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t b = i / p.num_tokens, s = i % p.num_tokens;
                     const int64_t from = b * p.stride_batch + s * p.stride_token;
                     const int64_t angle = b * p.angles_stride_batch + s * p.half;
                     char* out = static_cast<char*>(p.out) + i * n * size;
                     T* row = direct ? reinterpret_cast<T*>(out) : buffer;
                     k.load_row(p.type, static_cast<const char*>(p.t) + from * size, row, n, T(1));
                     turn(row, static_cast<const T*>(p.cos) + angle,
                          static_cast<const T*>(p.sin) + angle, sign, p.heads, p.half);
                     if (!direct) k.store_row(p.type, row, out, n);
                   }
                 });
}

}  // namespace

void rotary(const RotaryParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? run<double>(p, par) : run<float>(p, par);
}

}  // namespace moe_ops::cpu
