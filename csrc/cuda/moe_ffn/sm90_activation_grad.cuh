// Epilogue of the backward down projection: u = grad_y w_down, the gradient of h before the routing
// weight, is in the accumulators and goes nowhere. With the pre-activation it gives the gradient of
// the pre-activation, the recomputed h, and <h, u>, the gradient of the routing weight.
#pragma once

#include "cuda/moe_ffn/sm90_activation.cuh"

namespace moe_ops::cuda::sm90 {

// Words that a thread holds of 32 columns: word b is its pair of columns in octet b.
struct Octets {
  uint32_t word[4];
};

// 32 columns of gate and up as they lie in memory: 64 bytes a quad from two places, or interleaved
// 128 bytes from one, of which a thread reads 32, one octet's.
struct RawGateUp {
  uint4 v[2];
};

struct GateUpOctets {
  Octets gate, up;
};

__device__ __forceinline__ GateUpOctets unpack_halves(const RawGateUp& raw) {
  GateUpOctets o;
  o.gate = {{raw.v[0].x, raw.v[0].y, raw.v[0].z, raw.v[0].w}};
  o.up = {{raw.v[1].x, raw.v[1].y, raw.v[1].z, raw.v[1].w}};
  quad_transpose(o.gate.word);
  quad_transpose(o.up.word);
  return o;
}

__device__ __forceinline__ GateUpOctets unpack_joint(const RawGateUp& raw) {
  // (gate, up) of the first and of the second column of each thread of the quad.
  uint32_t first[4] = {raw.v[0].x, raw.v[0].z, raw.v[1].x, raw.v[1].z};
  uint32_t second[4] = {raw.v[0].y, raw.v[0].w, raw.v[1].y, raw.v[1].w};
  quad_transpose(first);
  quad_transpose(second);
  GateUpOctets o;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    o.gate.word[b] = __byte_perm(first[b], second[b], 0x5410);
    o.up.word[b] = __byte_perm(first[b], second[b], 0x7632);
  }
  return o;
}

// Convert octets back; inverses of the functions above.
__device__ __forceinline__ RawGateUp pack_halves(GateUpOctets o) {
  quad_transpose(o.gate.word);
  quad_transpose(o.up.word);
  const auto& g = o.gate.word;
  const auto& u = o.up.word;
  return {{make_uint4(g[0], g[1], g[2], g[3]), make_uint4(u[0], u[1], u[2], u[3])}};
}

__device__ __forceinline__ RawGateUp pack_joint(const GateUpOctets& o) {
  uint32_t first[4], second[4];
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    first[b] = __byte_perm(o.gate.word[b], o.up.word[b], 0x5410);
    second[b] = __byte_perm(o.gate.word[b], o.up.word[b], 0x7632);
  }
  quad_transpose(first);
  quad_transpose(second);
  return {{make_uint4(first[0], second[0], first[1], second[1]),
           make_uint4(first[2], second[2], first[3], second[3])}};
}

template <class Element>
__device__ __forceinline__ uint4 scaled(const uint4& v, float factor) {
  const auto scale = [factor](uint32_t word) {
    const float2 f = unpack<Element>(word);
    return pack<Element>(factor * f.x, factor * f.y);
  };
  return make_uint4(scale(v.x), scale(v.y), scale(v.z), scale(v.w));
}

// Stores 16 bytes of four octets: columns 8 q to 8 q + 7 of `to`, which points to the first of 32
// columns.
__device__ __forceinline__ void store_quad(void* to, uint32_t (&r)[4], bool inside) {
  quad_transpose(r);
  if (inside) *static_cast<uint4*>(to) = make_uint4(r[0], r[1], r[2], r[3]);
}

struct ActivationGrad {
  struct Params {
    const void* preact;   // [rows, P]
    void* dpre;           // [rows, P] out: the gradient of the pre-activation, or nullptr
    void* dpre_weighted;  // the same times the routing weight, or nullptr
    void* h;              // [rows, I] out, or nullptr
    float* partial;       // [rows, column tiles] out: <h, u> of the tile's columns, or nullptr
    ScaleRows weight;
    bool weight_on_input;  // then dpre and h do not carry the weight
    bool interleaved;
    FusedAct act;
  };

  template <class Config, class Acc>
  __device__ __forceinline__ static void store(const Params& p, const Problem& problem,
                                               const Tile& tile, const Acc& acc, int thread,
                                               unsigned char*) {
    // Values that depend on the thread index are recomputed for each tile: kept through the
    // mainloop, they would leave it too few registers.
    asm volatile("" : "+r"(thread));
    with_family(p.act.family, [&](auto family) {
      store_as<Config, family.value>(p, problem.n, tile, acc, thread);
    });
  }

 private:
  // A thread's place in the tile: 32 columns of one row.
  struct Place {
    bool row_inside, inside;
    int64_t pre;  // elements to its first one in a [rows, P] matrix
    int64_t h;    // and in a [rows, I] one
  };

  template <class Config>
  __device__ __forceinline__ static Place place(const Tile& tile, int cols, bool gated,
                                                bool interleaved, int thread, int m, int i, int g) {
    const int64_t row = tile.row0 + output_row<Config>(thread, m) + 8 * i;
    const int col = tile.col0 + 8 * (thread % 4) + 32 * g;
    Place at;
    at.row_inside = row < tile.row_end;
    at.inside = at.row_inside && col < cols;
    at.h = row * cols + col;
    at.pre = !gated ? at.h : interleaved ? 2 * at.h : at.h + row * cols;
    return at;
  }

  // Loads with ordinary loads, which stay behind the stores of earlier steps, so that the loads of
  // one step are in flight at a time; those of all steps would not fit the registers.
  template <class Element>
  __device__ __forceinline__ static RawGateUp load(const Element* pre, const Place& at, int up_at,
                                                   bool gated) {
    RawGateUp raw = {};
    if (at.inside) {
      raw.v[0] = *reinterpret_cast<const uint4*>(pre + at.pre);
      if (gated) raw.v[1] = *reinterpret_cast<const uint4*>(pre + at.pre + up_at);
    }
    return raw;
  }

  template <class Element>
  __device__ __forceinline__ static void write(Element* to, const RawGateUp& raw, const Place& at,
                                               int up_at, bool gated) {
    if (!at.inside) return;
    *reinterpret_cast<uint4*>(to + at.pre) = raw.v[0];
    if (gated) *reinterpret_cast<uint4*>(to + at.pre + up_at) = raw.v[1];
  }

  template <class Config, ActFamily family, class Acc>
  __device__ __forceinline__ static void store_as(const Params& p, int cols, const Tile& tile,
                                                  const Acc& acc, int thread) {
    using T = Traits<Config>;
    using Element = typename Config::Element;
    using cute::make_coord;
    const bool gated = family == ActFamily::kSwiglu || p.act.gated;
    const bool joint = gated && p.interleaved;
    const int up_at = joint ? 8 : cols;  // elements from a thread's first 16 bytes to its second
    const auto* preact = static_cast<const Element*>(p.preact);
    constexpr int kGroups = T::kN / 32, kSteps = T::kRowsM * 2 * kGroups;
    const auto place_of = [&](int step) {
      return place<Config>(tile, cols, gated, p.interleaved, thread, step / kGroups / 2,
                           step / kGroups % 2, step % kGroups);
    };
    RawGateUp next = load(preact, place_of(0), up_at, gated);
    float weight = 1.f, dot = 0.f;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int m = step / kGroups / 2, i = step / kGroups % 2, g = step % kGroups;
      const Place at = place_of(step);
      const RawGateUp raw = next;
      if (step + 1 < kSteps) next = load(preact, place_of(step + 1), up_at, gated);
      if (g == 0) {
        const int row = tile.row0 + output_row<Config>(thread, m) + 8 * i;
        weight = p.weight.data != nullptr && at.row_inside ? p.weight.at(row) : 1.f;
        dot = 0.f;
      }
      const float factor = p.weight_on_input ? 1.f : weight;
      if (tile.col0 + 32 * g < cols) {  // as in sm90_activation.cuh
        const GateUpOctets pre = joint ? unpack_joint(raw) : unpack_halves(raw);
        Octets h;
        GateUpOctets grad;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const float2 gate = unpack<Element>(pre.gate.word[b]);
          const float2 up = unpack<Element>(pre.up.word[b]);
          const float u0 = acc(make_coord(0, i, 4 * g + b), m, 0);
          const float u1 = acc(make_coord(1, i, 4 * g + b), m, 0);
          const ActGrads<float> a0 = fused_backward<family>(p.act, gate.x, up.x, u0);
          const ActGrads<float> a1 = fused_backward<family>(p.act, gate.y, up.y, u1);
          dot = fmaf(a1.h, u1, fmaf(a0.h, u0, dot));
          h.word[b] = pack<Element>(factor * a0.h, factor * a1.h);
          grad.gate.word[b] = pack<Element>(factor * a0.gate, factor * a1.gate);
          grad.up.word[b] = pack<Element>(factor * a0.up, factor * a1.up);
        }
        RawGateUp out = joint ? pack_joint(grad) : pack_halves(grad);
        if (p.dpre != nullptr) write(static_cast<Element*>(p.dpre), out, at, up_at, gated);
        if (p.dpre_weighted != nullptr) {
          // A quad's words are of one row, so they can be scaled as they are.
          out = {{scaled<Element>(out.v[0], weight), scaled<Element>(out.v[1], weight)}};
          write(static_cast<Element*>(p.dpre_weighted), out, at, up_at, gated);
        }
        if (p.h != nullptr) store_quad(static_cast<Element*>(p.h) + at.h, h.word, at.inside);
      }
      if (g == kGroups - 1 && p.partial != nullptr) {
        // Columns past the last one hold u = 0 and h = act(0) = 0.
        dot += __shfl_xor_sync(~0u, dot, 1);
        dot += __shfl_xor_sync(~0u, dot, 2);
        const int64_t row = tile.row0 + output_row<Config>(thread, m) + 8 * i;
        const int tiles = (cols + T::kN - 1) / T::kN;
        if (thread % 4 == 0 && at.row_inside) p.partial[row * tiles + tile.col0 / T::kN] = dot;
      }
    }
  }
};

}  // namespace moe_ops::cuda::sm90
