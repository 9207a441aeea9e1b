// Both products of an expert on a block of tokens at a time: what lies between them stays in cache,
// and the weights, which are small beside the tokens, are packed once a call.
#include "moe_ops/all_experts_ffn.h"

#include <algorithm>
#include <vector>

#include "cpu/gemm/blocking.h"
#include "cpu/gemm/small_gemm.h"
#include "cpu/kernels/activation.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"

namespace moe_ops::cpu {

namespace {

// Panels of 2*lanes columns of [k][columns]; the last is lanes or 2*lanes wide.
struct Panels {
  int64_t depth, cols, lanes;
  int64_t padded() const { return round_up(cols, lanes); }
  int64_t elements() const { return depth * padded(); }
  int64_t offset(int64_t col) const { return col * depth; }  // col: where a panel begins
  int64_t width(int64_t col) const { return std::min(2 * lanes, padded() - col); }
};

// Returns the elements of a block of tokens as row-major A of small_gemm.h: blocks of kKc columns.
int64_t row_elements(int64_t columns) {
  return std::max<int64_t>(ceil_div(columns, kKc), 1) * kDenseTokens * kLda;
}

// Computes c [m][ldc] (+)= a * panels with a row-major `a`.
template <class T>
void multiply(const GemmKernels<T>& k, int64_t m, const T* a, const Panels& panels, const T* b,
              T* c, int64_t ldc, bool accumulate) {
  small_gemm_row_major<T>(
      {k, m, panels.cols, panels.depth, a, b, c, ldc, accumulate, kDenseTokens * kLda});
}

// Computes c [m][ldc] += a^T * panels with a column-major a^T.
template <class T>
void add_product(const GemmKernels<T>& k, int64_t m, const T* a, const Panels& panels, const T* b,
                 T* c, int64_t ldc) {
  small_gemm_column_major<T>(
      {k, m, panels.cols, panels.depth, a, b, c, ldc, true, kDenseTokens * kLdm});
}

// Packs panels of w^T, [k][rows of w], from one matrix [rows, k]; bias, if any, is one more k.
template <class T>
void pack_transposed(const GemmKernels<T>& k, DType type, const void* w, const void* bias,
                     const Panels& to, T* dst) {
  const int64_t W = k.lanes, size = dtype_size(type), ld = round_up(to.depth, W);
  const int64_t depth = to.depth - (bias != nullptr);
  ScratchScope scratch;
  T* rows = scratch.take<T>(Scratch::kTile, 2 * W * ld);
  for (int64_t j = 0; j < to.cols; j += 2 * W) {
    const int64_t width = to.width(j);
    for (int64_t r = 0; r < width; ++r) {
      if (j + r < to.cols) {
        row_kernels<T>().load_row(type, static_cast<const char*>(w) + (j + r) * depth * size,
                                  rows + r * ld, depth, T(1));
        if (bias != nullptr) {
          row_kernels<T>().load_row(type, static_cast<const char*>(bias) + (j + r) * size,
                                    rows + r * ld + depth, 1, T(1));
        }
      } else {
        std::fill(rows + r * ld, rows + r * ld + to.depth, T(0));
      }
    }
    k.transpose(rows, ld, width, to.depth, dst + to.offset(j), width);
  }
}

// Loads [rows][n] of `type`, rows `ld` elements apart, as row-major A.
template <class T>
void load_blocks(DType type, const void* src, int64_t ld, int64_t rows, int64_t n, T* dst) {
  for (int64_t c = 0; c < n; c += kKc) {
    activation_kernels<T>().dense_copy(
        {type, static_cast<const char*>(src) + c * dtype_size(type), ld, rows, std::min(kKc, n - c),
         dst + c / kKc * kDenseTokens * kLda, kLda, nullptr, 0, nullptr});
  }
}

// Sets element `at` of every row to 1.
template <class T>
void set_ones(T* blocks, int64_t rows, int64_t at) {
  T* p = blocks + at / kKc * kDenseTokens * kLda + at % kKc;
  for (int64_t r = 0; r < rows; ++r) p[r * kLda] = T(1);
}

// Calls fn(c, n) for runs of columns that lie in one block of rows and in one of columns each.
template <class Fn>
void for_column_runs(int64_t cols, const Fn& fn) {
  for (int64_t c = 0; c < cols;) {
    const int64_t end = std::min({cols, (c / kKc + 1) * kKc, (c / kLdm + 1) * kLdm});
    fn(c, end - c);
    c = end;
  }
}
template <class T>
T* row_place(T* blocks, int64_t c) {
  return blocks + c / kKc * kDenseTokens * kLda + c % kKc;
}
template <class T>
T* column_place(T* blocks, int64_t c) {
  return blocks + c / kLdm * kDenseTokens * kLdm + c % kLdm;
}

template <class T>
double cost_of(const AllExpertsFfnSizes& s) {
  return static_cast<double>(s.num_tokens * s.num_experts) *
         static_cast<double>(s.intermediate_size) *
         static_cast<double>(s.hidden_size + s.out_size) / 16;
}

template <class T>
void run(const AllExpertsFfnParams& p, const Parallel& par) {
  const AllExpertsFfnSizes& s = p.size;
  const GemmKernels<T>& k = gemm_kernels<T>();
  const RowKernels<T>& row_k = row_kernels<T>();
  const ActivationKernels<T>& act_k = activation_kernels<T>();
  const int64_t W = k.lanes, size = dtype_size(s.type);
  const int64_t E = s.num_experts, G = s.num_inputs, H = s.hidden_size, I = s.intermediate_size,
                O = s.out_size;
  // A bias is a weight of an input that is always 1.
  const Panels up{H + (p.b_up != nullptr), I, W}, down{I + (p.b_down != nullptr), O, W};
  ScratchScope scratch;
  T* w_up = scratch.take<T>(Scratch::kRows, E * (up.elements() + down.elements()));
  T* w_down = w_up + E * up.elements();
  const auto of = [&](const void* data, int64_t e, int64_t elements) {
    return data == nullptr ? nullptr : static_cast<const char*>(data) + e * elements * size;
  };
  parallel_range(par, E, static_cast<double>(up.elements() + down.elements()),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t e = begin; e < end; ++e) {
                     pack_transposed(k, s.type, of(p.w_up, e, I * H), of(p.b_up, e, I), up,
                                     w_up + e * up.elements());
                     pack_transposed(k, s.type, of(p.w_down, e, O * I), of(p.b_down, e, O), down,
                                     w_down + e * down.elements());
                   }
                 });
  const int64_t blocks = ceil_div(s.num_tokens, kDenseTokens);
  const int64_t ldy = down.padded();
  // Where tiles write what stays themselves.
  const bool keep_u = p.preact != nullptr && I % W == 0;
  const bool keep_y = s.type == kAccumulate<T> && O % W == 0;
  const int64_t ldu = keep_u ? I : up.padded();
  parallel_items(par, blocks, cost_of<T>(s), [&](int64_t block) {
    const int64_t t0 = block * kDenseTokens, m = std::min(kDenseTokens, s.num_tokens - t0);
    ScratchScope scratch;
    T* x = scratch.take<T>(Scratch::kPackA, row_elements(up.depth));
    T* h = scratch.take<T>(Scratch::kPackB, row_elements(down.depth));
    T* u_block = scratch.take<T>(Scratch::kHidden, kDenseTokens * up.padded());
    T* y = scratch.take<T>(Scratch::kTokens, kDenseTokens * ldy);
    int64_t loaded = -1;
    for (int64_t n = 0; n < E; ++n) {
      const int64_t e = s.order[n], g = s.input_of[e];
      if (g != loaded) {
        load_blocks(s.type, of(p.x, t0 * G + g, H), G * H, m, H, x);
        if (p.b_up != nullptr) set_ones(x, m, H);
        loaded = g;
      }
      T* saved =
          p.preact == nullptr ? nullptr : static_cast<T*>(p.preact) + (e * s.num_tokens + t0) * I;
      T* u = keep_u ? saved : u_block;
      multiply(k, m, x, up, w_up + e * up.elements(), u, ldu, false);
      if (saved != nullptr && !keep_u) {
        for (int64_t t = 0; t < m; ++t) {
          row_k.store_row(kAccumulate<T>, u + t * ldu, saved + t * I, I);
        }
      }
      for (int64_t c = 0; c < I; c += kKc) {
        act_k.dense_forward(
            {s.has_act, s.act, m, std::min(kKc, I - c), u + c, ldu, row_place(h, c), kLda});
      }
      if (p.b_down != nullptr) set_ones(h, m, I);
      if (keep_y) {
        multiply(k, m, h, down, w_down + e * down.elements(),
                 static_cast<T*>(p.y) + (t0 * E + e) * O, E * O, false);
        continue;
      }
      multiply(k, m, h, down, w_down + e * down.elements(), y, ldy, false);
      for (int64_t t = 0; t < m; ++t) {
        row_k.store_row(s.type, y + t * ldy,
                        static_cast<char*>(p.y) + ((t0 + t) * E + e) * O * size, O);
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
void run_bwd(const AllExpertsFfnBwdParams& p, const Parallel& par) {
  const AllExpertsFfnSizes& s = p.size;
  const GemmKernels<T>& k = gemm_kernels<T>();
  const RowKernels<T>& row_k = row_kernels<T>();
  const ActivationKernels<T>& act_k = activation_kernels<T>();
  const int64_t W = k.lanes, size = dtype_size(s.type);
  const int64_t E = s.num_experts, G = s.num_inputs, H = s.hidden_size, I = s.intermediate_size,
                O = s.out_size;
  const Panels down{O, I, W}, up{I, H, W};  // of the products with the weights as they lie
  const int64_t ldh = round_up(H, W), ldi = round_up(I, W);
  const bool need_up = p.grad_w_up != nullptr, need_down = p.grad_w_down != nullptr;
  const bool need_hidden = p.grad_x != nullptr || need_up || p.grad_b_up != nullptr;
  // Rows of sums are whole vectors.
  const Sums sums{need_up ? I * ldh : 0, need_down ? O * ldi : 0, p.grad_b_up ? ldi : 0,
                  p.grad_b_down ? round_up(O, W) : 0};
  const int64_t blocks = ceil_div(s.num_tokens, kDenseTokens);
  const int64_t parts = std::clamp<int64_t>(blocks / kDensePartBlocks, 1, kDenseMostParts);
  ScratchScope scratch;
  Arena shared(scratch, Scratch::kRows,
               static_cast<int64_t>(sizeof(T)) *
                       (E * (down.elements() + up.elements()) + parts * E * sums.expert()) +
                   256);
  T* w_down = shared.take<T>(E * down.elements());
  T* w_up = shared.take<T>(E * up.elements());
  T* totals = shared.take<T>(parts * E * sums.expert());
  parallel_range(par, E, static_cast<double>(up.elements() + down.elements()),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t e = begin; e < end; ++e) {
                     act_k.dense_panels(s.type,
                                        static_cast<const char*>(p.w_down) + e * O * I * size, I, O,
                                        I, w_down + e * down.elements());
                     act_k.dense_panels(s.type, static_cast<const char*>(p.w_up) + e * I * H * size,
                                        H, I, H, w_up + e * up.elements());
                   }
                 });
  std::vector<char> read(static_cast<size_t>(G), 0);
  for (int64_t e = 0; e < E; ++e) read[s.input_of[e]] = 1;
  const bool keep_dx = s.type == kAccumulate<T> && H % W == 0;  // tiles write it themselves

  parallel_items(par, parts, 2 * cost_of<T>(s), [&](int64_t part) {
    T* total = totals + part * E * sums.expert();
    std::fill(total, total + E * sums.expert(), T(0));
    ScratchScope scratch;
    T* dy_rows = scratch.take<T>(Scratch::kPackA, row_elements(O) + row_elements(I));
    T* du_rows = dy_rows + row_elements(O);
    const int64_t dy_cols = ceil_div(O, kLdm) * kDenseTokens * kLdm;
    const int64_t du_cols = ceil_div(I, kLdm) * kDenseTokens * kLdm;
    T* dy_columns = scratch.take<T>(Scratch::kHidden, dy_cols + du_cols);
    T* du_columns = dy_columns + dy_cols;
    T* x = scratch.take<T>(Scratch::kPackB,
                           kDenseTokens * (ldh + ldi));  // panels [m][...] of x and of h
    T* h = x + kDenseTokens * ldh;
    T* dh = scratch.take<T>(Scratch::kTokens, kDenseTokens * (ldi + ldh));
    T* dx_block = dh + kDenseTokens * ldi;
    for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
      const int64_t t0 = block * kDenseTokens, m = std::min(kDenseTokens, s.num_tokens - t0);
      const Panels x_panels{m, H, W}, hidden{m, I, W};
      int64_t loaded = -1;
      const auto store_dx = [&] {
        if (loaded < 0 || p.grad_x == nullptr || keep_dx) return;
        for (int64_t t = 0; t < m; ++t) {
          row_k.store_row(s.type, dx_block + t * ldh,
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
            act_k.dense_panels(s.type, static_cast<const char*>(p.x) + (t0 * G + g) * H * size,
                               G * H, m, H, x);
          }
        }
        T* sum_up = total + e * sums.expert();
        T* sum_down = sum_up + sums.up;
        T* sum_b_up = sum_down + sums.down;
        T* sum_b_down = sum_b_up + sums.b_up;
        const char* dy = static_cast<const char*>(p.grad_y) + (t0 * E + e) * O * size;
        for_column_runs(O, [&](int64_t c, int64_t cols) {
          act_k.dense_copy({s.type, dy + c * size, E * O, m, cols,
                            need_hidden ? row_place(dy_rows, c) : nullptr, kLda,
                            need_down ? column_place(dy_columns, c) : nullptr, kLdm,
                            sums.b_down ? sum_b_down + c : nullptr});
        });
        const T* u = static_cast<const T*>(p.preact) + (e * s.num_tokens + t0) * I;
        if (need_hidden) {
          multiply(k, m, dy_rows, down, w_down + e * down.elements(), dh, ldi, false);
        }
        for_column_runs(need_hidden || need_down ? I : 0, [&](int64_t c, int64_t cols) {
          DenseAct<T> act = {s.has_act, s.act, m, cols, u + c, I};
          if (need_hidden) {
            act.d = dh + c;
            act.ld_d = ldi;
          }
          if (need_down) act.h_panels = h + hidden.offset(c);
          if (p.grad_x != nullptr) act.du_rows = row_place(du_rows, c);
          if (need_up) act.du_columns = column_place(du_columns, c);
          if (sums.b_up) act.sum = sum_b_up + c;
          act_k.dense_backward(act);
        });
        if (need_down) add_product(k, O, dy_columns, hidden, h, sum_down, ldi);
        if (need_up) add_product(k, I, du_columns, x_panels, x, sum_up, ldh);
        if (p.grad_x == nullptr) continue;
        T* dx = keep_dx ? static_cast<T*>(p.grad_x) + (t0 * G + g) * H : dx_block;
        multiply(k, m, du_rows, up, w_up + e * up.elements(), dx, keep_dx ? G * H : ldh, !first);
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
    parallel_range(
        par, E, static_cast<double>(parts * rows * cols) / 4, [&](int64_t begin, int64_t end) {
          ScratchScope scratch;
          T* row = scratch.take<T>(Scratch::kTile, cols);
          for (int64_t e = begin; e < end; ++e) {
            for (int64_t r = 0; r < rows; ++r) {
              const T* from = totals + e * sums.expert() + offset + r * ld;
              row_k.load_row(kAccumulate<T>, from, row, cols, T(1));
              for (int64_t part = 1; part < parts; ++part) {
                row_k.axpy(kAccumulate<T>, from + part * E * sums.expert(), T(1), row, cols);
              }
              row_k.store_row(s.type, row, static_cast<char*>(out) + (e * rows + r) * cols * size,
                              cols);
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

void all_experts_ffn(const AllExpertsFfnParams& p, const Parallel& par) {
  p.size.type == DType::kFloat64 ? run<double>(p, par) : run<float>(p, par);
}

void all_experts_ffn_bwd(const AllExpertsFfnBwdParams& p, const Parallel& par) {
  p.size.type == DType::kFloat64 ? run_bwd<double>(p, par) : run_bwd<float>(p, par);
}

}  // namespace moe_ops::cpu
