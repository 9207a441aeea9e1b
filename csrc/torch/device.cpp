#include "torch/device.h"

#ifdef MOE_OPS_WITH_CUDA

#include <algorithm>
#include <stdexcept>

#include "cuda/device_info.h"
#include "cuda/runtime.h"
#include "moe_ops/batch_invariant.h"

namespace moe_ops::adapter {

#ifdef MOE_OPS_SIMULATED

namespace {

struct Interval {
  char* begin;
  char* end;
};

// The memory of the call in progress; adapters do not call each other through the dispatcher.
thread_local bool in_call = false;
thread_local std::vector<Interval> known;

Interval bytes_of(const Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return {nullptr, nullptr};
    last += (t.size(d) - 1) * t.stride(d);
  }
  auto* begin = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  return {begin, begin + (last + 1) * static_cast<int64_t>(t.element_size())};
}

void register_memory(const Interval& i) {
  cuda::register_host(i.begin, static_cast<size_t>(i.end - i.begin));
}

}  // namespace

Simulated::Scope::~Scope() {
  if (in_call) {
    for (const Interval& i : known) cuda::unregister_host(i.begin);
  }
  known.clear();
  in_call = false;
}

void Simulated::Scope::add(const Tensor& t) {
  const Interval i = bytes_of(t);
  if (i.begin != i.end) known.push_back(i);
}

// Arguments may be views of one another, and memory can be registered once only.
void Simulated::Scope::enter() {
  std::sort(known.begin(), known.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  std::vector<Interval> merged;
  for (const Interval& i : known) {
    if (!merged.empty() && i.begin < merged.back().end) {
      merged.back().end = std::max(merged.back().end, i.end);
    } else {
      merged.push_back(i);
    }
  }
  known = merged;
  for (const Interval& i : known) register_memory(i);
  cuda::forget_device_info();
  in_call = true;
}

Tensor fresh(Tensor t) {
  const Interval i = bytes_of(t);
  if (!in_call || i.begin == i.end) return t;
  const bool there = std::any_of(known.begin(), known.end(), [&](const Interval& k) {
    return i.begin >= k.begin && i.end <= k.end;
  });
  if (!there) {
    register_memory(i);
    known.push_back(i);
  }
  return t;
}

#endif  // MOE_OPS_SIMULATED

OnCuda::Scope::Scope(const Tensor& first) {
  // The first tensor may be the one that lies elsewhere; the adapter's checks say so then.
  if (!first.is_cuda()) return;
  // Restores the device when it goes; it may leave a thread without a context as it is.
  const auto device = first.get_device_index();
  guard = std::make_unique<torch::stable::accelerator::DeviceGuard>(device);
  const cuda::Status status = cuda::bind_device(device);
  if (status != 0) {
    throw std::runtime_error("moe_ops: CUDA device " + std::to_string(device) +
                             " cannot be made current: " + cuda::error_string(status) + ".");
  }
#ifndef MOE_OPS_SIMULATED  // the simulator takes seconds for it, and loads nothing late
  cuda::load_kernels(device);
#endif
}

OnCuda::Scope::~Scope() = default;

Tensor device_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                    ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, sizes, dtype);
#ifdef MOE_OPS_SIMULATED
  if (t.is_cpu() && t.numel() > 0) {
    std::memset(t.mutable_data_ptr(), 0xFF,
                static_cast<size_t>(t.numel()) * static_cast<size_t>(t.element_size()));
  }
#endif
  return fresh(t);
}

Tensor token_rows(const Tensor& t) {
  const Tensor rows = with_dense_rows(t);
  const int64_t last = rows.dim() - 1, size = static_cast<int64_t>(rows.element_size());
  if (!batch_invariant() || rows.size(last) * size % 16 != 0) return rows;
  bool aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < last; ++d) {
    aligned = aligned && (rows.size(d) <= 1 || rows.stride(d) * size % 16 == 0);
  }
  if (aligned) return rows;
  return copy_of(rows, [](const Tensor& s) { return torch::stable::clone(s); });
}

// STABLE_ABI_WORKAROUND: the stream of the stable ABI has a native handle from torch 2.13 on, above
// our floor.
cuda::Stream current_stream(const Tensor& t) {
  if (!t.is_cuda()) return nullptr;
  const cuda::StreamSource& source = cuda::stream_source();
  if (source.current == nullptr) {
    throw std::runtime_error(
        "moe_ops: torch's current CUDA stream must be in libtorch_cuda.so, got " +
        std::string(source.library == nullptr ? "a torch that has loaded no such library"
                                              : "one without that function (torch before 2.10)") +
        "; run moe-ops doctor.");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(source.current(t.get_device_index(), &stream));
  return static_cast<cuda::Stream>(stream);
}

void check_status(const Op& op, cuda::Status status) {
  if (status == 0) [[likely]] {
    return;
  }
  throw std::runtime_error(std::string(op.name) + ": " + cuda::error_string(status));
}

Tensor device_offsets(const Op& op, const Tensor& offsets, int64_t num_rows) {
  check_index(op, "expert_offsets", offsets);
  check_dim(op, "expert_offsets", offsets, 1, "[E+1]");
  MOE_CHECK(offsets.numel() >= 2, op,
            ": expert_offsets must be [E+1] with at least one expert, got shape ",
            shape_string(offsets), ".");
  MOE_CHECK(num_rows <= std::numeric_limits<int32_t>::max(), op,
            ": expert_offsets must be of fewer than 2^31 rows on CUDA, got ", num_rows, ".");
  return contiguous_as(offsets, ScalarType::Int);
}

DeviceIndex device_index(const Op& op, const char* name, const Tensor& t) {
  check_index(op, name, t);
  DeviceIndex out{dense(t), nullptr, t.scalar_type() == ScalarType::Long};
  out.data = out.tensor.const_data_ptr();
  return out;
}

}  // namespace moe_ops::adapter

#endif  // MOE_OPS_WITH_CUDA
