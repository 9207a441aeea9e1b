// Helpers of CUDA adapters: device outputs, the current stream, launch errors, registration. An
// adapter never reads device memory and never waits for the device.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <memory>
#include <type_traits>

#include "moe_ops/common.h"
#include "moe_ops/sort_by_expert.h"
#include "torch/tensor_utils.h"

#ifdef MOE_OPS_WITH_CUDA

namespace moe_ops::adapter {

// Returns an uninitialized tensor on the device of `like`; on the simulator it is filled with NaN
// bytes.
Tensor device_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                    ScalarType dtype);

inline Tensor device_empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                           ScalarType dtype) {
  return device_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                      dtype);
}

inline Tensor device_empty(const Tensor& like, const std::vector<int64_t>& sizes,
                           ScalarType dtype) {
  return device_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()),
                      dtype);
}

// Returns rows of tokens for launchers, the last dimension dense. In batch-invariant mode rows of
// whole 16 bytes also start on 16, like those of a new tensor, and are copied if they do not, since
// where a tensor lies must not choose between TMA and mma.sync.
Tensor token_rows(const Tensor& t);

cuda::Stream current_stream(const Tensor& t);

// Raises RuntimeError with the op and CUDA's words unless status is success.
void check_status(const Op& op, cuda::Status status);

// expert_offsets [E+1] as contiguous int32 on the device, of num_rows rows. Their values are the
// kernels' to clamp.
Tensor device_offsets(const Op& op, const Tensor& offsets, int64_t num_rows);

// An index tensor as kernels take it: contiguous, int32 or int64 as it came.
struct DeviceIndex {
  Tensor tensor;
  const void* data;
  bool is_64;
};
DeviceIndex device_index(const Op& op, const char* name, const Tensor& t);

// sorted_slots on the device of topk_ids (defined in sort_by_expert.cpp).
SortedSlots device_sorted_slots(const Op& op, const Tensor& topk_ids, int64_t num_experts);

// Slots that a kernel sorts later with `sort`; the routing has the ids and the addresses of the
// maps.
struct UnsortedSlots {
  SortedSlots sorted;
  SortByExpertParams sort;
  Tensor topk_ids, workspace;
};
UnsortedSlots device_unsorted_slots(const Op& op, const Tensor& topk_ids, int64_t num_experts);

// Returns an output on the device of `like` that is empty unless it is wanted.
inline Tensor device_empty_if(bool wanted, const Tensor& like, std::initializer_list<int64_t> sizes,
                              ScalarType dtype) {
  return wanted ? device_empty(like, sizes, dtype) : device_empty(like, {0}, dtype);
}

// Returns the rows of a tensor [n, features] with a dense last dimension for device launchers; row
// r of the permuted order is its row index[r] / divisor.
inline cuda::DeviceRows device_rows(const Tensor& t, DType type, const int32_t* index = nullptr,
                                    int64_t divisor = 1) {
  return {t.const_data_ptr(), type, row_stride(t), index, static_cast<int32_t>(divisor), t.size(0)};
}

inline cuda::MutableDeviceRows mutable_device_rows(Tensor& t, DType type,
                                                   const int32_t* index = nullptr) {
  return {t.mutable_data_ptr(), type, row_stride(t), index, 1, t.size(0)};
}

// Where an adapter runs. OnCuda makes the tensors' device current and binds its context.
struct OnCuda {
  struct Scope {
    explicit Scope(const Tensor& first);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
    void add(const Tensor&) {}
    void enter() {}
    std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard;
  };
  static constexpr bool kSimulated = false;
};

#ifdef MOE_OPS_SIMULATED
// Simulated takes CPU tensors: the bytes of every argument and of every tensor made during the call
// are device memory until it returns, and nothing else is, so that the simulator reports an access
// outside of them.
struct Simulated {
  struct Scope {
    explicit Scope(const Tensor&) {}
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
    void add(const Tensor& t);
    void enter();
  };
  static constexpr bool kSimulated = true;
};
#endif

template <class Backend, auto fn>
struct Scoped;
template <class Backend, class R, class... Args, R (*fn)(Args...)>
struct Scoped<Backend, fn> {
  static R call(Args... args) {
    typename Backend::Scope scope(first_tensor(args...));
    (add(scope, args), ...);
    scope.enter();
    return fn(args...);
  }

 private:
  template <class... Rest>
  static const Tensor& first_tensor(const Tensor& first, const Rest&...) {
    return first;
  }
  static void add(typename Backend::Scope& scope, const Tensor& t) { scope.add(t); }
  static void add(typename Backend::Scope& scope, const OptTensor& t) {
    if (t.has_value()) scope.add(*t);
  }
  template <class T>
    requires(!std::is_same_v<T, Tensor> && !std::is_same_v<T, OptTensor>)
  static void add(typename Backend::Scope&, const T&) {}
};

#define MOE_CUDA_BOX(fn) MOE_BOX_AS(#fn, (::moe_ops::adapter::Scoped<Backend, &fn>::call))

#ifdef MOE_OPS_SIMULATED
#define MOE_SIMULATED_LIBRARY \
  STABLE_TORCH_LIBRARY_IMPL(moe_ops_sim, CPU, lib) { register_cuda<Simulated>(lib); }
#else
#define MOE_SIMULATED_LIBRARY
#endif

// MOE_CUDA_LIBRARY(m) { m.impl("permute", MOE_CUDA_BOX(permute_cuda)); }, once a file.
#define MOE_CUDA_LIBRARY(m)                                                     \
  template <class Backend>                                                      \
  static void register_cuda(torch::stable::detail::StableLibrary& m);           \
  STABLE_TORCH_LIBRARY_IMPL(moe_ops, CUDA, lib) { register_cuda<OnCuda>(lib); } \
  MOE_SIMULATED_LIBRARY                                                         \
  template <class Backend>                                                      \
  static void register_cuda(torch::stable::detail::StableLibrary& m)

}  // namespace moe_ops::adapter

#endif  // MOE_OPS_WITH_CUDA
