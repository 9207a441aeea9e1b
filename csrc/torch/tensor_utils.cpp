#include "torch/tensor_utils.h"

#include "cpu/buffer_cache.h"

// STABLE_ABI_WORKAROUND: from_blob with a deleter is in the stable ABI from torch 2.11 on, one
// version above our floor. As a weak symbol it is null in 2.10, where large tensors then come from
// torch's allocator.
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

// nullopt: not available, take torch's allocator.
OptTensor cached_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype,
                        size_t bytes) {
  OptTensor out;
  if (torch_from_blob == nullptr) return out;
  void* data = cpu::acquire_buffer(bytes);
  if (data == nullptr) return out;
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = torch_from_blob(
      data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, dtype_code(dtype),
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* block, void*) { cpu::release_buffer(block); }, nullptr);
  if (error != 0) {
    cpu::release_buffer(data);
    return out;
  }
  out = Tensor(handle);
  return out;
}

}  // namespace

Tensor empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  size_t bytes = aoti_torch_dtype_element_size(dtype_code(dtype));
  for (size_t d = 0; d < sizes.size(); ++d) bytes *= static_cast<size_t>(sizes[d]);
  if (bytes >= cpu::kLargeBuffer) {
    if (OptTensor t = cached_tensor(sizes, dtype, bytes)) return *t;
  }
  return torch::stable::empty(sizes, dtype);
}

}  // namespace moe_ops::adapter
