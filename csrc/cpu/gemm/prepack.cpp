#include "cpu/gemm/prepack.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/gemm/blocking.h"
#include "cpu/kernels/gemm.h"
#include "cpu/runtime/parallel.h"

namespace moe_ops::cpu {

namespace {

// Packs a panel by copying bit patterns, so one function serves all types of a size.
template <class Bits>
void pack_panel(const Bits* w, int64_t stride_o, int64_t stride_k, int64_t features, int64_t K,
                const PanelLayout& layout, int64_t pair, Bits* panel) {
  const int64_t P = layout.width;
  if (layout.panel_bytes > 0 && (features < P || K < layout.depth)) {
    std::memset(panel, 0, static_cast<size_t>(layout.panel_bytes));
  }
  for (int64_t k0 = 0; k0 < K; k0 += kPackDepth) {
    const int64_t k1 = std::min(K, k0 + kPackDepth);
    for (int64_t f = 0; f < features; ++f) {
      const Bits* src = w + f * stride_o;
      Bits* dst = panel + f * pair;
      for (int64_t k = k0; k < k1; ++k) {
        std::memcpy(dst + k / pair * P * pair + k % pair, src + k * stride_k, sizeof(Bits));
      }
    }
  }
}

template <class Bits>
void pack_all(const ExpertMatrices& w, int64_t num_experts, int64_t features, int64_t K,
              const PanelLayout& layout, void* panels, const Parallel& par) {
  const int64_t pair = sizeof(Bits) == 2 ? 2 : 1;
  const int64_t per_expert = layout.count * layout.segments;
  const double cost = static_cast<double>(num_experts * per_expert) * layout.width * K;
  parallel_items(par, num_experts * per_expert, cost, [&](int64_t i) {
    const int64_t e = i / per_expert, panel = i % per_expert / layout.segments;
    const int64_t f = panel * layout.width;
    const Bits* src = static_cast<const Bits*>(w.data) + e * w.stride_e +
                      (i % layout.segments * features + f) * w.stride_o;
    auto* dst = reinterpret_cast<Bits*>(static_cast<char*>(panels) + i * layout.panel_bytes);
    pack_panel(src, w.stride_o, w.stride_k, std::min(layout.width, features - f), K, layout, pair,
               dst);
  });
}

}  // namespace

PanelLayout panel_layout(DType type, int64_t out_features, int64_t in_features, int64_t segments) {
  const bool half = dtype_size(type) == 2;
  PanelLayout layout;
  layout.width =
      2 * (type == DType::kFloat64 ? gemm_kernels<double>().lanes : gemm_kernels<float>().lanes);
  layout.depth = half ? round_up<int64_t>(in_features, 32) : in_features;
  layout.segments = segments;
  layout.count = ceil_div(out_features / segments, layout.width);
  layout.panel_bytes = layout.depth * layout.width * dtype_size(type);
  return layout;
}

void pack_panels(const ExpertMatrices& w, int64_t num_experts, int64_t out_features,
                 int64_t in_features, int64_t segments, void* panels, const Parallel& par) {
  const PanelLayout layout = panel_layout(w.type, out_features, in_features, segments);
  const int64_t features = out_features / segments;
  switch (dtype_size(w.type)) {
    case 8:
      return pack_all<uint64_t>(w, num_experts, features, in_features, layout, panels, par);
    case 4:
      return pack_all<uint32_t>(w, num_experts, features, in_features, layout, panels, par);
    default:
      return pack_all<uint16_t>(w, num_experts, features, in_features, layout, panels, par);
  }
}

int64_t packed_expert_bytes(DType type, int64_t out_features, int64_t in_features,
                            int64_t segments) {
  return panel_layout(type, out_features, in_features, segments).expert_bytes();
}

namespace {

std::atomic<int64_t> stale{0};

// Elements of the weights of an expert, and where its panels hold them: one of every 20th part of
// its features and of its depth, others at every call. Neighbors are less than 5/4 of a part
// apart, so a write over a 16th of either is found at once, and one to scattered elements with a
// probability that grows from call to call. Rows of weights are in pages of their own, and looking
// those up is what an element costs.
constexpr int64_t kMatchSamples = 20;
struct PanelSamples {
  const PackedWeight* owner = nullptr;
  int64_t count = 0, size = 0;  // size: bytes of an element
  const char *packed[kMatchSamples], *source[kMatchSamples];
};

template <class Bits>
bool all_equal(const char* const* a, const char* const* b) {
  bool same = true;
  for (int64_t i = 0; i < kMatchSamples; ++i) {
    Bits x, y;
    std::memcpy(&x, a[i], sizeof(Bits));
    std::memcpy(&y, b[i], sizeof(Bits));
    same &= x == y;
  }
  return same;
}

// Chooses elements of expert e and prefetches their cache lines.
PanelSamples sample_panels(const PackedWeight& p, int64_t e) {
  const ExpertMatrices& w = *p.w;
  const int64_t out_features = p.out_features, in_features = p.in_features;
  const int64_t segments = p.segments;
  const PanelLayout layout = panel_layout(w.type, out_features, in_features, segments);
  const int64_t size = dtype_size(w.type), pair = size == 2 ? 2 : 1;
  const int64_t features = out_features / segments;
  PanelSamples out;
  out.owner = &p;
  out.size = size;
  if (features == 0 || in_features == 0) return out;
  out.count = kMatchSamples;
  // Powers of two: a division would cost as much as a cache miss.
  const int width_bits = __builtin_ctzll(static_cast<uint64_t>(layout.width)), pair_bit = size == 2;
  const char* base = static_cast<const char*>(w.panels) + e * layout.expert_bytes();
  static std::atomic<uint32_t> calls{0};
  uint64_t random =
      calls.fetch_add(1, std::memory_order_relaxed) * uint64_t{0x9e3779b97f4a7c15} + 1;
  const auto shift = static_cast<int64_t>(random >> 48);
  const auto next = [&random] {
    return random = random * 6364136223846793005u + 1442695040888963407u;
  };
  // A place in part i of n that is cut in 20: the same place in all parts, in their first three
  // quarters, and up to a quarter of a part further. Fractions have 24 bits.
  const auto place = [](int64_t n, int64_t i, uint64_t common, uint64_t own) {
    const uint64_t part = (static_cast<uint64_t>(i) << 24) + common * 3 / 4 + own / 4;
    return static_cast<int64_t>(static_cast<uint64_t>(n) * part / kMatchSamples >> 24);
  };
  const uint64_t common = next();
  for (int64_t i = 0; i < kMatchSamples; ++i) {
    const uint64_t own = next();
    const int64_t o = place(out_features, i, common >> 40, own >> 40);
    // 13 and 20 have no common divisor: all parts of the depth, in another order than the
    // features'.
    const int64_t k = place(in_features, (i * 13 + shift) % kMatchSamples, common >> 16 & 0xffffff,
                            own >> 16 & 0xffffff);
    int64_t s = 0, f = o;
    for (; f >= features; f -= features) ++s;
    const int64_t panel = (f >> width_bits) * layout.segments + s;
    const int64_t column = f & (layout.width - 1), step = k >> pair_bit;
    out.packed[i] = base + panel * layout.panel_bytes +
                    (((step << width_bits) + column) * pair + (k & (pair - 1))) * size;
    out.source[i] = static_cast<const char*>(w.data) +
                    (e * w.stride_e + o * w.stride_o + k * w.stride_k) * size;
    __builtin_prefetch(out.packed[i]);
    __builtin_prefetch(out.source[i]);
  }
  return out;
}

bool samples_match(const PanelSamples& samples) {
  if (samples.count == 0) return true;
  const bool same = samples.size == 8   ? all_equal<uint64_t>(samples.packed, samples.source)
                    : samples.size == 4 ? all_equal<uint32_t>(samples.packed, samples.source)
                                        : all_equal<uint16_t>(samples.packed, samples.source);
  if (!same) stale.fetch_add(1, std::memory_order_relaxed);
  return same;
}

}  // namespace

void drop_stale_panels(const Routing& routing, std::span<const PackedWeight> weights) {
  // The elements of some experts are under way from memory, two cache misses each, while those of
  // others are compared.
  constexpr int64_t kUnderWay = 4;
  PanelSamples samples[kUnderWay];
  bool fresh[2] = {true, true};
  int64_t taken = 0;
  const auto compare = [&](const PanelSamples& s) {
    if (s.owner != nullptr && !samples_match(s)) fresh[s.owner - weights.data()] = false;
  };
  for (const PackedWeight& w : weights) {
    for (int64_t e = 0; e < routing.num_experts; ++e) {
      if (routing.expert_offsets[e] == routing.expert_offsets[e + 1]) continue;
      PanelSamples& slot = samples[taken++ % kUnderWay];
      compare(slot);
      slot = sample_panels(w, e);
    }
  }
  for (int64_t i = 0; i < std::min(taken, kUnderWay); ++i) compare(samples[i]);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!fresh[i]) weights[i].w->panels = nullptr;
  }
}

int64_t stale_panels() { return stale.load(std::memory_order_relaxed); }

}  // namespace moe_ops::cpu
