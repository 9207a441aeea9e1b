// Both products of an expert on a block of tokens at a time: what lies between them stays in cache,
// and the weights, which are small beside the tokens, are packed once a call.
#include "moe_ops/dense_ffn.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace moe_ops::cpu {

namespace {

// Tokens of a block: the depth of the weight gradients' tiles. Whole tiles with AVX2.
constexpr int64_t kTokens = 144;
// Parts of the tokens that sum weight gradients by themselves; they are added in order, so that the
// bits do not depend on threads.
constexpr int64_t kMostParts = 8;

// Panels of 2*lanes columns of [k][columns]; the last is lanes or 2*lanes wide.
struct Panels {
  int64_t depth, cols, lanes;
  int64_t padded() const { return round_up(cols, lanes); }
  int64_t elements() const { return depth * padded(); }
  int64_t offset(int64_t col) const { return col * depth; }  // col: where a panel begins
  int64_t width(int64_t col) const { return std::min(2 * lanes, padded() - col); }
};

// A block of rows on the broadcast side: steps of kKc elements, each [rows][kLda].
struct RowBlocks {
  int64_t k;  // depth
  int64_t count() const { return std::max<int64_t>(ceil_div(k, kKc), 1); }
  int64_t begin(int64_t b) const { return b * kKc; }
  int64_t length(int64_t b) const { return std::min(kKc, k - b * kKc); }
  int64_t elements() const { return count() * kTokens * kLda; }
};

// c [rows][ldc] (+)= a * panels.
template <class T>
void multiply(const Kernels<T>& k, int64_t rows, const RowBlocks& a_blocks, const T* a,
              const Panels& panels, const T* b, T* c, int64_t ldc, bool accumulate) {
  TileHints none;
  const int64_t W = k.lanes;
  for (int64_t kb = 0; kb < a_blocks.count(); ++kb) {
    const int64_t kc = a_blocks.length(kb);
    const T* block = a + kb * kTokens * kLda;
    for (int64_t j = 0; j < panels.cols; j += 2 * W) {
      const int64_t width = panels.width(j);
      const int nv = width > W ? 2 : 1;
      const T* panel = b + panels.offset(j) + a_blocks.begin(kb) * width;
      const int64_t tiles = ceil_div<int64_t>(rows, nv == 2 ? k.mr2 : k.mr1);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t i0 = rows * i / tiles, i1 = rows * (i + 1) / tiles;
        k.row_a[nv - 1][i1 - i0 - 1](kc, block + i0 * kLda, panel, c + i0 * ldc + j, ldc,
                                     accumulate || kb > 0, none);
      }
    }
  }
}

// c [m][ldc] (+)= a^T * panels; a: blocks of kLdm columns, each [depth][kLdm].
template <class T>
void multiply_columns(const Kernels<T>& k, int64_t m, const T* a, const Panels& panels, const T* b,
                      T* c, int64_t ldc, bool accumulate) {
  TileHints none;
  const int64_t W = k.lanes;
  for (int64_t m0 = 0; m0 < m; m0 += kLdm) {
    const int64_t rows = std::min(kLdm, m - m0);
    const T* block = a + m0 / kLdm * kTokens * kLdm;
    for (int64_t j = 0; j < panels.cols; j += 2 * W) {
      const int nv = panels.width(j) > W ? 2 : 1;
      const int64_t tiles = ceil_div<int64_t>(rows, nv == 2 ? k.mr2 : k.mr1);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t i0 = rows * i / tiles, i1 = rows * (i + 1) / tiles;
        k.col_a[nv - 1][i1 - i0 - 1](panels.depth, block + i0, b + panels.offset(j),
                                     c + (m0 + i0) * ldc + j, ldc, accumulate, none);
      }
    }
  }
}

// Panels of w^T, [k][rows of w], of one matrix [rows, k].
template <class T>
void pack_transposed(const Kernels<T>& k, DType type, const void* w, const Panels& to, T* dst) {
  const int64_t W = k.lanes, size = dtype_size(type), pitch = round_up(to.depth, W);
  T* rows = scratch<T>(Scratch::kTile, 2 * W * pitch);
  for (int64_t j = 0; j < to.cols; j += 2 * W) {
    const int64_t width = to.width(j);
    for (int64_t r = 0; r < width; ++r) {
      if (j + r < to.cols) {
        k.load_row(type, static_cast<const char*>(w) + (j + r) * to.depth * size, rows + r * pitch,
                   to.depth, T(1));
      } else {
        std::fill(rows + r * pitch, rows + r * pitch + to.depth, T(0));
      }
    }
    k.transpose(rows, pitch, width, to.depth, dst + to.offset(j), width);
  }
}

// Panels of w as it lies, [k][columns], of one matrix [k, columns].
template <class T>
void pack(const Kernels<T>& k, DType type, const void* w, int64_t ld, const Panels& to, T* dst) {
  std::vector<const void*> rows(static_cast<size_t>(to.depth));
  for (int64_t r = 0; r < to.depth; ++r) {
    rows[r] = static_cast<const char*>(w) + r * ld * dtype_size(type);
  }
  k.pack_panels(type, rows.data(), 0, to.depth, to.cols, nullptr, dst, to.depth * 2 * to.lanes);
}

// Row r of a block on the broadcast side from n elements of `type`.
template <class T>
void load_blocks(const Kernels<T>& k, DType type, const void* src, const RowBlocks& to, int64_t row,
                 T* dst) {
  for (int64_t b = 0; b < to.count(); ++b) {
    k.load_row(type, static_cast<const char*>(src) + to.begin(b) * dtype_size(type),
               dst + (b * kTokens + row) * kLda, to.length(b), T(1));
  }
}

template <class T>
void store_columns(const Kernels<T>& k, const T* src, int64_t n, int64_t row, T* dst) {
  for (int64_t c = 0; c < n; c += kLdm) {
    k.load_row(kAccumulate<T>, src + c, dst + (c / kLdm * kTokens + row) * kLdm,
               std::min(kLdm, n - c), T(1));
  }
}

template <class T>
double cost_of(const DenseFfnSizes& s) {
  return static_cast<double>(s.num_tokens * s.num_experts) *
         static_cast<double>(s.intermediate_size) *
         static_cast<double>(s.hidden_size + s.out_size) / 16;
}

template <class T>
void run(const DenseFfnParams& p, const Parallel& par) {
  const DenseFfnSizes& s = p.size;
  const Kernels<T>& k = kernels<T>();
  const int64_t W = k.lanes, size = dtype_size(s.type);
  const int64_t E = s.num_experts, G = s.num_inputs, H = s.hidden_size, I = s.intermediate_size,
                O = s.out_size;
  const RowBlocks up_k{H}, down_k{I};
  const Panels up{H, I, W}, down{I, O, W};
  T* w_up = scratch<T>(Scratch::kRows, E * (up.elements() + down.elements()));
  T* w_down = w_up + E * up.elements();
  parallel_range(par, E, static_cast<double>(up.elements() + down.elements()),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t e = begin; e < end; ++e) {
                     pack_transposed(k, s.type, static_cast<const char*>(p.w_up) + e * I * H * size,
                                     up, w_up + e * up.elements());
                     pack_transposed(k, s.type,
                                     static_cast<const char*>(p.w_down) + e * O * I * size, down,
                                     w_down + e * down.elements());
                   }
                 });
  const int64_t blocks = ceil_div(s.num_tokens, kTokens);
  const int64_t ldu = up.padded(), ldy = down.padded();
  parallel_items(par, blocks, cost_of<T>(s), [&](int64_t block) {
    const int64_t t0 = block * kTokens, m = std::min(kTokens, s.num_tokens - t0);
    T* x = scratch<T>(Scratch::kPackA, up_k.elements());
    T* h = scratch<T>(Scratch::kPackB, down_k.elements());
    T* u = scratch<T>(Scratch::kHidden, kTokens * ldu);
    T* y = scratch<T>(Scratch::kTokens, kTokens * ldy);
    T* bias = scratch<T>(Scratch::kTile, I + O);
    int64_t loaded = -1;
    for (int64_t n = 0; n < E; ++n) {
      const int64_t e = s.order[n], g = s.input_of[e];
      if (g != loaded) {
        for (int64_t t = 0; t < m; ++t) {
          load_blocks(k, s.type, static_cast<const char*>(p.x) + ((t0 + t) * G + g) * H * size,
                      up_k, t, x);
        }
        loaded = g;
      }
      if (p.b_up != nullptr) {
        k.load_row(s.type, static_cast<const char*>(p.b_up) + e * I * size, bias, I, T(1));
      }
      if (p.b_down != nullptr) {
        k.load_row(s.type, static_cast<const char*>(p.b_down) + e * O * size, bias + I, O, T(1));
      }
      multiply(k, m, up_k, x, up, w_up + e * up.elements(), u, ldu, false);
      T* saved = p.preact == nullptr
                     ? nullptr
                     : static_cast<T*>(p.preact) + (e * s.num_tokens + t0) * I;
      for (int64_t t = 0; t < m; ++t) {
        T* row = u + t * ldu;
        if (p.b_up != nullptr) k.axpy(kAccumulate<T>, bias, T(1), row, I);
        if (saved != nullptr) k.store_row(kAccumulate<T>, row, saved + t * I, I);
        if (s.has_act) k.act_fwd(s.act, row, row, row, I, T(0), T(1));
        load_blocks(k, kAccumulate<T>, row, down_k, t, h);
      }
      multiply(k, m, down_k, h, down, w_down + e * down.elements(), y, ldy, false);
      for (int64_t t = 0; t < m; ++t) {
        T* row = y + t * ldy;
        if (p.b_down != nullptr) k.axpy(kAccumulate<T>, bias + I, T(1), row, O);
        k.store_row(s.type, row, static_cast<char*>(p.y) + ((t0 + t) * E + e) * O * size, O);
      }
    }
  });
}

// Where one part of the tokens adds its gradients of the weights.
struct Sums {
  int64_t up, down, b_up, b_down;  // elements of an expert
  int64_t expert() const { return up + down + b_up + b_down; }
};

template <class T>
void run_bwd(const DenseFfnBwdParams& p, const Parallel& par) {
  const DenseFfnSizes& s = p.size;
  const Kernels<T>& k = kernels<T>();
  const int64_t W = k.lanes, size = dtype_size(s.type);
  const int64_t E = s.num_experts, G = s.num_inputs, H = s.hidden_size, I = s.intermediate_size,
                O = s.out_size;
  const RowBlocks down_k{O}, up_k{I};
  const Panels down{O, I, W}, up{I, H, W};  // of the products with the weights as they lie
  const int64_t ldh = round_up(H, W), ldi = round_up(I, W);
  const bool need_up = p.grad_w_up != nullptr, need_down = p.grad_w_down != nullptr;
  const bool need_hidden = p.grad_x != nullptr || need_up || p.grad_b_up != nullptr;
  const Sums sums{need_up ? I * ldh : 0, need_down ? O * ldi : 0, p.grad_b_up ? I : 0,
                  p.grad_b_down ? O : 0};
  const int64_t blocks = ceil_div(s.num_tokens, kTokens);
  const int64_t parts = std::clamp<int64_t>(blocks / 4, 1, kMostParts);
  Carver shared(Scratch::kRows,
                static_cast<int64_t>(sizeof(T)) *
                        (E * (down.elements() + up.elements()) + parts * E * sums.expert()) +
                    256);
  T* w_down = shared.take<T>(E * down.elements());
  T* w_up = shared.take<T>(E * up.elements());
  T* totals = shared.take<T>(parts * E * sums.expert());
  parallel_range(par, E, static_cast<double>(up.elements() + down.elements()),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t e = begin; e < end; ++e) {
                     pack(k, s.type, static_cast<const char*>(p.w_down) + e * O * I * size, I, down,
                          w_down + e * down.elements());
                     pack(k, s.type, static_cast<const char*>(p.w_up) + e * I * H * size, H, up,
                          w_up + e * up.elements());
                   }
                 });
  std::vector<char> read(static_cast<size_t>(G), 0);
  for (int64_t e = 0; e < E; ++e) read[s.input_of[e]] = 1;

  parallel_items(par, parts, 2 * cost_of<T>(s), [&](int64_t part) {
    T* total = totals + part * E * sums.expert();
    std::fill(total, total + E * sums.expert(), T(0));
    T* dy_rows = scratch<T>(Scratch::kPackA, down_k.elements() + up_k.elements());
    T* du_rows = dy_rows + down_k.elements();
    const int64_t dy_cols = ceil_div(O, kLdm) * kTokens * kLdm;
    const int64_t du_cols = ceil_div(I, kLdm) * kTokens * kLdm;
    T* dy_columns = scratch<T>(Scratch::kHidden, dy_cols + du_cols);
    T* du_columns = dy_columns + dy_cols;
    // Panels [m][...] of x and of h.
    T* x = scratch<T>(Scratch::kPackB, kTokens * (ldh + 2 * ldi));
    T* h_panels = x + kTokens * ldh;
    T* h = h_panels + kTokens * ldi;
    T* dh = scratch<T>(Scratch::kTokens, kTokens * (ldi + ldh));
    T* dx = dh + kTokens * ldi;
    T* row = scratch<T>(Scratch::kTile, std::max({H, I, O}) + 2 * W);
    for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
      const int64_t t0 = block * kTokens, m = std::min(kTokens, s.num_tokens - t0);
      const Panels x_panels{m, H, W}, hidden{m, I, W};
      int64_t loaded = -1;
      const auto store_dx = [&] {
        if (loaded < 0 || p.grad_x == nullptr) return;
        for (int64_t t = 0; t < m; ++t) {
          k.store_row(s.type, dx + t * ldh,
                      static_cast<char*>(p.grad_x) + ((t0 + t) * G + loaded) * H * size, H);
        }
      };
      for (int64_t n = 0; n < E; ++n) {
        const int64_t e = s.order[n], g = s.input_of[e];
        const bool first = g != loaded;
        if (first) {
          store_dx();
          loaded = g;
          if (need_up) {
            pack(k, s.type, static_cast<const char*>(p.x) + (t0 * G + g) * H * size, G * H,
                 x_panels, x);
          }
        }
        T* sum_up = total + e * sums.expert();
        T* sum_down = sum_up + sums.up;
        T* sum_b_up = sum_down + sums.down;
        T* sum_b_down = sum_b_up + sums.b_up;
        for (int64_t t = 0; t < m; ++t) {
          k.load_row(s.type, static_cast<const char*>(p.grad_y) + ((t0 + t) * E + e) * O * size,
                     row, O, T(1));
          if (need_hidden) load_blocks(k, kAccumulate<T>, row, down_k, t, dy_rows);
          if (need_down) store_columns(k, row, O, t, dy_columns);
          if (sums.b_down) k.axpy(kAccumulate<T>, row, T(1), sum_b_down, O);
        }
        const T* u = static_cast<const T*>(p.preact) + (e * s.num_tokens + t0) * I;
        if (need_hidden) {
          multiply(k, m, down_k, dy_rows, down, w_down + e * down.elements(), dh, ldi, false);
          for (int64_t t = 0; t < m; ++t) {
            T* d = dh + t * ldi;
            if (s.has_act) {
              k.act_bwd(s.act, u + t * I, u + t * I, d, h + t * ldi, d, nullptr, I, T(0), T(1));
            }
            if (p.grad_x != nullptr) load_blocks(k, kAccumulate<T>, d, up_k, t, du_rows);
            if (need_up) store_columns(k, d, I, t, du_columns);
            if (sums.b_up) k.axpy(kAccumulate<T>, d, T(1), sum_b_up, I);
          }
        } else if (need_down && s.has_act) {
          for (int64_t t = 0; t < m; ++t) {
            k.act_fwd(s.act, u + t * I, u + t * I, h + t * ldi, I, T(0), T(1));
          }
        }
        if (need_down) {
          pack(k, kAccumulate<T>, s.has_act ? h : u, s.has_act ? ldi : I, hidden, h_panels);
          multiply_columns(k, O, dy_columns, hidden, h_panels, sum_down, ldi, true);
        }
        if (need_up) multiply_columns(k, I, du_columns, x_panels, x, sum_up, ldh, true);
        if (p.grad_x != nullptr) {
          multiply(k, m, up_k, du_rows, up, w_up + e * up.elements(), dx, ldh, !first);
        }
      }
      store_dx();
      for (int64_t g = 0; p.grad_x != nullptr && g < G; ++g) {
        if (read[g]) continue;
        for (int64_t t = t0; t < t0 + m; ++t) {
          std::fill_n(static_cast<char*>(p.grad_x) + (t * G + g) * H * size, H * size, char(0));
        }
      }
    }
  });

  // The parts' sums, in order, to where they belong.
  const auto add = [&](int64_t offset, int64_t rows, int64_t cols, int64_t ld, void* out) {
    if (out == nullptr) return;
    parallel_range(par, E, static_cast<double>(parts * rows * cols) / 4,
                   [&](int64_t begin, int64_t end) {
                     T* row = scratch<T>(Scratch::kTile, cols);
                     for (int64_t e = begin; e < end; ++e) {
                       for (int64_t r = 0; r < rows; ++r) {
                         const T* from = totals + e * sums.expert() + offset + r * ld;
                         k.load_row(kAccumulate<T>, from, row, cols, T(1));
                         for (int64_t part = 1; part < parts; ++part) {
                           k.axpy(kAccumulate<T>, from + part * E * sums.expert(), T(1), row, cols);
                         }
                         k.store_row(s.type, row,
                                     static_cast<char*>(out) + (e * rows + r) * cols * size, cols);
                       }
                     }
                   });
  };
  add(0, I, H, ldh, p.grad_w_up);
  add(sums.up, O, I, ldi, p.grad_w_down);
  add(sums.up + sums.down, 1, I, I, p.grad_b_up);
  add(sums.up + sums.down + sums.b_up, 1, O, O, p.grad_b_down);
}

}  // namespace

void dense_ffn(const DenseFfnParams& p, const Parallel& par) {
  p.size.type == DType::kFloat64 ? run<double>(p, par) : run<float>(p, par);
}

void dense_ffn_bwd(const DenseFfnBwdParams& p, const Parallel& par) {
  p.size.type == DType::kFloat64 ? run_bwd<double>(p, par) : run_bwd<float>(p, par);
}

}  // namespace moe_ops::cpu
