// Rows of codes to float32. Included by kernels-inl.h, inside its namespace. Loops of a fixed
// number of steps without branches, in which compilers find the vectors. Bytes are copied to local
// arrays first: elsewhere they might be the very floats that are written.

inline float scale_at(const DequantParams& p, int64_t i) {
  switch (p.scale_type) {
    case ScaleType::kBFloat16:
      return to_float(static_cast<const Bf16*>(p.scale)[i]);
    case ScaleType::kFloat16:
      return to_float(static_cast<const Fp16*>(p.scale)[i]);
    default:
      return static_cast<const float*>(p.scale)[i];
  }
}

// fn(i, dst) writes unit i of kUnit steps; of units that lie in the range in part only, that part
// is kept.
template <int kUnit, class Fn>
inline __attribute__((always_inline)) void for_units(const DequantParams& p, const Fn& fn) {
  float* dst = p.dst;
  const int64_t end = p.k0 + p.n;
  for (int64_t k = p.k0; k < end;) {
    const int64_t i = k / kUnit, first = i * kUnit;
    const int64_t last = first + kUnit < end ? first + kUnit : end;
    if (last - k == kUnit) {
      fn(i, dst);
    } else {
      float unit[kUnit];
      fn(i, unit);
      __builtin_memcpy(dst, unit + (k - first), (last - k) * sizeof(float));
    }
    dst += last - k;
    k = last;
  }
}

// dst[i] = fn(first + i) * scale for the runs of `group` steps that share one.
template <class Fn>
inline __attribute__((always_inline)) void for_groups(const DequantParams& p, int64_t group,
                                                      const Fn& fn) {
  const int64_t end = p.k0 + p.n;
  for (int64_t k = p.k0; k < end;) {
    const int64_t i = k / group, last = (i + 1) * group < end ? (i + 1) * group : end;
    fn(k, last - k, scale_at(p, i), p.dst + (k - p.k0));
    k = last;
  }
}

// dst[i] = q[i] * scale.
template <class Q>
inline void scaled(const Q* q, int64_t n, float scale, float* dst) {
  constexpr int kSteps = 32;
  int64_t i = 0;
  for (; i + kSteps <= n; i += kSteps) {
    Q part[kSteps];
    __builtin_memcpy(part, q + i, sizeof(part));
    for (int j = 0; j < kSteps; ++j) dst[i + j] = static_cast<float>(part[j]) * scale;
  }
  for (; i < n; ++i) dst[i] = static_cast<float>(q[i]) * scale;
}

// 32 codes of 4 bits, the even ones from low nibbles.
inline void nibbles(const uint8_t* bytes, uint8_t* codes) {
  uint16_t pairs[16];
  for (int j = 0; j < 16; ++j) {
    const uint16_t b = bytes[j];
    pairs[j] = static_cast<uint16_t>((b | b << 4) & 0x0f0f);
  }
  __builtin_memcpy(codes, pairs, sizeof(pairs));
}

inline void dequantise_int4(const DequantParams& p) {
  const auto* w = static_cast<const uint8_t*>(p.w);
  for_units<32>(p, [=](int64_t i, float* dst) __attribute__((always_inline)) {
    uint8_t codes[32];
    nibbles(w + i * 16, codes);
    const int64_t g = i * 32 / p.group;
    const float scale = scale_at(p, g);
    const int zero = p.zero != nullptr ? p.zero[g] : 8;
    for (int j = 0; j < 32; ++j) dst[j] = static_cast<float>(codes[j] - zero) * scale;
  });
}

// e2m1: magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6, which are half of integers.
inline void dequantise_mxfp4(const DequantParams& p) {
  const auto *w = static_cast<const uint8_t*>(p.w),
             *exponents = static_cast<const uint8_t*>(p.scale);
  for_units<32>(p, [=](int64_t i, float* dst) __attribute__((always_inline)) {
    uint8_t codes[32];
    nibbles(w + i * 16, codes);
    // 2^(e - 127); 255 is NaN, and 0 a subnormal number.
    const uint32_t e = exponents[i];
    const uint32_t bits = e == 0 ? 0x00400000u : e == 255 ? 0x7fc00000u : e << 23;
    const float half = __builtin_bit_cast(float, bits) * 0.5f;
    int8_t twice[32];
    for (int j = 0; j < 32; ++j) {
      const int x = codes[j] & 7, sign = -(codes[j] >> 3);
      const int over4 = (x - 4) & ~((x - 4) >> 31), over6 = (x - 6) & ~((x - 6) >> 31);
      twice[j] = static_cast<int8_t>(((x + over4 + 2 * over6) ^ sign) - sign);
    }
    scaled(twice, 32, half, dst);
  });
}

// A record of scales: d and dmin in float16, then 8 scales and 8 minima of 6 bits in 12 bytes.
inline void dequantise_q4k(const DequantParams& p) {
  const auto *w = static_cast<const uint8_t*>(p.w), *records = static_cast<const uint8_t*>(p.scale);
  for_units<32>(p, [=](int64_t i, float* dst) __attribute__((always_inline)) {
    const int64_t block = i / 8, j = i % 8;
    const uint8_t* record = records + block * 16;
    Fp16 d, dmin;
    __builtin_memcpy(&d, record, 2);
    __builtin_memcpy(&dmin, record + 2, 2);
    const uint8_t* s = record + 4;
    int scale = s[j] & 63, minimum = s[j + 4] & 63;
    if (j >= 4) {
      scale = (s[j + 4] & 15) | (s[j - 4] >> 6 << 4);
      minimum = s[j + 4] >> 4 | (s[j] >> 6 << 4);
    }
    const float step = to_float(d) * static_cast<float>(scale);
    const float low = to_float(dmin) * static_cast<float>(minimum);
    uint8_t codes[32];
    __builtin_memcpy(codes, w + block * 128 + j / 2 * 32, sizeof(codes));
    if (j % 2 == 0) {
      for (int l = 0; l < 32; ++l) codes[l] &= 15;
    } else {
      for (int l = 0; l < 32; ++l) codes[l] >>= 4;
    }
    for (int l = 0; l < 32; ++l) dst[l] = static_cast<float>(codes[l]) * step - low;
  });
}

// A record of scales: 16 of int8, each for 16 steps, then d in float16.
inline void dequantise_q6k(const DequantParams& p) {
  const auto *w = static_cast<const uint8_t*>(p.w), *records = static_cast<const uint8_t*>(p.scale);
  for_units<16>(p, [=](int64_t i, float* dst) __attribute__((always_inline)) {
    const int64_t block = i / 16, t = i % 16, half = t / 8, quarter = t % 8 / 2, first = t % 2 * 16;
    const uint8_t* record = records + block * 18;
    Fp16 d;
    __builtin_memcpy(&d, record + 16, 2);
    const float step = to_float(d) * static_cast<float>(static_cast<int8_t>(record[t]));
    uint8_t low[16], high[16];
    __builtin_memcpy(low, w + block * 192 + half * 64 + quarter % 2 * 32 + first, sizeof(low));
    __builtin_memcpy(high, w + block * 192 + 128 + half * 32 + first, sizeof(high));
    if (quarter < 2) {
      for (int l = 0; l < 16; ++l) low[l] &= 15;
    } else {
      for (int l = 0; l < 16; ++l) low[l] >>= 4;
    }
    const int shift = static_cast<int>(quarter) * 2;
    for (int l = 0; l < 16; ++l) {
      const int code = low[l] | (high[l] >> shift & 3) << 4;
      dst[l] = static_cast<float>(code - 32) * step;
    }
  });
}

void dequantise(const DequantParams& p) {
  switch (p.codes) {
    case Codes::kInt8: {
      const auto* w = static_cast<const int8_t*>(p.w);
      return for_groups(p, p.group, [=](int64_t k, int64_t n, float scale, float* dst) {
        scaled(w + k, n, scale, dst);
      });
    }
    case Codes::kFp8: {
      const auto* w = static_cast<const uint8_t*>(p.w);
      return for_groups(p, kFp8Block, [=](int64_t k, int64_t n, float scale, float* dst) {
        fp8_decode(w + k, dst, n);
        for (int64_t j = 0; j < n; ++j) dst[j] *= scale;
      });
    }
    case Codes::kInt4:
      return dequantise_int4(p);
    case Codes::kMxfp4:
      return dequantise_mxfp4(p);
    case Codes::kQ4K:
      return dequantise_q4k(p);
    case Codes::kQ6K:
      return dequantise_q6k(p);
  }
}
