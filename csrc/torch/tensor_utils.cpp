#include "torch/tensor_utils.h"

#include <algorithm>

#include "cpu/runtime/buffer_cache.h"

// STABLE_ABI_WORKAROUND: from_blob with a deleter is in the stable ABI from torch 2.11 on, one
// version above our floor. The weak symbol is null in 2.10, where large tensors then come from
// torch's allocator. Builds without a buffer cache do not reference it, because linkers of other
// systems do not accept such a symbol.
extern "C" AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* ret, int32_t layout,
    const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* ctx), void* deleter_ctx) __attribute__((weak));

namespace moe_ops::adapter {

namespace {

int32_t dtype_code(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// Returns nullopt if the cache is not available; torch's allocator is used then.
OptTensor cached_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, const int64_t* strides,
                        ScalarType dtype, size_t bytes) {
  OptTensor out;
  if constexpr (cpu::kHasBufferCache) {
    if (torch_from_blob == nullptr) return out;
    void* data = cpu::acquire_buffer(bytes);
    if (data == nullptr) return out;
    AtenTensorHandle handle = nullptr;
    const AOTITorchError error = torch_from_blob(
        data, static_cast<int64_t>(sizes.size()), sizes.data(), strides, 0, dtype_code(dtype),
        aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
        [](void* block, void*) { cpu::release_buffer(block); }, nullptr);
    if (error != 0) {
      cpu::release_buffer(data);
      return out;
    }
    out = Tensor(handle);
  }
  return out;
}

}  // namespace

Tensor empty_cpu(const Op& op, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  constexpr size_t kMaxDim = 8;
  MOE_CHECK(sizes.size() <= kMaxDim, op, ": the result must have at most ", kMaxDim,
            " dimensions, got ", sizes.size(), ".");
  const auto element = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_code(dtype)));
  int64_t strides[kMaxDim];
  int64_t stride = 1;
  bool empty = false, fits = true;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    fits &= !__builtin_mul_overflow(stride, std::max<int64_t>(sizes[d], 1), &stride);
    empty |= sizes[d] == 0;
  }
  int64_t bytes = 0;
  fits &= !__builtin_mul_overflow(stride, element, &bytes);
  MOE_CHECK(fits, op, ": the result must take fewer than 2^63 bytes, got shape ",
            shape_string(sizes), " of ", dtype_name(dtype), ".");
  if (!empty && static_cast<size_t>(bytes) >= cpu::kLargeBuffer) {
    if (OptTensor t = cached_tensor(sizes, strides, dtype, static_cast<size_t>(bytes))) return *t;
  }
  // Not torch::stable::empty, which goes through the dispatcher with boxed arguments and takes
  // three times as long, 0.5 us.
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                               dtype_code(dtype), aoti_torch_device_type_cpu(), 0, &handle) != 0) {
    throw OutOfMemory();
  }
  return Tensor(handle);
}

}  // namespace moe_ops::adapter
