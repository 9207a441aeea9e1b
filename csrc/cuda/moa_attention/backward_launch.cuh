// Workspace and launches of the generic backward kernels.
#pragma once

#include "cuda/moa_attention/backward_kernel.cuh"

namespace moe_ops::cuda::attention {

// Computes <grad_out, out> - grad_state of all rows.
template <class S>
Status launch_delta(const BackwardLaunch& launch, Stream stream) {
  const MoaAttentionParams& p = launch.b.fwd;
  return launch_items<moa_attention_delta_kernel<S>>(
      launch, ceil_div<int64_t>(heads_of(p) * rows_of(p), 4), 128, 0, stream);
}

// Lengths of the sticks of a band.
template <class S, int kTileRows>
Status launch_sticks(BackwardLaunch launch, int64_t blocks, Stream stream) {
  using B = Backward<S, kTileRows>;
  const MoaAttentionParams& p = launch.b.fwd;
  launch.q_aligned = aligned(p.q, p.type);
  launch.k_aligned = aligned(p.k, p.type);
  return launch_items<moa_attention_sticks_kernel<S, kTileRows>>(
      launch, blocks, B::kThreads, B::tile_bytes(p.head_size, 2), stream);
}

template <class S, AttentionKind kKind, int kTileRows>
Status launch_backward(const MoaAttentionBwdParams& b, Stream stream) {
  using B = Backward<S, kTileRows>;
  const MoaAttentionParams& p = b.fwd;
  const BackwardSpace space(p);
  BackwardLaunch launch = backward_launch(b, space);
  launch.chunks = static_cast<int>(ceil_div<int64_t>(p.head_size, B::kColumns));
  launch.q_aligned = aligned(p.q, p.type);
  launch.k_aligned = aligned(p.k, p.type);
  launch.v_aligned = aligned(p.v, p.type);
  launch.grad_aligned = aligned(b.grad_out, p.type);
  const int64_t heads = heads_of(p);
  if constexpr (kKind == AttentionKind::kSoftmax) MOE_TRY(launch_delta<S>(launch, stream));
  // Without rows the keys' gradients are zero all the same.
  for (int64_t band = 0; band == 0 || band < space.row_tiles; band += space.band_tiles) {
    take_band(launch, space, band);
    const int64_t blocks = space.row_tiles > 0 ? heads * space.band_tiles : 0;
    if constexpr (kKind == AttentionKind::kStickBreaking) {
      MOE_TRY((launch_sticks<S, kTileRows>(launch, blocks, stream)));
    }
    MOE_TRY((launch_items<moa_attention_grad_q_kernel<S, kKind, kTileRows>>(
        launch, blocks * launch.chunks, B::kThreads, B::tile_bytes(p.head_size, 4), stream)));
    MOE_TRY((launch_items<moa_attention_grad_kv_kernel<S, kKind, kTileRows>>(
        launch, heads * space.key_tiles * launch.chunks, B::kThreads,
        B::shared_bytes_kv(p.head_size), stream)));
  }
  return 0;
}

template <class S, AttentionKind kKind>
Status generic_backward(const MoaAttentionBwdParams& b, Stream stream) {
  constexpr int kNarrow = backward_tile(kTypeOf<S>, 1).rows;
  constexpr int kWide = backward_tile(kTypeOf<S>, kMaxHeadSize).rows;
  return backward_tile(b.fwd.type, b.fwd.head_size).rows == kNarrow
             ? launch_backward<S, kKind, kNarrow>(b, stream)
             : launch_backward<S, kKind, kWide>(b, stream);
}

}  // namespace moe_ops::cuda::attention
