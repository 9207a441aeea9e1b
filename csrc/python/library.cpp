// The plain C functions that Python calls in the library at run time: facts about the build and the
// CPU, settings and memory of the process. python/moe_ops/_library.py declares them again, for
// ctypes; csrc/README.md says why they are neither ops nor a module of Python's C API.
//
// Text is UTF-8 and lives as long as the process; a null pointer is None. Lists are passed to a
// callback, entry by entry.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/gemm/prepack.h"
#include "cpu/isa/isa.h"
#include "cpu/isa/limits.h"
#include "cpu/runtime/buffer_cache.h"
#include "cpu/runtime/huge_pages.h"
#include "cpu/runtime/workspace.h"
#include "cuda/runtime.h"
#include "moe_ops/batch_invariant.h"
#include "moe_ops/platform.h"

#define MOE_FOR_PYTHON extern "C" MOE_OPS_API

using namespace moe_ops;

// ---- facts about the build

MOE_FOR_PYTHON const char* moe_ops_version() noexcept { return MOE_OPS_VERSION; }

// Returns a line for each fact: its name, a tab, its value.
MOE_FOR_PYTHON const char* moe_ops_build_info() noexcept {
  return "version\t" MOE_OPS_VERSION            // of the package
         "\nbuild_torch\t" MOE_OPS_BUILD_TORCH  // whose headers were used
         "\ntorch_target\t" MOE_OPS_TORCH_TARGET "\ncompiler\t" MOE_OPS_COMPILER
         "\ncuda\t" MOE_OPS_CUDA_BUILD "\ncuda_code\t" MOE_OPS_CUDA_CODE;
}

// ---- instruction sets of the CPU

MOE_FOR_PYTHON const char* moe_ops_cpu_isa() noexcept { return cpu::isa_name(cpu::active_isa()); }

MOE_FOR_PYTHON const char* moe_ops_detected_isa() noexcept {
  return cpu::isa_name(cpu::detected_isa());
}

// Returns the names, lowest first, separated by spaces.
MOE_FOR_PYTHON const char* moe_ops_supported_isas() noexcept {
  static const std::string names = [] {
    std::string all;
    for (const std::string& name : cpu::supported_isas()) all += (all.empty() ? "" : " ") + name;
    return all;
  }();
  return names.c_str();
}

MOE_FOR_PYTHON const char* moe_ops_isa_warning() noexcept {
  static const std::string warning = cpu::isa_warning();
  return warning.c_str();
}

// Returns null, or the kernel that fails the self-test of entry `isa` of the supported instruction
// sets.
MOE_FOR_PYTHON const char* moe_ops_failing_kernel(int isa) noexcept {
  return cpu::failing_kernel(static_cast<cpu::Isa>(isa));
}

using EachRate = void (*)(const char* what, double rate);

// Rates of every pass of the three loops, of the instruction set in use, in the calling thread.
MOE_FOR_PYTHON void moe_ops_measure_limits(size_t bytes, double seconds, EachRate each) noexcept {
  const cpu::Limits limits = cpu::measure_limits(cpu::active_isa(), bytes, seconds);
  for (const auto& [what, rates] :
       {std::pair("fp32_flops", &limits.fp32_flops), std::pair("bf16_flops", &limits.bf16_flops),
        std::pair("read_bytes", &limits.read_bytes)}) {
    for (const double rate : *rates) each(what, rate);
  }
}

// ---- settings of the process

MOE_FOR_PYTHON bool moe_ops_batch_invariant() noexcept { return batch_invariant(); }
MOE_FOR_PYTHON void moe_ops_set_batch_invariant(bool on) noexcept { set_batch_invariant(on); }

// ---- memory

// Returns the bytes of one expert [O, K] as pack_experts lays it out; -1 for a type that it does
// not take.
MOE_FOR_PYTHON int64_t moe_ops_packed_expert_bytes(const char* dtype, int64_t out_features,
                                                   int64_t in_features, bool halves) noexcept {
  constexpr std::pair<std::string_view, DType> kTypes[] = {{"float64", DType::kFloat64},
                                                           {"float32", DType::kFloat32},
                                                           {"bfloat16", DType::kBFloat16},
                                                           {"float16", DType::kFloat16}};
  for (const auto& [name, type] : kTypes) {
    if (name == dtype) {
      return cpu::packed_expert_bytes(type, out_features, in_features, halves ? 2 : 1);
    }
  }
  return -1;
}

MOE_FOR_PYTHON int64_t moe_ops_stale_panels() noexcept { return cpu::stale_panels(); }
MOE_FOR_PYTHON size_t moe_ops_cached_bytes() noexcept { return cpu::cached_bytes(); }
MOE_FOR_PYTHON size_t moe_ops_cache_limit() noexcept { return cpu::cache_limit(); }
MOE_FOR_PYTHON void moe_ops_release_cached() noexcept { cpu::release_cached(); }
MOE_FOR_PYTHON void moe_ops_poison_scratch(size_t bytes) noexcept { cpu::poison_scratch(bytes); }

MOE_FOR_PYTHON size_t moe_ops_use_huge_pages(void* data, size_t bytes) noexcept {
  return cpu::use_huge_pages(data, bytes);
}

// ---- CUDA: a build without its kernels has no margin, no stream and no device

using EachKernel = void (*)(const char* name, const char* error, int compiled_for, int from_ptx,
                            int registers, int64_t spilled_bytes);

#ifdef MOE_OPS_WITH_CUDA
MOE_FOR_PYTHON int moe_ops_sm_margin() noexcept { return cuda::sm_margin(); }
MOE_FOR_PYTHON void moe_ops_set_sm_margin(int sms) noexcept { cuda::set_sm_margin(sms); }

// Returns the library that provides torch's current stream, null if torch has loaded none;
// `answers` is set to whether it does.
MOE_FOR_PYTHON const char* moe_ops_stream_source(bool* answers) noexcept {
  const cuda::StreamSource& source = cuda::stream_source();
  *answers = source.current != nullptr;
  return source.library;
}

// Returns null, or the reason why a device cannot be made current. A thread has no context before
// that.
MOE_FOR_PYTHON const char* moe_ops_bind_device(int device) noexcept {
  const cuda::Status status = cuda::bind_device(device);
  return status == 0 ? nullptr : cuda::error_string(status);
}

// Passes every kernel on the current device to `each`, with the fields of KernelInfo.
MOE_FOR_PYTHON void moe_ops_cuda_kernels(EachKernel each) noexcept {
  for (const cuda::KernelInfo& k : cuda::kernel_infos()) {
    each(k.name.c_str(), k.status == 0 ? nullptr : cuda::error_string(k.status), k.compiled_for,
         k.from_ptx, k.registers, k.spilled_bytes);
  }
}
#else
MOE_FOR_PYTHON int moe_ops_sm_margin() noexcept { return 0; }
MOE_FOR_PYTHON void moe_ops_set_sm_margin(int) noexcept {}
MOE_FOR_PYTHON const char* moe_ops_stream_source(bool* answers) noexcept {
  *answers = false;
  return nullptr;
}
MOE_FOR_PYTHON const char* moe_ops_bind_device(int) noexcept {
  return "this build has no CUDA kernels";
}
MOE_FOR_PYTHON void moe_ops_cuda_kernels(EachKernel) noexcept {}
#endif
