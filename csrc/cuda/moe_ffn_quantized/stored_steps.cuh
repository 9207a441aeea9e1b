// Steps of the kernel for stored formats: what a lane loads of 64 bytes of codes of four lines, and
// how these bytes become sums. A quad of lanes has a line: lane q its bytes 16 q to 16 q + 15,
// which are a unit of neighboring weights or, in ggml's formats, 16 bytes of a block.
//
// A step has
//   kWarps, kBlocksPerSm           as many as its registers allow
//   kWeights                       of a line
//   load(p, lines, step)           into registers; nothing waits for it
//   add(p, row, step, sum)         adds its products with a row to the sums of both tiles
//   line_factor(scales)            of a line's sums; `scales` are those of the line
#pragma once

#include <cutlass/fast_math.h>

#include "cuda/moe_ffn_quantized/few_block.cuh"
#include "cuda/moe_ffn_quantized/stored_codes.cuh"
#include "cuda/quad.cuh"

namespace moe_ops::cuda::quantized {

struct StoredLaunch {
  FewLaunch few;
  cutlass::FastDivmod group;  // weights that share a scale
  int depth, steps;
  int line_bytes;  // of codes
  bool aligned;    // lines start on 16 bytes and consist of whole 16 bytes
};

// The four lines of a lane, g and g + 8 of both tiles.
struct StoredLines {
  const uint8_t* codes[4];        // with the lane's place in a step
  int scale[4];                   // of the line's first group, from the expert's first on
  const uint8_t *scales, *zeros;  // of the expert; zeros may be nullptr
};

__device__ __forceinline__ int quad_lane() { return static_cast<int>(threadIdx.x) % 4; }

// Returns the value of a lane of the quad.
template <class T>
__device__ __forceinline__ T of_lane(T v, int lane) {
  return __shfl_sync(kAllLanes, v, lane, 4);
}

// Loads 16 bytes of each line, `ahead` of the lane's place, those from `count` on as zeros. Nobody
// reads these weights again before the next call.
__device__ __forceinline__ void load_codes(uint32_t (&words)[4][4], const StoredLines& lines,
                                           int64_t ahead, int count, bool aligned) {
  if (aligned && count > 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 v = __ldcs(reinterpret_cast<const uint4*>(lines.codes[i] + ahead));
      words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
    }
    return;
  }
  // Rare, and unrolled it would take the registers of what is on its way.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint8_t* const from = lines.codes[i] + ahead;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      words[i][word] = 0;
#pragma unroll 1
      for (int n = 4 * word; n < min(4 * word + 4, count); ++n)
        words[i][word] |= static_cast<uint32_t>(from[n]) << (8 * (n % 4));
    }
  }
}

__device__ __forceinline__ uint32_t load_word(const uint8_t* from, bool aligned) {
  if (aligned) return __ldcs(reinterpret_cast<const uint32_t*>(from));
  uint32_t v = 0;
#pragma unroll 1
  for (int n = 0; n < 4; ++n) v |= static_cast<uint32_t>(from[n]) << (8 * n);
  return v;
}

// --- scales of one number

// Loads a scale of each line, `group` groups into it.
__device__ __forceinline__ void load_scales(uint32_t (&scale)[4], ScaleType type,
                                            const StoredLines& lines, int group) {
  const auto load = [&](auto* scales) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scale[i] = scales[lines.scale[i] + group];
  };
  switch (type) {
    case ScaleType::kFloat32:
      return load(reinterpret_cast<const uint32_t*>(lines.scales));
    case ScaleType::kBytes:
      return load(lines.scales);
    default:
      return load(reinterpret_cast<const uint16_t*>(lines.scales));
  }
}

// Returns what load_scales found; bytes are exponents (e8m0): 2^(byte - 127), and 255 is NaN.
__device__ __forceinline__ float scale_value(ScaleType type, uint32_t bits) {
  if (type == ScaleType::kFloat32) return __uint_as_float(bits);
  if (type == ScaleType::kBFloat16) return __uint_as_float(bits << 16);
  if (type == ScaleType::kFloat16) return __half2float(__ushort_as_half(bits));
  return __uint_as_float(bits == 0 ? 0x00400000u : bits == 255 ? 0x7fc00000u : bits << 23);
}

template <class S, Codes kCodes>
struct GroupedStep {
  static constexpr bool kBytes = kCodes == Codes::kInt8 || kCodes == Codes::kE4m3;
  static constexpr int kWarps = 8, kBlocksPerSm = 2;
  static constexpr int kUnit = kBytes ? 16 : 32;  // weights of a lane
  static constexpr int kWeights = 4 * kUnit;
  uint32_t words[4][4];
  uint32_t scale[4], zero[4];

  static __device__ __forceinline__ ScaleType scale_type(const StoredLaunch& p) {
    return kCodes == Codes::kMxfp4 ? ScaleType::kBytes : p.few.s.w.format.scale_type;
  }

  // One lane loads the scale of a group: the first of the quad that has codes of it.
  __device__ __forceinline__ void load(const StoredLaunch& p, const StoredLines& lines, int step) {
    const int q = quad_lane(), count = p.line_bytes - 64 * step - 16 * q;
    int group, rest;
    p.group(group, rest, step * kWeights + q * kUnit);
    load_codes(words, lines, int64_t{64} * step, count, p.aligned);
#pragma unroll
    for (int i = 0; i < 4; ++i) scale[i] = 0, zero[i] = 8;
    if (count <= 0 || (q > 0 && rest > 0)) return;
    load_scales(scale, scale_type(p), lines, group);
    if constexpr (kCodes == Codes::kInt4) {
      if (lines.zeros == nullptr) return;
#pragma unroll
      for (int i = 0; i < 4; ++i) zero[i] = lines.zeros[lines.scale[i] + group];
    }
  }

  // After a transpose within the quad, word i of all lanes is what lane i has loaded: 16 or 32
  // neighboring weights of one group.
  __device__ __forceinline__ void add(const StoredLaunch& p, const S* row, int step,
                                      float (&sum)[2][4]) {
    const int q = quad_lane(), first = step * kWeights;
    int group, rest;
    p.group(group, rest, first + q * kUnit);
    const int loader = max(q - rest / kUnit, 0);
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[i] = scale_value(scale_type(p), scale[i]);
      quad_transpose(words[i]);
    }
#pragma unroll
    for (int unit = 0; unit < 4; ++unit) {
      const int k = first + unit * kUnit;
      const int from = of_lane(loader, unit);
      FourNumbers<S> x[2] = {};  // past the end, where codes stand for anything
      if (k < p.depth) {
        if constexpr (kBytes) {
          x[0] = in_order(row + k + 4 * q);
        } else {
          nibble_order(row + k + 8 * q, x);
        }
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        uint32_t zeros[2] = {8, 8};
        if constexpr (kCodes == Codes::kInt4) {
          zeros[0] = of_lane(zero[2 * tile], from);
          zeros[1] = of_lane(zero[2 * tile + 1], from);
        }
        float part[4] = {};
#pragma unroll
        for (int m = 0; m < (kBytes ? 1 : 2); ++m) {
          const auto codes = [&](int half) {
            return four(words[2 * tile + half][unit], m, zeros[half]);
          };
          multiply<S>(part, codes(0), codes(1), x[m]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float factor = of_lane(value[2 * tile + half], from);
#pragma unroll
          for (int n = 2 * half; n < 2 * half + 2; ++n)
            sum[tile][n] = fmaf(part[n], factor, sum[tile][n]);
        }
      }
    }
  }

  static __device__ __forceinline__ FourCodes<S> four(uint32_t word, int m, uint32_t zero) {
    if constexpr (kCodes == Codes::kInt8) {
      return int8_codes<S>(word);
    } else if constexpr (kCodes == Codes::kE4m3) {
      return e4m3_codes<S>(word);
    } else if constexpr (kCodes == Codes::kInt4) {
      return int4_codes<S>(word, m, zero);
    } else {
      return e2m1_codes<S>(word, m);
    }
  }

  static __device__ __forceinline__ float line_factor(const uint8_t*) { return 1.0f; }
};

// --- nvfp4. Each 16 codes have a scale of e4m3, and the product of both is exact: words stay with
// the lane that has loaded them.

template <class S>
struct Nvfp4Step {
  static constexpr int kWarps = 4, kBlocksPerSm = 3;
  static constexpr int kWeights = 128;
  static constexpr int kHead = 4;  // bytes of a line's factor, ahead of its scales
  uint32_t words[4][4];
  uint32_t scale[4];  // of the lane's two groups, in the lowest bytes

  __device__ __forceinline__ void load(const StoredLaunch& p, const StoredLines& lines, int step) {
    const int q = quad_lane(), k = step * kWeights + 32 * q;
    const int count = p.line_bytes - 64 * step - 16 * q;
    load_codes(words, lines, int64_t{64} * step, count, p.aligned);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* const from = lines.scales + lines.scale[i] + kHead + k / 16;
      scale[i] = (k < p.depth ? from[0] : 0u) | (k + 16 < p.depth ? from[1] << 8 : 0u);
    }
  }

  __device__ __forceinline__ void add(const StoredLaunch& p, const S* row, int step,
                                      float (&sum)[2][4]) {
    const int first = step * kWeights + 32 * quad_lane();
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int k = first + 8 * word;
      FourNumbers<S> x[2] = {};
      if (k < p.depth) nibble_order(row + k, x);
      const auto factors = [&](int i) {
        return e4m3_pair<Half<S>>(__byte_perm(scale[i], 0, word < 2 ? 0x0404 : 0x1414));
      };
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const uint32_t low = factors(2 * tile), high = factors(2 * tile + 1);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply<S>(sum[tile], scaled_e2m1_codes<S>(words[2 * tile][word], m, low),
                      scaled_e2m1_codes<S>(words[2 * tile + 1][word], m, high), x[m]);
        }
      }
    }
  }

  static __device__ __forceinline__ float line_factor(const uint8_t* scales) {
    return __uint_as_float(load_word(scales, false));
  }
};

// --- ggml's q4_K: a step is half a block of 256. Access i of the quad has 16 codes of run i / 2 *
// 2 in the low halves of its bytes and 16 of the next run in the high halves; a run is 32 weights
// `code * step - low`. Multiplied with ones, a run of the row becomes the sum that lows multiply.

template <class S>
struct Q4KStep {
  static constexpr int kWarps = 4, kBlocksPerSm = 3;
  static constexpr int kWeights = 128;
  uint32_t words[4][4];
  uint32_t record[4];  // the lane's word of the block's 16 bytes

  __device__ __forceinline__ void load(const StoredLaunch& p, const StoredLines& lines, int step) {
    const int q = quad_lane();
    load_codes(words, lines, int64_t{64} * step, 16, p.aligned);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* const from = lines.scales + lines.scale[i] + step / 2 * 16 + 4 * q;
      // The last word is about the second half.
      record[i] = q < 3 || step % 2 == 1 ? *reinterpret_cast<const uint32_t*>(from) : 0;
    }
  }

  __device__ __forceinline__ void add(const StoredLaunch&, const S* row, int step,
                                      float (&sum)[2][4]) {
    const int q = quad_lane();
    float slope[4], low[4];  // of run q of the four
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t factors = of_lane(record[i], 0);
      const uint32_t first_slope = of_lane(record[i], 1) >> (8 * q) & 0xff;
      const uint32_t first_low = of_lane(record[i], 2) >> (8 * q) & 0xff;
      const uint32_t other = of_lane(record[i], 3) >> (8 * q) & 0xff;
      const bool second = step % 2 == 1;
      const uint32_t slopes = second ? (first_slope >> 6 << 4) | (other & 15) : first_slope & 63;
      const uint32_t lows = second ? (first_low >> 6 << 4) | (other >> 4) : first_low & 63;
      const float2 d = __half22float2(as_pair<fp16>(factors));
      slope[i] = d.x * static_cast<float>(slopes);
      low[i] = d.y * static_cast<float>(lows);
      quad_transpose(words[i]);
    }
    const S* const x = row + step * kWeights + 4 * q;
    const uint32_t one = std::is_same_v<Half<S>, bf16> ? 0x3f803f80u : 0x3c003c00u;
    const FourCodes<S> ones(one, one);
#pragma unroll
    for (int run = 0; run < 4; ++run) {
      float part[2][4] = {}, total[4] = {};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const FourNumbers<S> numbers = even_first(x + 32 * run + 16 * n);
        const int access = run / 2 * 2 + n;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          multiply<S>(part[tile], int4_codes<S>(words[2 * tile][access], run % 2, 0),
                      int4_codes<S>(words[2 * tile + 1][access], run % 2, 0), numbers);
        }
        multiply<S>(total, ones, ones, numbers);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a = of_lane(slope[i], run), b = of_lane(low[i], run);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float& to = sum[i / 2][i % 2 * 2 + n];
          to = fmaf(-b, total[n], fmaf(part[i / 2][i % 2 * 2 + n], a, to));
        }
      }
    }
  }

  static __device__ __forceinline__ float line_factor(const uint8_t*) { return 1.0f; }
};

// --- ggml's q6_K: a step is half a block of 256. Access i of the quad has the low bits of 16 codes
// from weight 16 i of the half on in the low halves of its bytes, and from 64 + 16 i on in the high
// halves; each 16 have a scale. Their upper bits are in 32 bytes of four codes each.

template <class S>
struct Q6KStep {
  static constexpr int kWarps = 4, kBlocksPerSm = 3;
  static constexpr int kWeights = 128;
  uint32_t words[4][4];
  uint32_t upper[4][2];  // words q and q + 4 of the 32 bytes
  uint32_t scale[4];     // of the 16 weights of access q: low halves, high halves; the factor

  __device__ __forceinline__ void load(const StoredLaunch& p, const StoredLines& lines, int step) {
    const int q = quad_lane(), half = step % 2, block = step / 2;
    load_codes(words, lines, int64_t{192} * block + 64 * half, 16, p.aligned);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* const codes = lines.codes[i] + int64_t{192} * block;
#pragma unroll
      for (int n = 0; n < 2; ++n)
        upper[i][n] = load_word(codes + 128 + 32 * half + 16 * n - 12 * q, p.aligned);
      const uint8_t* const from = lines.scales + lines.scale[i] + 18 * block;
      scale[i] = from[8 * half + q] | from[8 * half + 4 + q] << 8;
      if (q == 0) scale[i] |= *reinterpret_cast<const uint16_t*>(from + 16) << 16;
    }
  }

  __device__ __forceinline__ void add(const StoredLaunch&, const S* row, int step,
                                      float (&sum)[2][4]) {
    const int q = quad_lane();
    float factor[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      factor[i] = __half2float(__ushort_as_half(of_lane(scale[i], 0) >> 16));
      quad_transpose(words[i]);
    }
    const S* const x = row + step * kWeights + 4 * q;
#pragma unroll
    for (int access = 0; access < 4; ++access) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const FourNumbers<S> numbers = even_first(x + 64 * m + 16 * access);
        const int shift = access / 2 * 2 + 4 * m;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const auto codes = [&](int half) {
            const int i = 2 * tile + half;
            return six_bit_codes<S>(words[i][access], m, upper[i][access % 2], shift);
          };
          float part[4] = {};
          multiply<S>(part, codes(0), codes(1), numbers);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = 2 * tile + half;
            const auto own = static_cast<int8_t>(of_lane(scale[i], access) >> (8 * m));
            const float value = factor[i] * static_cast<float>(own);
#pragma unroll
            for (int n = 2 * half; n < 2 * half + 2; ++n)
              sum[tile][n] = fmaf(part[n], value, sum[tile][n]);
          }
        }
      }
    }
  }

  static __device__ __forceinline__ float line_factor(const uint8_t*) { return 1.0f; }
};

}  // namespace moe_ops::cuda::quantized
