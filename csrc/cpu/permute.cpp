#include "moe_ops/permute.h"

#include <cstring>

#include "cpu/runtime/parallel.h"

namespace moe_ops::cpu {

void permute(const PermuteParams& p, const Parallel& par) {
  const int64_t size = dtype_size(p.type), bytes = p.hidden_size * size;
  const char* x = static_cast<const char*>(p.x);
  char* rows = static_cast<char*>(p.rows);
  if (bytes == 0) return;
  parallel_range(par, p.num_rows, bytes / 16.0 + 2, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (r < p.num_valid_rows) {
        std::memcpy(rows + r * bytes, x + p.row_to_token[r] * p.x_stride * size, bytes);
      } else {
        std::memset(rows + r * bytes, 0, bytes);
      }
    }
  });
}

}  // namespace moe_ops::cpu
