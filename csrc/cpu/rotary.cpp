#include "moe_ops/rotary.h"

#include <algorithm>

#include "cpu/gemm/blocking.h"
#include "cpu/kernels/kernels.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"

namespace moe_ops::cpu {

namespace {

template <class T>
void run(const RotaryParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
  const int64_t n = p.heads * 2 * p.half, size = dtype_size(p.type);
  const T sign = p.inverse ? T(-1) : T(1);
  const bool direct = p.type == kAccumulate<T>;
  const int64_t most =
      direct ? p.num_tokens : std::max<int64_t>(1, kRotaryWide / std::max(n, int64_t{1}));
  parallel_range(
      par, p.batch * p.num_tokens, static_cast<double>(n) / 4 + 4, [&](int64_t begin, int64_t end) {
        ScratchScope scratch;
        T* const buffer = scratch.take<T>(Scratch::kTile, direct ? 1 : most * n);
        for (int64_t i = begin; i < end;) {
          const int64_t b = i / p.num_tokens, s = i % p.num_tokens;
          const int64_t rows = std::min({most, end - i, p.num_tokens - s});
          const char* const in =
              static_cast<const char*>(p.t) + (b * p.stride_batch + s * p.stride_token) * size;
          char* const out = static_cast<char*>(p.out) + i * n * size;
          const int64_t angle = b * p.angles_stride_batch + s * p.half;
          const T *cos = static_cast<const T*>(p.cos) + angle,
                  *sin = static_cast<const T*>(p.sin) + angle;
          if (direct) {
            k.rotate_rows(rows, reinterpret_cast<const T*>(in), p.stride_token, cos, sin, sign,
                          p.heads, p.half, reinterpret_cast<T*>(out), n);
          } else {
            k.load_rows(p.type, in, p.stride_token, rows, n, buffer, n, T(1));
            k.rotate_rows(rows, buffer, n, cos, sin, sign, p.heads, p.half, buffer, n);
            k.store_rows(p.type, buffer, n, rows, n, out, n);
          }
          i += rows;
        }
      });
}

}  // namespace

void rotary(const RotaryParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? run<double>(p, par) : run<float>(p, par);
}

}  // namespace moe_ops::cpu
