// A warp a token; experts are taken out one at a time, best first, until they gather top_p of the
// probability. Slot k is lane k % 32's; a full batch of 32 goes to the outputs, from where the same
// lane takes it again if the weights are to be renormalized.
#include "cuda/launch.h"
#include "cuda/router_row.cuh"
#include "moe_ops/topp_router.h"

namespace moe_ops::cuda {

namespace {

template <class Row>
__global__ void topp_router_kernel(const ToppRouterParams p, void* workspace) {
  using T = typename Row::Value;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const T top_p = static_cast<T>(p.top_p), scale = static_cast<T>(p.routed_scaling_factor);
  Key<T>* const keys =
      static_cast<Key<T>*>(workspace) + (Row::kInRegisters ? 0 : router_warp() * p.num_experts);

  for (int64_t t = router_warp(); t < p.num_tokens; t += router_step()) {
    Row row;
    row.load(row_source(p.router_logits, p.type, p.logits_stride, t, p.num_experts), keys);
    const Softmax<T> softmax = softmax_of(row);
    row.make_keys(nullptr, [](T x) { return x; });

    int32_t* const ids = p.topk_ids + t * p.max_k;
    T* const weights = static_cast<T*>(p.topk_weights) + t * p.max_k;
    Best<T> mine = row.lane_best();
    int64_t n = 0;
    int32_t id = -1;  // of slot n - 1 and the ones before it in the batch, a lane each
    T weight = T(0), total = T(0);
    // Summed in fp64, so that rounding does not ask for one more of many small probabilities.
    double gathered = 0;
    while (n < p.max_k && (n < p.min_k || !(static_cast<T>(gathered) >= top_p))) {
      const int place = static_cast<int>(n % kWarp);
      if (place == 0 && n > 0) {
        ids[n - kWarp + lane] = id;
        weights[n - kWarp + lane] = weight;
      }
      const Best<T> best = warp_best(mine);
      if (row.strike(best.id)) mine = row.lane_best();
      const T probability = softmax(value_of<T>(best.key));
      gathered += static_cast<double>(probability);
      total += probability;
      if (lane == place) {
        id = best.id;
        weight = probability;
      }
      ++n;
    }

    const T divisor = total + T(1e-20);
    const auto finished = [&](T w) { return (p.renormalize ? w / divisor : w) * scale; };
    const int64_t batch = n == 0 ? 0 : (n - 1) / kWarp * kWarp;  // that is still in registers
    for (int64_t k = lane; k < batch; k += kWarp) weights[k] = finished(weights[k]);
    for (int64_t k = batch + lane; k < p.max_k; k += kWarp) {
      ids[k] = k < n ? id : -1;
      weights[k] = k < n ? finished(weight) : T(0);
    }
  }
}

template <class T>
Status route(const ToppRouterParams& p, void* workspace, Stream stream) {
  return with_row<T>(
      p.num_experts, p.num_experts <= register_experts(p.type), [&]<class Row>(Row*) {
        const auto blocks = static_cast<unsigned>(router_blocks(p.num_tokens, Row::kInRegisters));
        return launch_kernel<topp_router_kernel<Row>>({blocks, kRouterWarps * kWarp, stream}, p,
                                                      workspace);
      });
}

}  // namespace

int64_t topp_router_workspace(const ToppRouterParams& p) {
  if (p.num_experts <= register_experts(p.type)) return 0;
  return router_blocks(p.num_tokens, false) * kRouterWarps * p.num_experts *
         dtype_size(accumulate_type(p.type));
}

Status topp_router(const ToppRouterParams& p, void* workspace, Stream stream) {
  if (p.num_tokens == 0) return 0;
  return p.type == DType::kFloat64 ? route<double>(p, workspace, stream)
                                   : route<float>(p, workspace, stream);
}

}  // namespace moe_ops::cuda
