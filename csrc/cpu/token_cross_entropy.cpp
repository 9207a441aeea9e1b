#include "moe_ops/token_cross_entropy.h"

#include <cmath>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace moe_ops::cpu {

namespace {

template <class T>
void run(const TokenCrossEntropyParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
  const int64_t V = p.vocab, size = dtype_size(p.type);
  const bool direct = p.type == kAccumulate<T>;
  // An exponential is some 16 operations.
  const double cost = static_cast<double>(V) * 2;
  parallel_range(par, p.num_tokens, cost, [&](int64_t begin, int64_t end) {
    T* buffer = scratch<T>(Scratch::kTile, direct ? 0 : V);
    for (int64_t t = begin; t < end; ++t) {
      const char* x = static_cast<const char*>(p.logits) + t * p.stride * size;
      char* grad = static_cast<char*>(p.grad) + t * V * size;
      T* row = direct ? reinterpret_cast<T*>(grad) : buffer;
      T& loss = static_cast<T*>(p.losses)[t];
      const int64_t target = p.targets[t];
      if (target < 0) {
        loss = T(0);
        std::memset(grad, 0, static_cast<size_t>(V * size));
        continue;
      }
      T at;  // The target's logit, widened.
      k.load_row(p.type, x + target * size, &at, 1, T(1));
      T max;
      const T sum = k.softmax_row(p.type, x, V, row, &max);
      loss = std::log(sum) + (max - at);
      row[target] -= T(1);
      if (!direct) k.store_row(p.type, row, grad, V);
    }
  });
}

}  // namespace

void token_cross_entropy(const TokenCrossEntropyParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? run<double>(p, par) : run<float>(p, par);
}

}  // namespace moe_ops::cpu
