// The formats of quantized weights and their names, as python/moe_ops/weight_formats.py has them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

#include "moe_ops/common.h"
#include "moe_ops/grouped_gemm.h"

namespace moe_ops {

enum class ScaleKind : int { kFloat, kFloat32, kBytes };  // kFloat: the name says which

struct FormatRow {
  std::string_view name;
  Codes codes;
  int bits;        // of a weight; below 8, values are packed into bytes
  int64_t group;   // inputs that share a scale; 0: the name says it ("int4 g64")
  int64_t rows;    // outputs that share a scale
  int64_t record;  // bytes of the scales of a group; 0: one number
  int64_t head;    // bytes in front of the scales of a row
  ScaleKind scale;
  bool row_scales;  // a name without a group: one scale per output
  bool zeros;       // groups may have zero points
};

inline constexpr std::array kFormats = {
    FormatRow{"int8", Codes::kInt8, 8, 0, 1, 0, 0, ScaleKind::kFloat, true, false},
    FormatRow{"int4", Codes::kInt4, 4, 0, 1, 0, 0, ScaleKind::kFloat, false, true},
    FormatRow{"mxfp4", Codes::kMxfp4, 4, 32, 1, 0, 0, ScaleKind::kBytes, false, false},
    FormatRow{"fp8", Codes::kFp8, 8, kFp8Block, kFp8Block, 0, 0, ScaleKind::kFloat32, false, false},
    FormatRow{"e4m3", Codes::kE4m3, 8, 0, 1, 0, 0, ScaleKind::kFloat, true, false},
    FormatRow{"q4_k", Codes::kQ4K, 4, 256, 1, 16, 0, ScaleKind::kBytes, false, false},
    FormatRow{"q6_k", Codes::kQ6K, 6, 256, 1, 18, 0, ScaleKind::kBytes, false, false},
    FormatRow{"nvfp4", Codes::kNvfp4, 4, 16, 1, 0, 4, ScaleKind::kBytes, false, false},
};

// What a name stands for.
struct WeightFormat {
  FormatRow row;
  int64_t group;  // 0: a scale per output
  ScaleType scale;
  bool zero;

  // What the length of a row is a multiple of.
  int64_t multiple() const { return row.rows > 1 ? 1 : std::max<int64_t>(group, 1); }

  // There are kernels of integers; other weights become floats on the way.
  bool has_kernels() const {
    if (zero || scale != ScaleType::kFloat32) return false;
    if (row.codes == Codes::kInt8) return group == 0;
    return row.codes == Codes::kInt4 && (group == 32 || group == 64 || group == 128);
  }
};

// "int8", "int4 g64", "int4 g128 float16 zero", "mxfp4"; nothing for what is no name of a format.
inline std::optional<WeightFormat> parse_weight_format(std::string_view name) {
  std::string_view rest = name;
  // Takes this from the front of the rest, if words begin with it.
  const auto take = [&](std::string_view words) {
    if (!rest.starts_with(words)) return false;
    if (rest.size() > words.size() && rest[words.size()] != ' ') return false;
    rest.remove_prefix(words.size());
    return true;
  };
  const auto row = std::find_if(kFormats.begin(), kFormats.end(),
                                [&](const FormatRow& r) { return take(r.name); });
  if (row == kFormats.end()) return {};
  WeightFormat found{*row, row->group,
                     row->scale == ScaleKind::kBytes ? ScaleType::kBytes : ScaleType::kFloat32,
                     false};
  if (row->group == 0) {
    if (rest.starts_with(" g")) {
      const std::string_view size = rest.substr(2, rest.find(' ', 1) - 2);
      if (size.empty() || size.size() > 9 || size[0] == '0') return {};
      for (const char digit : size) {
        if (digit < '0' || digit > '9') return {};
        found.group = found.group * 10 + (digit - '0');
      }
      if (found.group % 32 != 0) return {};
      rest.remove_prefix(2 + size.size());
    } else if (!row->row_scales) {
      return {};
    }
    if (found.group != 0 && take(" bfloat16")) {
      found.scale = ScaleType::kBFloat16;
    } else if (found.group != 0 && take(" float16")) {
      found.scale = ScaleType::kFloat16;
    }
    found.zero = row->zeros && take(" zero");
  }
  if (!rest.empty()) return {};
  return found;
}

}  // namespace moe_ops
