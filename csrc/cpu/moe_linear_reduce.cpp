#include "moe_ops/moe_linear_reduce.h"

#include "cpu/gemm/gemm.h"

namespace moe_ops::cpu {

namespace {

template <class T>
void run(const MoeLinearReduceBwdParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
  const int64_t D = p.in_features;
  const T* u = static_cast<const T*>(p.u);
  const T* weights = static_cast<const T*>(p.row_weights);
  for (int64_t e = 0; e < p.num_experts; ++e) {
    const int64_t begin = p.expert_offsets[e];
    parallel_range(par, p.expert_offsets[e + 1] - begin, D / 4.0 + 2, [&](int64_t b, int64_t n) {
      T* grad = scratch<T>(Scratch::kTile, D);
      for (int64_t r = begin + b; r < begin + n; ++r) {
        const int64_t slot = p.row_to_slot[r];
        if (p.grad_topk_weights != nullptr) {
          T g = k.dot_row(p.h.type, row_of(p.h, r), kAccumulate<T>, u + r * D, D);
          if (p.bias.data != nullptr) {
            g += k.dot_row(p.bias.type, element(p.bias.data, p.bias.type, e * p.bias.stride_e),
                           p.grad_y.type, row_of(p.grad_y, r), p.hidden_size);
          }
          static_cast<T*>(p.grad_topk_weights)[slot] = g;
        }
        if (p.grad_h != nullptr) {
          k.load_row(kAccumulate<T>, u + r * D, grad, D, weights[r]);
          k.store_row(p.h.type, grad,
                      static_cast<char*>(p.grad_h) + slot * D * dtype_size(p.h.type), D);
        }
      }
    });
  }
}

}  // namespace

void moe_linear_reduce_bwd(const MoeLinearReduceBwdParams& p, const Parallel& par) {
  p.h.type == DType::kFloat64 ? run<double>(p, par) : run<float>(p, par);
}

}  // namespace moe_ops::cpu
