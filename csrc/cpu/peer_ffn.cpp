// A token at a time, and in it a slot at a time: every vector of a table is read once a pass, from
// wherever it lies, and nothing of the size of the gathered vectors is written. Vectors are asked
// for some slots before their use, since no hardware foresees where the next one is.
//
// The gradients of the tables are made row by row from the slots of a row, sorted: each is written
// once, past the cache where the table is large.
#include "moe_ops/peer_ffn.h"

#include <algorithm>
#include <cstring>

#include "cpu/gemm/blocking.h"
#include "cpu/kernels/activation.h"
#include "cpu/kernels/rows.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"
#include "moe_ops/sort_by_expert.h"

namespace moe_ops::cpu {

namespace {

// Vectors that are on their way while others are used, and of each of them at most so many bytes:
// what follows, the hardware foresees.
constexpr int64_t kVectorsAhead = 8, kVectorsTogether = 4;
constexpr int64_t kVectorAheadBytes = 4096;

// swiglu_oai's usual ones.
constexpr double kAlpha = 1.702, kLimit = 7.0;

void fetch(const void* vector, int64_t bytes) {
  for (int64_t b = 0, end = std::min(bytes, kVectorAheadBytes); b < end; b += 64) {
    __builtin_prefetch(static_cast<const char*>(vector) + b);
  }
}

const char* row_at(const Rows& rows, int64_t t) {
  return static_cast<const char*>(rows.data) + t * rows.stride * dtype_size(rows.type);
}

// The slots of a token that have an expert, n of them in their order, and their vectors in the
// order of use. A token's numbers are rows of n.
template <class T>
struct TokenSlots {
  const PeerFfnDesc& d;
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t K, G, H, bytes;
  const void** vectors;  // [(G + 1) n]
  int32_t* slots;        // [n], from 0
  int64_t n = 0, fetched = 0;

  TokenSlots(const PeerFfnDesc& desc, Arena& arena)
      : d(desc),
        K(desc.routing.top_k),
        G(desc.vectors()),
        H(desc.hidden_size),
        bytes(desc.hidden_size * dtype_size(desc.type)),
        vectors(arena.take<const void*>((G + 1) * K)),
        slots(arena.take<int32_t>(K)) {}
  // Returns the bytes of the arena of a thread.
  static int64_t needs(const PeerFfnDesc& d) {
    return d.routing.top_k * ((d.vectors() + 1) * 8 + 4) + 2 * 64;
  }

  // Loads the vectors of token t: v, then u if down_first; otherwise u, then v.
  void load(int64_t t, bool down_first) {
    const IndexMap& map = d.routing.topk_ids;
    n = fetched = 0;
    const auto* narrow = static_cast<const int32_t*>(map.data) + t * K;
    const auto* wide = static_cast<const int64_t*>(map.data) + t * K;
    const auto id_of = [&](int64_t s) { return map.is_64 ? wide[s] : int64_t{narrow[s]}; };
    for (int64_t s = 0; s < K; ++s) {
      const int64_t id = id_of(s);
      if (id >= 0 && id < d.routing.num_experts) slots[n++] = static_cast<int32_t>(s);
    }
    const void** next = vectors;
    const auto add = [&](const NeuronTable& table, int64_t g) {
      for (int64_t i = 0; i < n; ++i) {
        *next++ = static_cast<const char*>(table.data) +
                  (id_of(slots[i]) * table.stride_e + g * table.stride_g) * dtype_size(d.type);
      }
    };
    if (down_first) add(d.w_down, 0);
    for (int64_t g = 0; g < G; ++g) add(d.w_gate_up, g);
    if (!down_first) add(d.w_down, 0);
  }
  void fetch_to(int64_t end) {
    for (end = std::min(end, (G + 1) * n); fetched < end; ++fetched) fetch(vectors[fetched], bytes);
  }
  // Computes out[i] = vector[first + i] . x
  void dots(int64_t first, int64_t count, const T* x, T* out) {
    for (int64_t i = 0; i < count; i += kVectorsTogether) {
      const int64_t some = std::min(kVectorsTogether, count - i);
      fetch_to(first + i + some + kVectorsAhead);
      k.dot_rows({d.type, vectors + first + i, some, H}, x, 0, out + i);
    }
  }
  // Computes sum += factors[i] * vector[first + i]
  void add_up(int64_t first, int64_t count, const T* factors, T* sum) {
    for (int64_t i = 0; i < count; ++i) {
      fetch_to(first + i + kVectorsAhead);
      k.axpy(d.type, vectors[first + i], factors[i], sum, H);
    }
  }
  // Copies elements of the slots with an expert to, and from, rows of all K.
  void spread(const T* from, T* to) const {
    std::fill(to, to + K, T(0));
    for (int64_t i = 0; i < n; ++i) to[slots[i]] = from[i];
  }
  void pick(const T* from, T* to) const {
    for (int64_t i = 0; i < n; ++i) to[i] = from[slots[i]];
  }
};

// Returns row t as T: the row itself, or a copy.
template <class T>
const T* row_as(const RowKernels<T>& k, const Rows& rows, int64_t t, int64_t n, T* copy) {
  if (rows.type == kAccumulate<T>) return reinterpret_cast<const T*>(row_at(rows, t));
  k.load_row(rows.type, row_at(rows, t), copy, n, T(1));
  return copy;
}

// Returns the elementary operations of a token's pass over its vectors.
double cost_of(const PeerFfnDesc& d) {
  return static_cast<double>(d.routing.top_k * (d.vectors() + 1)) *
             (static_cast<double>(d.hidden_size) / 8 + 4) +
         4;
}

template <class T>
void run(const PeerFfnParams& p, const Parallel& par) {
  const PeerFfnDesc& d = p.desc;
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t K = d.routing.top_k, G = d.vectors(), H = d.hidden_size, size = sizeof(T);
  const auto* weights = static_cast<const T*>(d.topk_weights);
  parallel_range(par, d.routing.num_tokens, cost_of(d), [&](int64_t begin, int64_t end) {
    ScratchScope scratch;
    Arena arena(scratch, Scratch::kTile,
                TokenSlots<T>::needs(d) + ((G + 2) * K + 2 * H) * size + 5 * 64);
    TokenSlots<T> token(d, arena);
    T *preact = arena.take<T>(G * K), *h = arena.take<T>(K), *weight = arena.take<T>(K);
    T *copy = arena.take<T>(H), *sum = arena.take<T>(H);
    for (int64_t t = begin; t < end; ++t) {
      token.load(t, false);
      const int64_t n = token.n;
      token.dots(0, G * n, row_as(k, d.x, t, H, copy), preact);
      activation_kernels<T>().forward(
          {d.act, 1, n, T(kAlpha), T(kLimit), preact, preact + n, n, h, n});
      token.pick(weights + t * K, weight);
      for (int64_t i = 0; i < n; ++i) h[i] *= weight[i];
      if (p.preact != nullptr) {
        T* kept = static_cast<T*>(p.preact) + t * G * K;
        for (int64_t g = 0; g < G; ++g) token.spread(preact + g * n, kept + g * K);
      }
      std::fill(sum, sum + H, T(0));
      token.add_up(G * n, n, h, sum);
      k.store_row(d.type, sum, static_cast<char*>(p.y) + t * token.bytes, H);
    }
  });
}

// Computes, per token, the gradients of x and of the weights, and the factors [T, G, K] and [T, K]
// of x and grad_y in the gradients of the tables.
template <class T>
void token_gradients(const PeerFfnBwdParams& p, const Parallel& par, T* up, T* down) {
  const PeerFfnDesc& d = p.desc;
  const RowKernels<T>& k = row_kernels<T>();
  const int64_t K = d.routing.top_k, G = d.vectors(), H = d.hidden_size, size = sizeof(T);
  const auto* weights = static_cast<const T*>(d.topk_weights);
  parallel_range(par, d.routing.num_tokens, cost_of(d), [&](int64_t begin, int64_t end) {
    ScratchScope scratch;
    Arena arena(scratch, Scratch::kTile,
                TokenSlots<T>::needs(d) + ((2 * G + 4) * K + 2 * H) * size + 8 * 64);
    TokenSlots<T> token(d, arena);
    T *preact = arena.take<T>(G * K), *grad = arena.take<T>(G * K), *h = arena.take<T>(K);
    T *dot = arena.take<T>(K), *dh = arena.take<T>(K), *weight = arena.take<T>(K);
    T *copy = arena.take<T>(H), *sum = arena.take<T>(H);
    for (int64_t t = begin; t < end; ++t) {
      token.load(t, true);
      const int64_t n = token.n;
      token.dots(0, n, row_as(k, p.grad_y, t, H, copy), dot);
      for (int64_t g = 0; g < G; ++g) {
        token.pick(static_cast<const T*>(p.preact) + (t * G + g) * K, preact + g * n);
      }
      token.pick(weights + t * K, weight);
      for (int64_t i = 0; i < n; ++i) dh[i] = dot[i] * weight[i];
      activation_kernels<T>().backward({.kind = d.act,
                                        .rows = 1,
                                        .n = n,
                                        .alpha = T(kAlpha),
                                        .limit = T(kLimit),
                                        .gate = preact,
                                        .up = preact + n,
                                        .ld = n,
                                        .dh = dh,
                                        .ld_dh = n,
                                        .weights = nullptr,
                                        .h = h,
                                        .ld_h = n,
                                        .dgate = grad,
                                        .dup = grad + n,
                                        .ld_grad = n,
                                        .dots = nullptr});
      if (p.grad_topk_weights != nullptr) {
        for (int64_t i = 0; i < n; ++i) dot[i] *= h[i];
        token.spread(dot, static_cast<T*>(p.grad_topk_weights) + t * K);
      }
      if (up != nullptr) {
        for (int64_t g = 0; g < G; ++g) token.spread(grad + g * n, up + (t * G + g) * K);
      }
      if (down != nullptr) {
        for (int64_t i = 0; i < n; ++i) h[i] *= weight[i];
        token.spread(h, down + t * K);
      }
      if (p.grad_x == nullptr) continue;
      std::fill(sum, sum + H, T(0));
      token.add_up(n, G * n, grad, sum);
      k.store_row(d.type, sum, static_cast<char*>(p.grad_x) + t * token.bytes, H);
    }
  });
}

// One row of a gradient: the sum over slots[begin, end) of a factor times a row of tokens.
template <class T>
struct TableGradient {
  Rows tokens;
  const T* factors;  // of slot k of token t: at (t G + g) K + k
  int64_t vectors;   // G
  char* out;         // [rows, G, H]
};

template <class T>
void table_gradients(const PeerFfnBwdParams& p, const Parallel& par, const int32_t* offsets,
                     const int32_t* row_to_slot, const TableGradient<T> (&tables)[2]) {
  const RowKernels<T>& k = row_kernels<T>();
  const DType type = p.desc.type;
  const int64_t K = p.desc.routing.top_k, H = p.desc.hidden_size, bytes = H * dtype_size(type);
  const int64_t U = p.rows.num_experts, N = p.rows.num_slots(), G = p.desc.vectors();
  const bool past_cache = U * bytes >= kStreamBytes;
  const auto write = past_cache ? k.stream_row : k.store_row;
  const double uses = static_cast<double>(N) / static_cast<double>(U) + 1;
  const double cost = static_cast<double>(G + 1) * uses * (static_cast<double>(H) / 8 + 2);
  parallel_range(par, U, cost, [&](int64_t first, int64_t last) {
    ScratchScope scratch;
    T* sum = scratch.take<T>(Scratch::kTile, 2 * H);
    T* zeros = sum + H;
    std::fill(zeros, zeros + H, T(0));
    const int32_t* const end = row_to_slot + offsets[last];
    for (int64_t row = first; row < last; ++row) {
      const int32_t *const slots = row_to_slot + offsets[row], *const stop =
                                                                   row_to_slot + offsets[row + 1];
      for (const TableGradient<T>& table : tables) {
        if (table.out == nullptr) continue;
        const auto ahead = slots + kVectorsAhead;
        if (slots != stop && ahead < end) fetch(row_at(table.tokens, *ahead / K), bytes);
        for (int64_t g = 0; g < table.vectors; ++g) {
          char* const out = table.out + (row * table.vectors + g) * bytes;
          const T* from = zeros;
          for (const int32_t* s = slots; s != stop; ++s) {
            const int64_t t = *s / K;
            const T factor = table.factors[(t * table.vectors + g) * K + *s % K];
            if (s == slots) {
              k.load_row(type, row_at(table.tokens, t), sum, H, factor);
            } else {
              k.axpy(type, row_at(table.tokens, t), factor, sum, H);
            }
            from = sum;
          }
          write(type, from, out, H);
        }
      }
    }
    if (past_cache) k.stream_fence();
  });
}

template <class T>
void run_bwd(const PeerFfnBwdParams& p, const Parallel& par) {
  const PeerFfnDesc& d = p.desc;
  const int64_t G = d.vectors(), N = d.routing.num_slots(), U = p.rows.num_experts;
  const bool tables = p.grad_w_gate_up != nullptr || p.grad_w_down != nullptr;
  ScratchScope scratch(ScratchScope::Keep::kUpTo256MiB);
  T *up = nullptr, *down = nullptr;
  if (tables) {
    up = scratch.take<T>(Scratch::kRows, (G + 1) * N);
    down = up + G * N;
  }
  token_gradients<T>(p, par, up, down);
  if (!tables || U == 0) return;
  int32_t* maps = scratch.take<int32_t>(Scratch::kIndex, U + 1 + 2 * N);
  sort_by_expert({p.rows, maps, maps + U + 1, maps + U + 1 + N, nullptr});
  table_gradients<T>(p, par, maps, maps + U + 1,
                     {{d.x, up, G, static_cast<char*>(p.grad_w_gate_up)},
                      {p.grad_y, down, 1, static_cast<char*>(p.grad_w_down)}});
}

}  // namespace

void peer_ffn(const PeerFfnParams& p, const Parallel& par) {
  p.desc.type == DType::kFloat64 ? run<double>(p, par) : run<float>(p, par);
}

void peer_ffn_bwd(const PeerFfnBwdParams& p, const Parallel& par) {
  p.desc.type == DType::kFloat64 ? run_bwd<double>(p, par) : run_bwd<float>(p, par);
}

}  // namespace moe_ops::cpu
