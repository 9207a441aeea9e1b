#include "moe_ops/add_rms_norm.h"

#include <algorithm>

#include "cpu/gemm/blocking.h"
#include "cpu/kernels/kernels.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/workspace.h"

namespace moe_ops::cpu {

namespace {

int64_t num_parts(int64_t rows) { return ceil_div(rows, kNormPartRows); }

template <class T>
const T* widened(const Kernels<T>& k, DType type, const void* row, int64_t n, T* buffer) {
  if (row == nullptr) return nullptr;
  k.load_row(type, row, buffer, n, T(1));
  return buffer;
}

const char* row_at(const void* data, DType type, int64_t offset) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + offset * dtype_size(type);
}

char* row_at(void* data, DType type, int64_t offset) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + offset * dtype_size(type);
}

template <class T>
void run(const AddRmsNormParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
  const int64_t H = p.hidden_size;
  parallel_range(par, p.num_rows, static_cast<double>(H) / 4 + 4, [&](int64_t begin, int64_t end) {
    ScratchScope scratch;
    T* buffer = scratch.take<T>(Scratch::kTile, 3 * H);
    NormRows<T> rows;
    rows.type = p.type;
    rows.rows = end - begin;
    rows.cols = H;
    rows.eps = static_cast<T>(p.eps);
    rows.weight = widened(k, p.type, p.weight, H, buffer);
    rows.bias = widened(k, p.type, p.bias, H, buffer + H);
    rows.wide = buffer + 2 * H;
    rows.x = row_at(p.x, p.type, begin * H);
    rows.residual = row_at(p.residual, p.type, begin * H);
    rows.y = row_at(p.y, p.type, begin * H);
    rows.sum = row_at(p.sum, p.type, begin * H);
    rows.rstd = static_cast<T*>(p.rstd) + begin;
    k.norm_rows(rows);
  });
}

template <class T>
void run_bwd(const AddRmsNormBwdParams& p, const Parallel& par) {
  const Kernels<T>& k = kernels<T>();
  const int64_t H = p.hidden_size, parts = num_parts(p.num_rows);
  T* sums = static_cast<T*>(p.workspace);  // [parts, 2, H]
  const double cost = static_cast<double>(p.num_rows) * (static_cast<double>(H) / 2 + 4);
  parallel_items(par, parts, cost, [&](int64_t part) {
    const int64_t begin = part * kNormPartRows, end = std::min(p.num_rows, begin + kNormPartRows);
    T* own = sums + part * 2 * H;
    std::fill(own, own + 2 * H, T(0));
    NormRowsBwd<T> rows;
    rows.type = p.type;
    rows.rows = end - begin;
    rows.cols = H;
    ScratchScope scratch;
    rows.weight = widened(k, p.type, p.weight, H, scratch.take<T>(Scratch::kTile, H));
    rows.grad_y = row_at(p.grad_y, p.type, begin * H);
    rows.grad_sum = row_at(p.grad_sum, p.type, begin * H);
    rows.sum = row_at(p.sum, p.type, begin * H);
    rows.rstd = static_cast<const T*>(p.rstd) + begin;
    rows.grad_x = row_at(p.grad_x, p.type, begin * H);
    rows.weight_sum = p.grad_weight == nullptr ? nullptr : own;
    rows.bias_sum = p.grad_bias == nullptr ? nullptr : own + H;
    k.norm_rows_bwd(rows);
  });
  void* const out[] = {p.grad_weight, p.grad_bias};
  ScratchScope scratch;
  T* total = scratch.take<T>(Scratch::kTile, H);
  for (int64_t which = 0; which < 2; ++which) {
    if (out[which] == nullptr) continue;
    std::fill(total, total + H, T(0));
    for (int64_t part = 0; part < parts; ++part) {
      k.axpy(kAccumulate<T>, sums + (2 * part + which) * H, T(1), total, H);
    }
    k.store_row(p.type, total, out[which], H);
  }
}

}  // namespace

int64_t add_rms_norm_workspace(int64_t num_rows, int64_t hidden_size, DType type) {
  return num_parts(num_rows) * 2 * hidden_size * dtype_size(accumulate_type(type));
}

void add_rms_norm(const AddRmsNormParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? run<double>(p, par) : run<float>(p, par);
}

void add_rms_norm_bwd(const AddRmsNormBwdParams& p, const Parallel& par) {
  p.type == DType::kFloat64 ? run_bwd<double>(p, par) : run_bwd<float>(p, par);
}

}  // namespace moe_ops::cpu
