// What the adapters need around the kernels: allocation, layouts, index conversion, torch's
// threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"
#include "moe_ops/routing.h"
#include "torch/checks.h"

namespace moe_ops::adapter {

using OptTensor = std::optional<Tensor>;
using OptInt = std::optional<int64_t>;
using OptType = std::optional<ScalarType>;

// What MOE_BOX does to TORCH_BOX's conversions of arguments. A kernel that takes float or int would
// get the low bytes of a double or int64_t: a compile error. A std::string would be allocated in
// every call and never freed, and of tensors the ones that follow a failed allocation would keep
// their memory for ever (STABLE_ABI_WORKAROUND): what is boxed takes the handles in which they
// cross the ABI, owns them all before anything can fail, and hands std::string and Tensor on.
template <class T>
constexpr bool kBoxable =
    !std::is_same_v<std::remove_cvref_t<T>, float> &&
    !std::is_same_v<std::remove_cvref_t<T>, int> &&
    (std::is_same_v<T, std::string> || !std::is_same_v<std::remove_cvref_t<T>, std::string>);

template <class T>
struct BoxedArg {
  using Type = T;
  T value;
  explicit BoxedArg(T v) : value(v) {}
  T take() { return value; }
};

template <>
struct BoxedArg<std::string> {
  using Type = StringHandle;
  std::unique_ptr<StringOpaque, void (*)(StringHandle)> handle;
  explicit BoxedArg(StringHandle h);
  std::string take();
};

template <>
struct BoxedArg<Tensor> {
  using Type = AtenTensorHandle;
  AtenTensorHandle handle;
  explicit BoxedArg(AtenTensorHandle h) : handle(h) {}
  ~BoxedArg() {
    if (handle != nullptr) aoti_torch_delete_tensor_object(handle);
  }
  BoxedArg(const BoxedArg&) = delete;
  BoxedArg& operator=(const BoxedArg&) = delete;
  // torch hands None on as a tensor that is not defined.
  bool missing() const {
    bool defined = false;
    aoti_torch_is_defined(handle, &defined);
    return !defined;
  }
  Tensor take() { return Tensor(std::exchange(handle, nullptr)); }
};

struct MissingTensor {
  int argument;  // counted from 1
};

template <>
struct BoxedArg<OptTensor> {
  using Type = std::optional<AtenTensorHandle>;
  BoxedArg<Tensor> tensor;
  explicit BoxedArg(Type h) : tensor(h.value_or(nullptr)) {}
  OptTensor take() {
    OptTensor out;
    if (tensor.handle != nullptr) out = tensor.take();
    return out;
  }
};

template <auto fn>
struct Boxable;
template <class R, class... Args, R (*fn)(Args...)>
struct Boxable<fn> {
  static_assert((kBoxable<Args> && ...),
                "use double, int64_t and std::string by value in registered signatures");
  static R call(typename BoxedArg<std::remove_cvref_t<Args>>::Type... args) {
    return with(BoxedArg<std::remove_cvref_t<Args>>(args)...);
  }

 private:
  static R with(BoxedArg<std::remove_cvref_t<Args>>&&... args) {
    int argument = 0;
    (require(++argument, args), ...);
    return fn(args.take()...);
  }
  template <class T>
  static void require(int argument, const BoxedArg<T>& arg) {
    if constexpr (std::is_same_v<T, Tensor>) {
      if (arg.missing()) [[unlikely]]
        throw MissingTensor{argument};
    }
  }
};

// The name of a registered function, as an argument of a template.
template <size_t N>
struct FunctionName {
  char text[N];
  consteval FunctionName(const char (&name)[N]) { std::copy_n(name, N, text); }
};

// What the standard library says of memory that it did not get, and None in place of a tensor,
// become sentences.
template <FunctionName name, void (*boxed)(StableIValue*, uint64_t, uint64_t)>
void with_sentences(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
  try {
    boxed(stack, num_args, num_outputs);
  } catch (const std::bad_alloc&) {
    throw OutOfMemory();
  } catch (const MissingTensor& missing) {
    std::string op = name.text;
    if (op.ends_with("_cuda")) op.resize(op.size() - 5);
    fail(op, ": argument ", missing.argument, " must be a tensor, got None.");
  }
}
#define MOE_BOX_AS(name, fn) \
  (&::moe_ops::adapter::with_sentences<name, TORCH_BOX((&::moe_ops::adapter::Boxable<&fn>::call))>)
#define MOE_BOX(fn) MOE_BOX_AS(#fn, fn)

// An uninitialised CPU tensor; large ones come from the buffer cache (tensor_utils.cpp). Expanded
// operands take no memory, so a call can ask for a result of any size: one whose bytes do not fit
// int64_t is refused.
Tensor empty_cpu(const Op& op, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype);

inline Tensor empty_cpu(const Op& op, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_cpu(op, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                   dtype);
}

inline Tensor empty_cpu(const Op& op, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return empty_cpu(op, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
}

// An output that is empty unless it is wanted.
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

// fp64 operands accumulate in fp64, everything else in fp32.
inline ScalarType accumulate_type(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Results, and so their gradients, that are in x's type or in the one that sums run in; x has type
// `type`.
inline DType check_result_type(const Op& op, const char* name, ScalarType dtype, const Tensor& x,
                               DType type) {
  const ScalarType own = x.scalar_type(), sums = accumulate_type(own);
  MOE_CHECK(dtype == own || dtype == sums, op, ": ", name, " must be ", dtype_name(own),
            own == sums ? "" : " or ", own == sums ? "" : dtype_name(sums), ", got ",
            dtype_name(dtype), ".");
  return dtype == own ? type : moe_ops::accumulate_type(type);
}

// A copy of `t` that `make` makes through torch, whose C interface does not say why it failed: for
// checked operands on the CPU, for want of memory.
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

// Whether every element lies at a multiple of its size. Memory that came from a file or a buffer
// may begin anywhere.
inline bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % t.element_size() == 0;
}

// `t`, or a copy that is aligned.
inline Tensor aligned(const Tensor& t) {
  return is_aligned(t) ? t : copy_of(t, [](const Tensor& s) { return torch::stable::clone(s); });
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? aligned(t) : contiguous_copy(t); }

// Contiguous and of dtype `dtype`.
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

// Rows may lie anywhere; only the last dimension has to be dense. A dimension of size one has no
// meaningful stride.
inline Tensor with_dense_rows(const Tensor& t) {
  const int64_t d = t.dim() - 1;
  return t.size(d) <= 1 || t.stride(d) == 1 ? aligned(t) : contiguous_copy(t);
}

// Stride between the rows of a matrix whose last dimension is dense.
inline int64_t row_stride(const Tensor& t) { return t.size(0) <= 1 ? t.size(1) : t.stride(0); }

// Rows past the last one that has an expert are zero by contract. t: [rows, features], contiguous.
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

// Expert ids as contiguous int32 with everything outside [0, num_experts) turned into -1.
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

// Slots and rows are numbered in int32.
inline void check_num_slots(const Op& op, const char* name, int64_t n) {
  MOE_CHECK(n <= std::numeric_limits<int32_t>::max(), op, ": ", name,
            " must hold fewer than 2^31 slots, got ", n, ".");
}

inline const int32_t* int32_data(const Tensor& t) {
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// A map between slots and rows as contiguous int32, without a copy where it is that; each entry is
// checked to lie in [lowest, limit). lowest: 0, or -1 where an entry may lead nowhere.
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

// expert_offsets as contiguous int32, without a copy where it is that: starts at 0, never falls,
// ends at or before num_rows.
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

// Rows that have an expert, of checked offsets.
inline int64_t num_valid_rows(const Tensor& offsets) {
  return int32_data(offsets)[offsets.numel() - 1];
}

// Rows of a tensor [n, features] with a dense last dimension.
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

// A routing whose maps a caller made; slot_to_row is [T, K].
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

// Where a kernel writes an output, if it is wanted.
inline void* data_if(bool wanted, Tensor& t) { return wanted ? t.mutable_data_ptr() : nullptr; }

#if defined(MOE_OPS_CHECK_THREADS)
// ThreadSanitizer does not see where a region of torch's pool begins and ends, so a build for it
// starts threads of its own.
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
// torch's thread pool as the kernels see it. The first exception of a thread is kept and thrown
// again here: torch's C interface would print it and return a number in its place.
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
