// moe_ops._C: facts about the build and the CPU, settings of the CPU kernels. Sees no torch header;
// linking the op library is what registers torch.ops.moe_ops when this module is imported (after
// torch).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/gemm/blocking.h"
#include "cpu/gemm/heuristics.h"
#include "cpu/gemm/prepack.h"
#include "cpu/isa/isa.h"
#include "cpu/runtime/buffer_cache.h"
#include "cpu/runtime/huge_pages.h"
#include "cpu/runtime/workspace.h"
#include "cuda/moe_ffn/choose.h"
#include "cuda/row_blocks.h"
#include "cuda/runtime.h"
#include "moe_ops/batch_invariant.h"
#include "python/limits.h"

namespace py = pybind11;
using namespace moe_ops::cpu;

namespace {

moe_ops::DType dtype_of(const std::string& function, const std::string& dtype) {
  const std::map<std::string, moe_ops::DType> types{{"float64", moe_ops::DType::kFloat64},
                                                    {"float32", moe_ops::DType::kFloat32},
                                                    {"bfloat16", moe_ops::DType::kBFloat16},
                                                    {"float16", moe_ops::DType::kFloat16}};
  const auto type = types.find(dtype);
  if (type != types.end()) return type->second;
  throw std::invalid_argument(function + ": dtype must be a float type, got " + dtype + ".");
}

Isa supported(const std::string& function, const std::string& target) {
  const std::vector<std::string> targets = supported_isas();
  const auto at = std::find(targets.begin(), targets.end(), target);
  if (at != targets.end()) return static_cast<Isa>(at - targets.begin());
  throw std::invalid_argument(function + ": target must be supported here, got " + target + ".");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and the CPU instruction set of moe_ops.";
  m.def("version", [] { return std::string(MOE_OPS_VERSION); });
  m.def("build_info", [] {
    return std::map<std::string, std::string>{
        {"version", MOE_OPS_VERSION},           {"build_torch", MOE_OPS_BUILD_TORCH},
        {"torch_target", MOE_OPS_TORCH_TARGET}, {"compiler", MOE_OPS_COMPILER},
        {"cuda", MOE_OPS_CUDA_BUILD},           {"cuda_code", MOE_OPS_CUDA_CODE},
    };
  });
  m.def("cpu_isa", [] { return std::string(isa_name(active_isa())); });
  m.def("detected_isa", [] { return std::string(isa_name(detected_isa())); });
  m.def("supported_isas", &supported_isas);
  // (family, axis, name, value) of each size at which the kernels of the target in use change what
  // they do.
  m.def("block_sizes", [] {
    std::vector<std::tuple<std::string, std::string, std::string, int64_t>> sizes;
    for (const BlockSize& s : block_sizes()) sizes.emplace_back(s.family, s.axis, s.name, s.value);
    return sizes;
  });
  m.def("isa_warning", &isa_warning);
  m.def("batch_invariant", &moe_ops::batch_invariant);
  m.def("set_batch_invariant", &moe_ops::set_batch_invariant, py::arg("on"));
  // None, or the kernel of a supported target that fails its self-test; with entry `broken` of its
  // tables, one of kernel_entries(target), replaced by a function that does nothing.
  m.def(
      "failing_kernel",
      [](const std::string& target, int64_t broken) -> std::optional<std::string> {
        const char* name = failing_kernel(supported("failing_kernel", target), broken);
        return name == nullptr ? std::nullopt : std::optional<std::string>(name);
      },
      py::arg("target"), py::arg("broken") = -1);
  m.def("kernel_entries", [](const std::string& target) {
    return kernel_entries(supported("kernel_entries", target));
  });
  // Rates of every pass, of the target in use; other Python threads may measure at the same time.
  m.def("measure_limits", [](size_t bytes, double seconds) {
    const Isa isa = active_isa();
    Limits limits;
    {
      py::gil_scoped_release release;
      limits = measure_limits(isa, bytes, seconds);
    }
    return std::map<std::string, std::vector<double>>{{"fp32_flops", limits.fp32_flops},
                                                      {"bf16_flops", limits.bf16_flops},
                                                      {"read_bytes", limits.read_bytes}};
  });
  // How the CPU multiplies the `rows` rows of an expert with a weight of that type and layout
  // (dense_k, dense_features, packed, int8, int4, fp8): algorithm, operand and size of work items,
  // at any target and on a processor of Intel's or another.
  m.def(
      "cpu_gemm_config",
      [](const std::string& dtype, const std::string& layout, int64_t rows, int64_t features,
         int64_t in_features, const std::string& isa, bool intel, bool halves, bool invariant) {
        constexpr std::array kLayouts = {"dense_k", "dense_features", "packed",
                                         "int8",    "int4",           "fp8"};
        const auto at = std::find(kLayouts.begin(), kLayouts.end(), layout);
        const std::vector<std::string> isas = supported_isas();
        const auto target = std::find(isas.begin(), isas.end(), isa);
        if (at == kLayouts.end() || target == isas.end()) {
          throw std::invalid_argument("cpu_gemm_config: layout and isa must be known here, got " +
                                      layout + " and " + isa + ".");
        }
        GemmShape s;
        s.b = static_cast<GemmShape::B>(at - kLayouts.begin());
        s.type = dtype_of("cpu_gemm_config", dtype);
        s.even = in_features % 2 == 0;
        s.segments = halves ? 2 : 1;
        s.features = s.range = features / s.segments;
        s.in_features = in_features;
        s.invariant = invariant;
        return gemm_config(s, moe_ops::accumulate_type(s.type), rows,
                           static_cast<Isa>(target - isas.begin()), intel);
      },
      py::arg("dtype"), py::arg("layout"), py::arg("rows"), py::arg("features"),
      py::arg("in_features"), py::arg("isa"), py::arg("intel"), py::arg("halves") = false,
      py::arg("invariant") = false);
  // Bytes of one expert [O, K] as pack_experts lays it out.
  m.def("packed_expert_bytes",
        [](const std::string& dtype, int64_t out_features, int64_t in_features, bool halves) {
          return packed_expert_bytes(dtype_of("packed_expert_bytes", dtype), out_features,
                                     in_features, halves ? 2 : 1);
        });
  // The tile that a stage of moe_ffn gets: n columns of its result, sums of k. Needs no card.
  m.def(
      "ffn_config",
      [](const std::string& stage, int64_t rows, int64_t num_experts, int64_t n, int64_t k,
         int num_sms, bool invariant) {
        using namespace moe_ops::cuda;
        const auto chosen = [&](Product product, const auto& configs) {
          const FfnTile tile =
              choose_ffn_tile({product, rows, num_experts, 0, n, k, num_sms, invariant}, configs);
          return std::string(kFfnTileNames[static_cast<int>(tile)]);
        };
        if (stage == "up") return chosen(Product::kGatherNT, kFfnUpConfigs);
        if (stage == "down_bwd") return chosen(Product::kGatherNN, kFfnDownBwdConfigs);
        throw std::invalid_argument("ffn_config: stage must be up or down_bwd, got " + stage + ".");
      },
      py::arg("stage"), py::arg("rows"), py::arg("num_experts"), py::arg("n"), py::arg("k"),
      py::arg("num_sms") = 132, py::arg("invariant") = false);
  // The tile that a product gets on an sm_90 card with so many SMs, in words; needs no card.
  m.def(
      "gemm_config",
      [](const std::string& product, int64_t rows, int64_t num_experts, int64_t m, int64_t n,
         int64_t k, int num_sms, bool invariant) {
        using namespace moe_ops::cuda;
        for (size_t i = 0; i < kProductNames.size(); ++i) {
          if (kProductNames[i] == product)
            return to_string(choose_config(
                {static_cast<Product>(i), rows, num_experts, m, n, k, num_sms, invariant}));
        }
        throw std::invalid_argument(
            "gemm_config: product must be nt, nn, tn, or one of these with "
            "gather_ before it or _gather after it, got " +
            product + ".");
      },
      py::arg("product"), py::arg("rows"), py::arg("num_experts"), py::arg("m"), py::arg("n"),
      py::arg("k"), py::arg("num_sms") = 132, py::arg("invariant") = false);
  // The grid of a CUDA kernel on whole rows; needs no card.
  m.def("row_blocks", [](int64_t rows, int64_t accesses, int64_t stretch) {
    const moe_ops::cuda::RowBlocks b = moe_ops::cuda::row_blocks(rows, accesses, stretch);
    return std::array<unsigned, 3>{b.x, b.y, b.z};
  });
#ifdef MOE_OPS_WITH_CUDA
  m.def("set_sm_margin", &moe_ops::cuda::set_sm_margin, py::arg("sms"));
  m.def("sm_margin", &moe_ops::cuda::sm_margin);
  // The library that torch's current stream is asked of, and whether it answers; None: torch has
  // loaded no such library.
  m.def("stream_source", []() -> std::optional<std::pair<std::string, bool>> {
    const moe_ops::cuda::StreamSource& source = moe_ops::cuda::stream_source();
    if (source.library == nullptr) return std::nullopt;
    return std::pair(std::string(source.library), source.current != nullptr);
  });
  // None, or why a device cannot be made current. A thread has no context before that.
  m.def("bind_device", [](int device) -> std::optional<std::string> {
    const moe_ops::cuda::Status status = moe_ops::cuda::bind_device(device);
    if (status == 0) return std::nullopt;
    return moe_ops::cuda::error_string(status);
  });
  // (name, error or None, compute capability of the machine code, of the PTX, registers, bytes that
  // a thread spills) of every kernel on the current device.
  m.def("cuda_kernels", [] {
    std::vector<std::tuple<std::string, std::optional<std::string>, int, int, int, int64_t>> all;
    for (const moe_ops::cuda::KernelInfo& k : moe_ops::cuda::kernel_infos()) {
      std::optional<std::string> error;
      if (k.status != 0) error = moe_ops::cuda::error_string(k.status);
      all.emplace_back(k.name, error, k.compiled_for, k.from_ptx, k.registers, k.spilled_bytes);
    }
    return all;
  });
#endif
  m.def("poison_scratch", &poison_scratch, py::arg("bytes"));
  m.def("stale_panels", &stale_panels);
  m.def("cached_bytes", &cached_bytes);
  m.def("cache_limit", &cache_limit);
  m.def("release_cached", &release_cached);
  m.def(
      "use_huge_pages",
      [](uintptr_t data, size_t bytes) {
        const py::gil_scoped_release released;
        return use_huge_pages(reinterpret_cast<void*>(data), bytes);
      },
      py::arg("data"), py::arg("bytes"));
}
