// moe_ops._C: facts about the build and the CPU, settings of the CPU kernels. Sees no torch header;
// linking the op library is what registers torch.ops.moe_ops when this module is imported (after
// torch).
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
#include "python/bind.h"
#include "python/limits.h"

namespace moe_ops::python {
namespace {

using namespace moe_ops::cpu;

DType dtype_of(const std::string& function, const std::string& dtype) {
  const std::map<std::string, DType> types{{"float64", DType::kFloat64},
                                           {"float32", DType::kFloat32},
                                           {"bfloat16", DType::kBFloat16},
                                           {"float16", DType::kFloat16}};
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

// ---- facts about the build

std::string version() { return MOE_OPS_VERSION; }

std::map<std::string, std::string> build_info() {
  return {
      {"version", MOE_OPS_VERSION},           {"build_torch", MOE_OPS_BUILD_TORCH},
      {"torch_target", MOE_OPS_TORCH_TARGET}, {"compiler", MOE_OPS_COMPILER},
      {"cuda", MOE_OPS_CUDA_BUILD},           {"cuda_code", MOE_OPS_CUDA_CODE},
  };
}

// ---- instruction sets of the CPU

std::string active() { return isa_name(active_isa()); }
std::string detected() { return isa_name(detected_isa()); }

// (family, axis, name, value) of each size at which the kernels of the target in use change what
// they do.
std::vector<std::tuple<std::string, std::string, std::string, int64_t>> all_block_sizes() {
  std::vector<std::tuple<std::string, std::string, std::string, int64_t>> sizes;
  for (const BlockSize& s : block_sizes()) sizes.emplace_back(s.family, s.axis, s.name, s.value);
  return sizes;
}

// None, or the kernel of a supported target that fails its self-test; with entry `broken` of its
// tables, one of kernel_entries(target), replaced by a function that does nothing.
std::optional<std::string> first_failing_kernel(const std::string& target,
                                                std::optional<int64_t> broken) {
  const char* name = failing_kernel(supported("failing_kernel", target), broken.value_or(-1));
  if (name == nullptr) return std::nullopt;
  return name;
}

std::vector<int64_t> entries_of(const std::string& target) {
  const auto entries = kernel_entries(supported("kernel_entries", target));
  return {entries.begin(), entries.end()};
}

// Rates of every pass, of the target in use; other Python threads may measure at the same time.
std::map<std::string, std::vector<double>> rates(size_t bytes, double seconds) {
  const WithoutGil released;
  const Limits limits = measure_limits(active_isa(), bytes, seconds);
  return {{"fp32_flops", limits.fp32_flops},
          {"bf16_flops", limits.bf16_flops},
          {"read_bytes", limits.read_bytes}};
}

// ---- what the heuristics choose

// How the CPU multiplies the `rows` rows of an expert with a weight of that type and layout
// (dense_k, dense_features, packed, int8, int4, fp8, codes, turned_codes): algorithm, operand and
// size of work items, at any target and on a processor of Intel's or another.
std::string cpu_gemm_config(const std::string& dtype, const std::string& layout, int64_t rows,
                            int64_t features, int64_t in_features, const std::string& isa,
                            bool intel, std::optional<bool> halves, std::optional<bool> invariant) {
  constexpr std::array kLayouts = {"dense_k", "dense_features", "packed",      "int8", "int4",
                                   "fp8",     "codes",          "turned_codes"};
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
  s.segments = halves.value_or(false) ? 2 : 1;
  s.features = s.range = features / s.segments;
  s.in_features = in_features;
  s.invariant = invariant.value_or(false);
  return cpu::gemm_config(s, accumulate_type(s.type), rows, static_cast<Isa>(target - isas.begin()),
                          intel);
}

// Bytes of one expert [O, K] as pack_experts lays it out.
int64_t bytes_of_packed_expert(const std::string& dtype, int64_t out_features, int64_t in_features,
                               bool halves) {
  return packed_expert_bytes(dtype_of("packed_expert_bytes", dtype), out_features, in_features,
                             halves ? 2 : 1);
}

constexpr int kSmsOfH100 = 132;

// The tile that a stage of moe_ffn gets: n columns of its result, sums of k. Needs no card.
std::string ffn_config(const std::string& stage, int64_t rows, int64_t num_experts, int64_t n,
                       int64_t k, std::optional<int> num_sms, std::optional<bool> invariant) {
  using namespace moe_ops::cuda;
  const auto chosen = [&](Product product, const auto& configs) {
    const FfnTile tile = choose_ffn_tile({product, rows, num_experts, 0, n, k,
                                          num_sms.value_or(kSmsOfH100), invariant.value_or(false)},
                                         configs);
    return std::string(kFfnTileNames[static_cast<int>(tile)]);
  };
  if (stage == "up") return chosen(Product::kGatherNT, kFfnUpConfigs);
  if (stage == "down_bwd") return chosen(Product::kGatherNN, kFfnDownBwdConfigs);
  throw std::invalid_argument("ffn_config: stage must be up or down_bwd, got " + stage + ".");
}

// The tile that a product gets on an sm_90 card with so many SMs, in words; needs no card.
std::string cuda_gemm_config(const std::string& product, int64_t rows, int64_t num_experts,
                             int64_t m, int64_t n, int64_t k, std::optional<int> num_sms,
                             std::optional<bool> invariant) {
  using namespace moe_ops::cuda;
  for (size_t i = 0; i < kProductNames.size(); ++i) {
    if (kProductNames[i] == product) {
      return to_string(choose_config({static_cast<Product>(i), rows, num_experts, m, n, k,
                                      num_sms.value_or(kSmsOfH100), invariant.value_or(false)}));
    }
  }
  throw std::invalid_argument(
      "gemm_config: product must be nt, nn, tn, or one of these with gather_ before it or _gather "
      "after it, got " +
      product + ".");
}

// The grid of a CUDA kernel on whole rows; needs no card.
std::array<unsigned, 3> grid_of_rows(int64_t rows, int64_t accesses, int64_t stretch) {
  const cuda::RowBlocks b = cuda::row_blocks(rows, accesses, stretch);
  return {b.x, b.y, b.z};
}

// ---- CUDA

#ifdef MOE_OPS_WITH_CUDA
// The library that torch's current stream is asked of, and whether it answers; None: torch has
// loaded no such library.
std::optional<std::pair<std::string, bool>> stream_source() {
  const cuda::StreamSource& source = cuda::stream_source();
  if (source.library == nullptr) return std::nullopt;
  return std::pair(std::string(source.library), source.current != nullptr);
}

// None, or why a device cannot be made current. A thread has no context before that.
std::optional<std::string> bind_device(int device) {
  const cuda::Status status = cuda::bind_device(device);
  if (status == 0) return std::nullopt;
  return cuda::error_string(status);
}

// (name, error or None, compute capability of the machine code, of the PTX, registers, bytes that
// a thread spills) of every kernel on the current device.
std::vector<std::tuple<std::string, std::optional<std::string>, int, int, int, int64_t>>
cuda_kernels() {
  std::vector<std::tuple<std::string, std::optional<std::string>, int, int, int, int64_t>> all;
  for (const cuda::KernelInfo& k : cuda::kernel_infos()) {
    std::optional<std::string> error;
    if (k.status != 0) error = cuda::error_string(k.status);
    all.emplace_back(k.name, error, k.compiled_for, k.from_ptx, k.registers, k.spilled_bytes);
  }
  return all;
}
#endif

// ---- memory

size_t advise_huge_pages(uintptr_t data, size_t bytes) {
  const WithoutGil released;
  return use_huge_pages(reinterpret_cast<void*>(data), bytes);
}

void add_functions(PyObject* m) {
  add(m, "version", &version);
  add(m, "build_info", &build_info);
  add(m, "cpu_isa", &active);
  add(m, "detected_isa", &detected);
  add(m, "supported_isas", &supported_isas);
  add(m, "block_sizes", &all_block_sizes);
  add(m, "isa_warning", &isa_warning);
  add(m, "batch_invariant", &batch_invariant);
  add(m, "set_batch_invariant", &set_batch_invariant, "on");
  add(m, "failing_kernel", &first_failing_kernel, "target", "broken");
  add(m, "kernel_entries", &entries_of, "target");
  add(m, "measure_limits", &rates, "bytes", "seconds");
  add(m, "cpu_gemm_config", &cpu_gemm_config, "dtype", "layout", "rows", "features", "in_features",
      "isa", "intel", "halves", "invariant");
  add(m, "packed_expert_bytes", &bytes_of_packed_expert, "dtype", "out_features", "in_features",
      "halves");
  add(m, "ffn_config", &ffn_config, "stage", "rows", "num_experts", "n", "k", "num_sms",
      "invariant");
  add(m, "gemm_config", &cuda_gemm_config, "product", "rows", "num_experts", "m", "n", "k",
      "num_sms", "invariant");
  add(m, "row_blocks", &grid_of_rows, "rows", "accesses", "stretch");
#ifdef MOE_OPS_WITH_CUDA
  add(m, "set_sm_margin", &cuda::set_sm_margin, "sms");
  add(m, "sm_margin", &cuda::sm_margin);
  add(m, "stream_source", &stream_source);
  add(m, "bind_device", &bind_device, "device");
  add(m, "cuda_kernels", &cuda_kernels);
#endif
  add(m, "poison_scratch", &poison_scratch, "bytes");
  add(m, "stale_panels", &stale_panels);
  add(m, "cached_bytes", &cached_bytes);
  add(m, "cache_limit", &cache_limit);
  add(m, "release_cached", &release_cached);
  add(m, "use_huge_pages", &advise_huge_pages, "data", "bytes");
}

}  // namespace
}  // namespace moe_ops::python

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_C",
                                   "Build facts and the CPU instruction set of moe_ops.",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  try {
    moe_ops::python::add_functions(module);
  } catch (const moe_ops::python::ErrorSet&) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
