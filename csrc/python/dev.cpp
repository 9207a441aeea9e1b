// moe_ops_dev, what tests, benches and developers look into: which algorithm, tile or grid the
// heuristics choose, block sizes, tables of kernels. A pybind11 module of the source tree that no
// wheel holds. It calls the copy of the library that moe_ops has loaded, so moe_ops is imported
// first (bench/harness/dev.py).
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
#include "cpu/isa/isa.h"
#include "cuda/moe_ffn/choose.h"
#include "cuda/row_blocks.h"
#include "moe_ops/weight_format.h"

namespace py = pybind11;
using namespace moe_ops;

namespace {

constexpr int kSmsOfH100 = 132;

DType dtype_of(const std::string& dtype) {
  const std::map<std::string, DType> types{{"float64", DType::kFloat64},
                                           {"float32", DType::kFloat32},
                                           {"bfloat16", DType::kBFloat16},
                                           {"float16", DType::kFloat16}};
  const auto type = types.find(dtype);
  if (type != types.end()) return type->second;
  throw std::invalid_argument("cpu_gemm_config: dtype must be a float type, got " + dtype + ".");
}

cpu::Isa supported(const std::string& function, const std::string& isa) {
  const std::vector<std::string> isas = cpu::supported_isas();
  const auto at = std::find(isas.begin(), isas.end(), isa);
  if (at != isas.end()) return static_cast<cpu::Isa>(at - isas.begin());
  throw std::invalid_argument(function + ": isa must be supported here, got " + isa + ".");
}

// ---- kernels of an instruction set

std::vector<std::tuple<std::string, std::string, std::string, int64_t>> block_sizes() {
  std::vector<std::tuple<std::string, std::string, std::string, int64_t>> sizes;
  for (const auto& s : cpu::block_sizes()) sizes.emplace_back(s.family, s.axis, s.name, s.value);
  return sizes;
}

std::optional<std::string> failing_kernel(const std::string& isa, int64_t broken) {
  const char* name = cpu::failing_kernel(supported("failing_kernel", isa), broken);
  return name == nullptr ? std::nullopt : std::optional<std::string>(name);
}

std::vector<int64_t> kernel_entries(const std::string& isa) {
  return cpu::kernel_entries(supported("kernel_entries", isa));
}

// ---- what the heuristics choose

std::string cpu_gemm_config(const std::string& dtype, const std::string& layout, int64_t rows,
                            int64_t features, int64_t in_features, const std::string& isa,
                            bool intel, bool halves, bool invariant) {
  constexpr std::array kLayouts = {"dense_k", "dense_features", "packed", "int8",  "int4",
                                   "mxfp4",   "nvfp4",          "fp8",    "codes", "turned_codes"};
  const bool groups = layout == "int8_groups", e4m3 = layout == "e4m3";
  const auto at = std::find(kLayouts.begin(), kLayouts.end(),
                            groups ? "int8"
                            : e4m3 ? "codes"
                                   : layout);
  if (at == kLayouts.end()) {
    throw std::invalid_argument("cpu_gemm_config: layout must be known, got " + layout + ".");
  }
  cpu::GemmShape s;
  s.b = static_cast<cpu::GemmShape::B>(at - kLayouts.begin());
  s.float_scales = !groups;
  s.bf16_codes = e4m3;
  s.type = dtype_of(dtype);
  s.even = in_features % 2 == 0;
  s.segments = halves ? 2 : 1;
  s.features = s.range = features / s.segments;
  s.in_features = in_features;
  s.invariant = invariant;
  return cpu::gemm_config(s, accumulate_type(s.type), rows, supported("cpu_gemm_config", isa),
                          intel);
}

std::string ffn_config(const std::string& stage, int64_t rows, int64_t num_experts, int64_t n,
                       int64_t k, int num_sms, bool invariant) {
  using namespace moe_ops::cuda;
  const auto chosen = [&](Product product, const auto& configs) {
    const FfnTile tile =
        choose_ffn_tile({product, rows, num_experts, 0, n, k, num_sms, invariant}, configs);
    return std::string(kFfnTileNames[static_cast<int>(tile)]);
  };
  if (stage == "up") return chosen(Product::kGatherNT, kFfnUpConfigs);
  if (stage == "down_bwd") return chosen(Product::kGatherNN, kFfnDownBwdConfigs);
  throw std::invalid_argument("ffn_config: stage must be up or down_bwd, got " + stage + ".");
}

std::string gemm_config(const std::string& product, int64_t rows, int64_t num_experts, int64_t m,
                        int64_t n, int64_t k, int num_sms, bool invariant) {
  using namespace moe_ops::cuda;
  for (size_t i = 0; i < kProductNames.size(); ++i) {
    if (kProductNames[i] == product) {
      return to_string(
          choose_config({static_cast<Product>(i), rows, num_experts, m, n, k, num_sms, invariant}));
    }
  }
  throw std::invalid_argument(
      "gemm_config: product must be nt, nn, tn, or one of these with gather_ before it or _gather "
      "after it, got " +
      product + ".");
}

// ---- formats of quantized weights

using FormatTuple =
    std::tuple<std::string, int, int64_t, int64_t, int64_t, int64_t, std::string, bool, bool>;

std::vector<FormatTuple> weight_formats() {
  constexpr std::array kScales = {"float", "float32", "uint8"};
  std::vector<FormatTuple> all;
  for (const FormatRow& r : kFormats) {
    all.emplace_back(r.name, r.bits, r.group, r.rows, r.record, r.head,
                     kScales[static_cast<int>(r.scale)], r.row_scales, r.zeros);
  }
  return all;
}

std::optional<std::tuple<std::string, int64_t, std::string, bool, int64_t, bool>> weight_format(
    const std::string& name) {
  constexpr std::array kScales = {"float32", "bfloat16", "float16", "uint8"};
  const std::optional<WeightFormat> f = parse_weight_format(name);
  if (!f.has_value()) return std::nullopt;
  return std::tuple(std::string(f->row.name), f->group,
                    std::string(kScales[static_cast<int>(f->scale)]), f->zero, f->multiple(),
                    f->has_kernels());
}

std::array<unsigned, 3> row_blocks(int64_t rows, int64_t accesses, int64_t stretch) {
  const cuda::RowBlocks b = cuda::row_blocks(rows, accesses, stretch);
  return {b.x, b.y, b.z};
}

}  // namespace

PYBIND11_MODULE(moe_ops_dev, m) {
  using py::arg;
  m.doc() = "What tests and benches of moe_ops look into.";
  m.def("block_sizes", &block_sizes,
        "Returns (family, axis, name, value) of each size at which the kernels of the instruction "
        "set in use change what they do.");
  m.def("failing_kernel", &failing_kernel, arg("isa"), arg("broken") = -1,
        "Returns None, or the kernel of a supported instruction set that fails its self-test. "
        "Entry `broken` of its tables, one of kernel_entries(isa), is replaced by a function that "
        "does nothing.");
  m.def("kernel_entries", &kernel_entries, arg("isa"),
        "Returns the numbers of the entries of a supported instruction set's tables.");
  m.def("cpu_gemm_config", &cpu_gemm_config, arg("dtype"), arg("layout"), arg("rows"),
        arg("features"), arg("in_features"), arg("isa"), arg("intel"), arg("halves") = false,
        arg("invariant") = false,
        "Returns how the CPU multiplies the `rows` rows of an expert with a weight of that type "
        "and layout (dense_k, dense_features, packed, int8, int8_groups, int4, mxfp4, nvfp4, fp8, "
        "e4m3, codes, turned_codes): "
        "algorithm, operand and size of work items, on a processor of Intel's or another.");
  m.def("weight_formats", &weight_formats,
        "Returns (name, bits, group, rows, record, head, scales, row_scales, zeros) of each format "
        "of "
        "quantized weights, as moe_ops.weight_formats.FORMATS has them.");
  m.def("weight_format", &weight_format, arg("name"),
        "Returns None, or (name, group, dtype of scales, zero points, multiple, has_kernels) of "
        "the format that a name stands for.");
  m.def("ffn_config", &ffn_config, arg("stage"), arg("rows"), arg("num_experts"), arg("n"),
        arg("k"), arg("num_sms") = kSmsOfH100, arg("invariant") = false,
        "Returns the tile that a stage of moe_ffn, up or down_bwd, gets on a GPU: n columns of its "
        "result, sums of k.");
  m.def("gemm_config", &gemm_config, arg("product"), arg("rows"), arg("num_experts"), arg("m"),
        arg("n"), arg("k"), arg("num_sms") = kSmsOfH100, arg("invariant") = false,
        "Returns the tile that a grouped GEMM gets on an sm_90 GPU with so many SMs.");
  m.def("row_blocks", &row_blocks, arg("rows"), arg("accesses"), arg("stretch"),
        "Returns the grid of a CUDA kernel on whole rows.");
}
