#include "moe_ops/rotary.h"

#include "torch/tensor_utils.h"

namespace moe_ops::adapter {

namespace {

// Returns whether the dimensions of `t` from `first` on have the strides of a contiguous tensor.
bool dense_from(const Tensor& t, int64_t first) {
  int64_t stride = 1;
  for (int64_t d = t.dim() - 1; d >= first; --d) {
    if (t.size(d) > 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return true;
}

void check_angles(const Op& op, const char* name, const Tensor& angles, const Tensor& t) {
  check_float(op, name, angles);
  const int64_t dim = angles.dim();
  MOE_CHECK(dim == 2 || dim == 3, op, ": ", name,
            " must be [S, d / 2] or [B, S, d / 2], got shape ", shape_string(angles), ".");
  if (dim == 3) check_size(op, name, angles, 0, t.size(0), "B");
  check_size(op, name, angles, dim - 2, t.size(1), "S");
  check_size(op, name, angles, dim - 1, t.size(t.dim() - 1) / 2, "d / 2");
}

Tensor rotary(const Tensor& t, const Tensor& cos, const Tensor& sin, bool inverse) {
  constexpr const char* kOp = "rotary";
  RotaryParams p;
  p.type = check_float(kOp, "t", t);
  MOE_CHECK(t.dim() >= 3 && t.size(t.dim() - 1) % 2 == 0, kOp,
            ": t must be [B, S, ..., d] with an even d, got shape ", shape_string(t), ".");
  check_angles(kOp, "cos", cos, t);
  check_angles(kOp, "sin", sin, t);
  check_dim(kOp, "sin", sin, cos.dim(), "like cos");
  const ScalarType acc = accumulate_type(t.scalar_type());
  const Tensor src = dense_from(t, 2) ? aligned(t) : dense(t);
  const Tensor c = contiguous_as(cos, acc), s = contiguous_as(sin, acc);
  const auto sizes = t.sizes();
  Tensor out = empty_cpu(kOp, std::vector<int64_t>(sizes.begin(), sizes.end()), t.scalar_type());
  p.t = src.const_data_ptr();
  p.stride_batch = src.stride(0);
  p.stride_token = src.stride(1);
  p.batch = t.size(0);
  p.num_tokens = t.size(1);
  p.heads = 1;
  for (int64_t d = 2; d + 1 < t.dim(); ++d) p.heads *= t.size(d);
  p.half = t.size(t.dim() - 1) / 2;
  p.cos = c.const_data_ptr();
  p.sin = s.const_data_ptr();
  p.angles_stride_batch = cos.dim() == 3 ? p.num_tokens * p.half : 0;
  p.inverse = inverse;
  p.out = out.mutable_data_ptr();
  if (out.numel() > 0) cpu::rotary(p, torch_parallel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ops, CPU, m) { m.impl("rotary", MOE_BOX(rotary)); }

}  // namespace moe_ops::adapter
