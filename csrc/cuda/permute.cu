// permute copies bytes: a warp brings a stretch of a row, four accesses a lane at once. Its
// gradient is unpermute without weights, with the inverse of the map at hand.
#include "cuda/launch.h"
#include "cuda/rows.cuh"
#include "moe_ops/permute.h"
#include "moe_ops/unpermute.h"

namespace moe_ops::cuda {

namespace {

constexpr int kStretch = 4;

struct Args {
  const char* x;
  int64_t x_stride, row_bytes;
  int64_t num_rows, num_slots, top_k;
  const int32_t* expert_offsets;
  int64_t num_experts;
  IndexMap row_to_slot;
  char* rows;
};

template <int Bytes>
__global__ void permute_kernel(const Args a) {
  using Access = Raw<Bytes>;
  const int64_t row = warp_row();
  if (row >= a.num_rows) return;
  int64_t slot = -1;
  if (lane_id() == 0 && row < valid_rows(a.expert_offsets, a.num_experts, a.num_rows)) {
    slot = index_at(a.row_to_slot, row);
  }
  slot = __shfl_sync(kAllLanes, slot, 0);

  const int64_t accesses = a.row_bytes / Bytes, first = lane_access<kStretch>();
  Access values[kStretch] = {};
  if (slot >= 0 && slot < a.num_slots) {
    const auto* from = reinterpret_cast<const Access*>(a.x + slot / a.top_k * a.x_stride);
#pragma unroll
    for (int i = 0; i < kStretch; ++i) {
      if (first + i * kWarp < accesses) values[i] = from[first + i * kWarp];
    }
  }
  auto* to = reinterpret_cast<Access*>(a.rows + row * a.row_bytes);
#pragma unroll
  for (int i = 0; i < kStretch; ++i) {
    if (first + i * kWarp < accesses) to[first + i * kWarp] = values[i];
  }
}

template <int Bytes>
Status launch(const Args& a, Stream stream) {
  const RowGrid g = row_grid(a.num_rows, a.row_bytes / Bytes, kStretch);
  return launch_kernel<permute_kernel<Bytes>>({g.grid, g.block, stream}, a);
}

}  // namespace

Status permute(const PermuteParams& p, Stream stream) {
  const int64_t size = dtype_size(p.type);
  Args a;
  a.x = static_cast<const char*>(p.x);
  a.x_stride = p.x_stride * size;
  a.row_bytes = p.hidden_size * size;
  a.num_rows = p.num_rows;
  a.num_slots = p.num_tokens * p.top_k;
  a.top_k = p.top_k;
  a.expert_offsets = p.expert_offsets;
  a.num_experts = p.num_experts;
  a.row_to_slot = p.row_to_slot;
  a.rows = static_cast<char*>(p.rows);
  if (a.num_rows == 0 || a.row_bytes == 0) return 0;
  const auto fits = [&](int64_t bytes) {
    return rows_aligned(a.x, a.x_stride, bytes) && rows_aligned(a.rows, a.row_bytes, bytes);
  };
  if (fits(16)) return launch<16>(a, stream);
  if (fits(8)) return launch<8>(a, stream);
  if (fits(4)) return launch<4>(a, stream);
  return launch<2>(a, stream);
}

Status permute_bwd(const PermuteBwdParams& p, Stream stream) {
  MOE_TRY(name_targets(p.row_to_slot, p.num_rows, p.num_tokens * p.top_k, p.named, stream));
  UnpermuteParams u;
  u.rows = p.grad_rows;
  u.type = u.y_type = p.type;
  u.row_stride = p.grad_stride;
  u.hidden_size = p.hidden_size;
  u.num_tokens = p.num_tokens;
  u.top_k = p.top_k;
  u.num_rows = p.num_rows;
  u.expert_offsets = p.expert_offsets;
  u.num_experts = p.num_experts;
  u.row_to_slot = p.row_to_slot;
  u.named = p.named;
  u.topk_weights = nullptr;
  u.y = p.grad_x;
  return unpermute(u, stream);
}

}  // namespace moe_ops::cuda
