// From accumulators to memory.
//
// wgmma leaves columns 8 j + 2 q and 8 j + 2 q + 1 of rows r and r + 8 with lane 4 r + q of a warp.
// Packed to 16 bits that is 4 bytes a thread in every octet of columns. A transpose within the quad
// turns four octets into 16 bytes a thread, so that a quad stores 64 bytes of a row: whole sectors,
// no shared memory, no barrier, and the last rows of a group are a predicate. Kernels whose
// epilogue nothing hides store rows that follow each other by TMA instead (sm90_store_boxes.cuh).
//
// An epilogue is a struct with a Params and
//   template <class Config, class Acc>
//   static void store(const Params&, const Problem&, const Tile&, Acc& acc, int thread,
//                     unsigned char* boxes);
// acc(make_coord(c, i, j), m, 0) is column 8 j + 2 q + c of row output_row(m) + 8 i. boxes: of the
// thread's warp, with kStoreBoxes.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "cuda/grouped_gemm/sm90_store_boxes.cuh"
#include "cuda/quad.cuh"

namespace moe_ops::cuda::sm90 {

template <class Element>
__device__ inline uint32_t pack(float lo, float hi) {
  cutlass::NumericArrayConverter<Element, float, 2> convert;
  cutlass::Array<float, 2> in;
  in[0] = lo;
  in[1] = hi;
  auto out = convert(in);
  return reinterpret_cast<uint32_t&>(out);
}

template <class Element>
__device__ inline float2 unpack(uint32_t v) {
  cutlass::NumericArrayConverter<float, Element, 2> convert;
  auto out = convert(reinterpret_cast<cutlass::Array<Element, 2>&>(v));
  return make_float2(out[0], out[1]);
}

// Returns the row of the tile of accumulator row (m, i = 0) of `thread`, one of those that share
// the tile.
template <class Config>
__device__ inline int output_row(int thread, int m) {
  using T = Traits<Config>;
  return (m * T::kTileGroups + thread / kWarpgroup) * 64 + thread % kWarpgroup / kWarp * 16 +
         thread % kWarp / 4;
}

// Returns the row of the tile that is the first of the warp's 16.
template <class Config>
__device__ inline int box_row(int thread, int m) {
  return output_row<Config>(thread / kWarp * kWarp, m);
}

// Where rows go: row r to row index[r] / divisor of data (r itself when index is nullptr); nowhere
// if that is outside [0, limit).
struct OutRows {
  void* data;
  int64_t stride;  // elements
  bool fp32;       // else Config::Output
  const int32_t* index;
  int divisor;
  int64_t limit;

  // Returns the row's place, or -1.
  __device__ int64_t place(int row) const {
    int64_t at = row;
    if (index != nullptr) {
      const int i = __ldg(index + row);
      at = i < 0 ? -1 : i / divisor;
    }
    return at < limit ? at : -1;
  }
};

// One factor a row: data[index[r]], or data[r] without an index; zero outside [0, limit).
struct ScaleRows {
  const float* data;  // nullptr: ones
  const int32_t* index;
  int64_t limit;

  __device__ float at(int row) const {
    const int64_t i = index != nullptr ? __ldg(index + row) : row;
    return i >= 0 && i < limit ? __ldg(data + i) : 0.f;
  }
};

// Stores the tile, 64 bytes of a row a quad, or as fp32.
template <class Config, class Acc>
__device__ inline void store_rows(const OutRows& out, const Tile& tile, int cols, const Acc& acc,
                                  int thread) {
  using T = Traits<Config>;
  using Output = typename Config::Output;
  using cute::make_coord;
  const int q = thread % 4;
#pragma unroll
  for (int m = 0; m < T::kRowsM; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = tile.row0 + output_row<Config>(thread, m) + 8 * i;
      const int64_t place = row < tile.row_end ? out.place(row) : -1;
      const bool inside = place >= 0;
      if (out.fp32) {
        auto* to = static_cast<float*>(out.data) + place * out.stride + tile.col0 + 2 * q;
#pragma unroll
        for (int j = 0; j < T::kN / 8; ++j) {
          if (inside && tile.col0 + 8 * j < cols)
            *reinterpret_cast<float2*>(to + 8 * j) =
                make_float2(acc(make_coord(0, i, j), m, 0), acc(make_coord(1, i, j), m, 0));
        }
      } else {
        auto* to = static_cast<Output*>(out.data) + place * out.stride + tile.col0 + 8 * q;
#pragma unroll
        for (int g = 0; g < T::kN / 32; ++g) {
          uint32_t r[4];
#pragma unroll
          for (int b = 0; b < 4; ++b)
            r[b] = pack<Output>(acc(make_coord(0, i, 4 * g + b), m, 0),
                                acc(make_coord(1, i, 4 * g + b), m, 0));
          quad_transpose(r);
          if (inside && tile.col0 + 32 * g + 8 * q < cols)
            *reinterpret_cast<uint4*>(to + 32 * g) = make_uint4(r[0], r[1], r[2], r[3]);
        }
      }
    }
  }
}

// Stores all columns of the tile from `col0` on, for a warp's 16 rows, through its boxes.
template <class Config, class Acc>
__device__ inline void store_columns(StoreBoxes& box, const CUtensorMap& map, int col0, int cols,
                                     const Acc& acc, int m) {
  using cute::make_coord;
#pragma unroll
  for (int g = 0; g < Traits<Config>::kN / 64; ++g) {
    if (col0 + 64 * g >= cols) break;
    const int col = col0 + 64 * g;
    box.store<Halves::kPairs>(map, col, cols - col, [&](int i, int j) {
      return pack<typename Config::Output>(acc(make_coord(0, i, 8 * g + j), m, 0),
                                           acc(make_coord(1, i, 8 * g + j), m, 0));
    });
  }
}

// store_rows where rows of 16 bits follow each other. Rows of the map are `first_row` further than
// those of the tile; `end` is one of the tile's.
template <class Config, class Acc>
__device__ inline void store_rows(const CUtensorMap& map, const Tile& tile, int first_row, int end,
                                  int cols, const Acc& acc, int thread, unsigned char* boxes) {
#pragma unroll
  for (int m = 0; m < Traits<Config>::kRowsM; ++m) {
    const int row = tile.row0 + first_row + box_row<Config>(thread, m);
    StoreBoxes box(boxes, row, first_row + end);
    if (box.empty()) break;
    store_columns<Config>(box, map, tile.col0, cols, acc, m);
  }
}

// Computes acc *= scale[row].
template <class Config, class Acc>
__device__ inline void scale_rows(const ScaleRows& scale, const Tile& tile, Acc& acc, int thread) {
  using T = Traits<Config>;
#pragma unroll
  for (int m = 0; m < T::kRowsM; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = tile.row0 + output_row<Config>(thread, m) + 8 * i;
      const float s = row < tile.row_end ? scale.at(row) : 0.f;
#pragma unroll
      for (int j = 0; j < T::kN / 8; ++j) {
        acc(cute::make_coord(0, i, j), m, 0) *= s;
        acc(cute::make_coord(1, i, j), m, 0) *= s;
      }
    }
  }
}

// Computes acc += bias[col]; bias is the vector of the tile's expert.
template <class Config, class Acc>
__device__ inline void add_bias(const typename Config::Output* bias, const Tile& tile, int cols,
                                Acc& acc, int thread) {
  using T = Traits<Config>;
#pragma unroll
  for (int j = 0; j < T::kN / 8; ++j) {
    const int col = tile.col0 + 8 * j + 2 * (thread % 4);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float v = col < cols ? static_cast<float>(bias[col + c]) : 0.f;
#pragma unroll
      for (int m = 0; m < T::kRowsM; ++m) {
        acc(cute::make_coord(c, 0, j), m, 0) += v;
        acc(cute::make_coord(c, 1, j), m, 0) += v;
      }
    }
  }
}

// out[row, :] = scale[row] * acc + bias[expert]: ragged M.
struct StoreRows {
  struct Params {
    OutRows out;
    const void* bias;  // [E, n] of Config::Output, or nullptr
    int64_t bias_stride;
    ScaleRows scale;
    bool boxed;  // store through map_out
    CUtensorMap map_out;
  };

  template <class Config, class Acc>
  __device__ static void store(const Params& p, const Problem& problem, const Tile& tile, Acc& acc,
                               int thread, unsigned char* boxes) {
    using Output = typename Config::Output;
    if (tile.k_tiles > 0) {
      if (p.scale.data != nullptr) scale_rows<Config>(p.scale, tile, acc, thread);
      if (p.bias != nullptr)
        add_bias<Config>(static_cast<const Output*>(p.bias) + tile.expert * p.bias_stride, tile,
                         problem.n, acc, thread);
    }
    if (Config::kStoreBoxes && p.boxed) {
      const int end = static_cast<int>(min(int64_t{tile.row_end}, p.out.limit));
      store_rows<Config>(p.map_out, tile, 0, end, problem.n, acc, thread, boxes);
    } else {
      store_rows<Config>(p.out, tile, problem.n, acc, thread);
    }
  }
};

// Adds the values that store_rows would overwrite to acc.
template <class Config, class Acc>
__device__ inline void add_rows(const OutRows& out, const Tile& tile, int cols, Acc& acc,
                                int thread) {
  using T = Traits<Config>;
  using Output = typename Config::Output;
  using cute::make_coord;
  const int q = thread % 4;
#pragma unroll
  for (int m = 0; m < T::kRowsM; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = tile.row0 + output_row<Config>(thread, m) + 8 * i;
      const int64_t place = row < tile.row_end ? out.place(row) : -1;
      const bool inside = place >= 0;
      if (out.fp32) {
        const auto* from = static_cast<const float*>(out.data) + place * out.stride + tile.col0;
#pragma unroll
        for (int j = 0; j < T::kN / 8; ++j) {
          if (inside && tile.col0 + 8 * j < cols) {
            const float2 v = *reinterpret_cast<const float2*>(from + 8 * j + 2 * q);
            acc(make_coord(0, i, j), m, 0) += v.x;
            acc(make_coord(1, i, j), m, 0) += v.y;
          }
        }
      } else {
        const auto* from = static_cast<const Output*>(out.data) + place * out.stride + tile.col0;
#pragma unroll
        for (int g = 0; g < T::kN / 32; ++g) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (inside && tile.col0 + 32 * g + 8 * q < cols)
            v = *reinterpret_cast<const uint4*>(from + 32 * g + 8 * q);
          uint32_t r[4] = {v.x, v.y, v.z, v.w};
          quad_transpose(r);
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            const float2 f = unpack<Output>(r[b]);
            acc(make_coord(0, i, 4 * g + b), m, 0) += f.x;
            acc(make_coord(1, i, 4 * g + b), m, 0) += f.y;
          }
        }
      }
    }
  }
}

// out[expert] = acc, or += acc: ragged K. Every element is written; with `add`, experts without
// rows are left alone.
struct StoreExperts {
  struct Params {
    void* out;  // [E, m, n] contiguous
    bool out_fp32;
    bool add;
    bool boxed;  // store through map_out, of [E m, n]
    CUtensorMap map_out;
  };

  template <class Config, class Acc>
  __device__ static void store(const Params& p, const Problem& problem, const Tile& tile, Acc& acc,
                               int thread, unsigned char* boxes) {
    using Output = typename Config::Output;
    if (p.add && tile.k_tiles == 0) return;
    const int64_t bytes = p.out_fp32 ? sizeof(float) : sizeof(Output);
    char* data = static_cast<char*>(p.out) + int64_t{tile.expert} * problem.m * problem.n * bytes;
    const OutRows out{data, problem.n, p.out_fp32, nullptr, 1, problem.m};
    if (p.add) add_rows<Config>(out, tile, problem.n, acc, thread);
    if (Config::kStoreBoxes && p.boxed) {
      store_rows<Config>(p.map_out, tile, tile.expert * problem.m, tile.row_end, problem.n, acc,
                         thread, boxes);
    } else {
      store_rows<Config>(out, tile, problem.n, acc, thread);
    }
  }
};

}  // namespace moe_ops::cuda::sm90
