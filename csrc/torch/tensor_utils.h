// Helpers of the adapters: allocation, layouts, index conversion, torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"
#include "moe_ops/routing.h"
#include "torch/boxing.h"
#include "torch/checks.h"

namespace moe_ops::adapter {

// Returns an uninitialized CPU tensor; large ones come from the buffer cache (tensor_utils.cpp).
// Expanded operands take no memory, so a call can request a result of any size; a result whose size
// in bytes does not fit int64_t is refused.
Tensor empty_cpu(const Op& op, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype);

inline Tensor empty_cpu(const Op& op, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_cpu(op, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                   dtype);
}

inline Tensor empty_cpu(const Op& op, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return empty_cpu(op, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
}

// Returns an output that is empty unless it is wanted.
inline Tensor empty_cpu_if(bool wanted, const Op& op, std::initializer_list<int64_t> sizes,
                           ScalarType dtype) {
  return wanted ? empty_cpu(op, sizes, dtype) : empty_cpu(op, {0}, dtype);
}

// Passes on a tensor that an adapter just made. In the variant that runs CUDA kernels on the
// simulator, its memory becomes device memory until the call returns (device.cpp).
#ifdef MOE_OPS_SIMULATED
Tensor fresh(Tensor t);
#else
inline Tensor fresh(Tensor t) { return t; }
#endif

// Returns the accumulate type: fp64 for fp64 operands, fp32 for all others.
inline ScalarType accumulate_type(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Checks the type of a result, or of its gradient, which must be x's type or x's accumulate type; x
// has type `type`.
inline DType check_result_type(const Op& op, const char* name, ScalarType dtype, const Tensor& x,
                               DType type) {
  const ScalarType own = x.scalar_type(), sums = accumulate_type(own);
  MOE_CHECK(dtype == own || dtype == sums, op, ": ", name, " must be ", dtype_name(own),
            own == sums ? "" : " or ", own == sums ? "" : dtype_name(sums), ", got ",
            dtype_name(dtype), ".");
  return dtype == own ? type : moe_ops::accumulate_type(type);
}

// Returns a copy of `t` made by `make` through torch. Its C interface does not report why a copy
// failed; for checked operands on the CPU, the only reason is lack of memory.
template <class Make>
Tensor copy_of(const Tensor& t, const Make& make) {
  try {
    return fresh(make(t));
  } catch (const std::exception&) {
    if (t.is_cpu()) throw OutOfMemory();
    throw;
  }
}

inline Tensor contiguous_copy(const Tensor& t) {
  return copy_of(t, [](const Tensor& s) { return torch::stable::contiguous(s); });
}

// Returns whether every element is aligned to its size. Memory from a file or a buffer may start
// anywhere.
inline bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % t.element_size() == 0;
}

// Returns `t`, or an aligned copy.
inline Tensor aligned(const Tensor& t) {
  return is_aligned(t) ? t : copy_of(t, [](const Tensor& s) { return torch::stable::clone(s); });
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? aligned(t) : contiguous_copy(t); }

// Returns `t` as a contiguous tensor of type `dtype`.
inline Tensor contiguous_as(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype) return dense(t);
  return copy_of(t, [dtype](const Tensor& s) {
    return torch::stable::contiguous(torch::stable::to(s, dtype));
  });
}

inline OptTensor contiguous_as(const OptTensor& t, ScalarType dtype) {
  OptTensor out;
  if (t.has_value()) out = contiguous_as(*t, dtype);
  return out;
}

// Returns `t`, or a copy if its last dimension is not dense; rows may be anywhere. A dimension of
// size one has no meaningful stride.
inline Tensor with_dense_rows(const Tensor& t) {
  const int64_t d = t.dim() - 1;
  return t.size(d) <= 1 || t.stride(d) == 1 ? aligned(t) : contiguous_copy(t);
}

// Returns the stride between the rows of a matrix whose last dimension is dense.
inline int64_t row_stride(const Tensor& t) { return t.size(0) <= 1 ? t.size(1) : t.stride(0); }

// Sets rows from `row` on to zero: the contract for rows without an expert. t: [rows, features],
// contiguous.
inline void zero_rows_from(Tensor& t, int64_t row) {
  const int64_t bytes = t.size(1) * static_cast<int64_t>(t.element_size());
  if (row < t.size(0) && bytes > 0) {
    std::memset(static_cast<char*>(t.mutable_data_ptr()) + row * bytes, 0,
                static_cast<size_t>((t.size(0) - row) * bytes));
  }
}

// Calls fn(i, value) for each element of an int32 or int64 tensor, in order.
template <class Fn>
void for_each_index(const Tensor& t, const Fn& fn) {
  const Tensor packed = dense(t);
  const int64_t n = packed.numel();
  if (packed.scalar_type() == ScalarType::Int) {
    const auto* p = static_cast<const int32_t*>(packed.const_data_ptr());
    for (int64_t i = 0; i < n; ++i) fn(i, int64_t{p[i]});
  } else {
    const auto* p = static_cast<const int64_t*>(packed.const_data_ptr());
    for (int64_t i = 0; i < n; ++i) fn(i, p[i]);
  }
}

// Converts expert ids to contiguous int32 and replaces values outside [0, num_experts) by -1.
inline void normalize_ids(const Tensor& ids, int64_t num_experts, int32_t* out) {
  for_each_index(ids, [&](int64_t i, int64_t id) {
    out[i] = id >= 0 && id < num_experts ? static_cast<int32_t>(id) : -1;
  });
}

inline std::vector<int32_t> normalized_ids(const Tensor& ids, int64_t num_experts) {
  std::vector<int32_t> out(static_cast<size_t>(ids.numel()));
  normalize_ids(ids, num_experts, out.data());
  return out;
}

// Checks a number of slots: slots and rows have int32 indices.
inline void check_num_slots(const Op& op, const char* name, int64_t n) {
  MOE_CHECK(n <= std::numeric_limits<int32_t>::max(), op, ": ", name,
            " must hold fewer than 2^31 slots, got ", n, ".");
}

inline const int32_t* int32_data(const Tensor& t) {
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// Returns a map between slots and rows as contiguous int32, without a copy if it already is; each
// entry must be in [lowest, limit). lowest: 0, or -1 if entries may be empty.
inline Tensor checked_map(const Op& op, const char* name, const Tensor& map, int64_t limit,
                          int64_t lowest = 0) {
  check_index(op, name, map);
  check_num_slots(op, name, map.numel());
  for_each_index(map, [&](int64_t i, int64_t value) {
    MOE_CHECK(value >= lowest && value < limit, op, ": ", name, " must hold values from ", lowest,
              " to ", limit - 1, ", got ", value, " at position ", i, ".");
  });
  return contiguous_as(map, ScalarType::Int);
}

// Returns expert_offsets as contiguous int32, without a copy if it already is; it must start at 0,
// never decrease, and end at or before num_rows.
inline Tensor checked_offsets(const Op& op, const Tensor& offsets, int64_t num_rows) {
  check_index(op, "expert_offsets", offsets);
  check_dim(op, "expert_offsets", offsets, 1, "[E+1]");
  MOE_CHECK(offsets.numel() >= 2, op,
            ": expert_offsets must be [E+1] with at least one expert, got shape ",
            shape_string(offsets), ".");
  int64_t before = 0;
  for_each_index(offsets, [&](int64_t i, int64_t value) {
    MOE_CHECK(i > 0 || value == 0, op, ": expert_offsets must start at 0, got ", value, ".");
    MOE_CHECK(value >= before, op, ": expert_offsets must not fall, got ", before, " then ", value,
              " at position ", i, ".");
    before = value;
  });
  MOE_CHECK(before <= num_rows, op, ": expert_offsets must end at or before the ", num_rows,
            " rows there are, got ", before, ".");
  MOE_CHECK(before <= std::numeric_limits<int32_t>::max(), op,
            ": expert_offsets must be of fewer than 2^31 rows, got ", before, ".");
  return contiguous_as(offsets, ScalarType::Int);
}

// Returns the number of rows with an expert; offsets are checked.
inline int64_t num_valid_rows(const Tensor& offsets) {
  return int32_data(offsets)[offsets.numel() - 1];
}

// Returns the rows of a tensor [n, features] with a dense last dimension.
inline Rows rows_of(const Tensor& t, DType type, const int32_t* index = nullptr) {
  return {t.const_data_ptr(), type, row_stride(t), index};
}

// A weight tensor [E, O, K] as the kernels take it: dense along O or along K, whatever the strides
// of the rest, so that transposed views need no copy. `tensor` keeps a copy alive if one was made.
struct Weights {
  Tensor tensor;
  ExpertMatrices matrices;
};

inline Weights weights_of(const Tensor& w, DType type) {
  const auto stride = [](const Tensor& t, int64_t d) { return t.size(d) <= 1 ? 1 : t.stride(d); };
  const bool usable = (stride(w, 1) == 1 || stride(w, 2) == 1) && stride(w, 1) >= 0;
  Weights out{usable ? aligned(w) : dense(w), {}};
  const Tensor& t = out.tensor;
  out.matrices = {t.const_data_ptr(), type, t.stride(0), t.stride(1), t.stride(2)};
  // A dimension of size one may carry any stride; give it the one that selects a dense path.
  if (t.size(2) <= 1) out.matrices.stride_k = 1;
  if (t.size(1) <= 1 && out.matrices.stride_k != 1) out.matrices.stride_o = 1;
  return out;
}

// An optional bias [E, features]; `tensor` keeps a copy alive if one was made.
struct Bias {
  OptTensor tensor;
  ExpertVectors vectors;
};

inline Bias bias_of(const OptTensor& bias, DType type) {
  Bias out;
  if (!bias.has_value()) return out;
  out.tensor = with_dense_rows(*bias);
  out.vectors = {out.tensor->const_data_ptr(), type, row_stride(*out.tensor)};
  return out;
}

inline void check_num_experts(const Op& op, int64_t num_experts) {
  MOE_CHECK(num_experts >= 1, op, ": num_experts must be at least 1, got ", num_experts, ".");
  MOE_CHECK(num_experts < std::numeric_limits<int32_t>::max(), op,
            ": num_experts must be less than 2^31 - 1, got ", num_experts, ".");
}

// The routing of a call and the tensors that it points to: topk_ids [T, K] as they came, or maps
// that sort_by_expert made of them (defined in sort_by_expert.cpp).
struct SlotIds {
  Tensor topk_ids;
  Routing routing;
};
SlotIds slot_ids(const Op& op, const Tensor& topk_ids, int64_t num_experts);

struct SortedSlots {
  Tensor expert_offsets, row_to_slot, slot_to_row;
  Routing routing;
};
SortedSlots sorted_slots(const Op& op, const Tensor& topk_ids, int64_t num_experts);

// Returns a routing with the caller's maps; slot_to_row is [T, K].
inline Routing routing_of(const Tensor& expert_offsets, const Tensor& row_to_slot,
                          const Tensor& slot_to_row) {
  Routing r;
  r.num_tokens = slot_to_row.size(0);
  r.top_k = slot_to_row.size(1);
  r.num_experts = expert_offsets.numel() - 1;
  r.expert_offsets = int32_data(expert_offsets);
  r.row_to_slot = int32_data(row_to_slot);
  r.slot_to_row = int32_data(slot_to_row);
  return r;
}

// Returns the address of an output, or nullptr if it is not wanted.
inline void* data_if(bool wanted, Tensor& t) { return wanted ? t.mutable_data_ptr() : nullptr; }

#if defined(MOE_OPS_CHECK_THREADS)
// Returns a pool that starts its own threads: ThreadSanitizer does not see where a region of
// torch's pool begins and ends.
inline Parallel torch_parallel() {
  Parallel p;
  p.num_threads = 4;
  p.run = [](int64_t n, void (*fn)(int64_t, int64_t, void*), void* ctx) {
    std::vector<std::exception_ptr> errors(static_cast<size_t>(n));
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < n; ++i) {
      threads.emplace_back([=, &errors] {
        try {
          fn(i, i + 1, ctx);
        } catch (...) {
          errors[i] = std::current_exception();
        }
      });
    }
    for (std::thread& t : threads) t.join();
    for (const std::exception_ptr& e : errors) {
      if (e) std::rethrow_exception(e);
    }
  };
  return p;
}
#else
// Returns torch's thread pool for kernels. The first exception of a thread is kept and rethrown
// here, because torch's C interface would print it and return an error code instead.
inline Parallel torch_parallel() {
  Parallel p;
  p.num_threads = static_cast<int>(torch::stable::get_num_threads());
  p.run = [](int64_t n, void (*fn)(int64_t, int64_t, void*), void* ctx) {
    std::exception_ptr error;
    std::atomic_flag failed;
    torch::stable::parallel_for(0, n, 1, [&, fn, ctx](int64_t begin, int64_t end) {
      try {
        fn(begin, end, ctx);
      } catch (...) {
        if (!failed.test_and_set()) error = std::current_exception();
      }
    });
    if (error) std::rethrow_exception(error);
  };
  return p;
}
#endif

}  // namespace moe_ops::adapter
