// Whether the kernels of a target compute what the portable ones do. A target that fails here,
// because of a compiler, an emulator or a processor with a fault, is not used.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "moe_ops/common.h"

namespace moe_ops::cpu {

template <class T>
struct Kernels;

// The microkernels of every height against their definition (kernels/tiles_self_test.cpp): nullptr,
// or the name of one that is wrong.
template <class T>
const char* failing_tile(const Kernels<T>& k);

// A number of 64ths below 1, which every type holds exactly, in memory.
void encode(DType type, double v, char* dst);

// The results of small calls of all ops on drawn numbers, with the kernels that this thread uses
// (select.cpp): sizes are such that every kernel has its turn. Operands are of `type`.
class SelfTest {
 public:
  struct Result {
    const char* name;
    DType type;        // of the numbers; kFloat64 without a tolerance: bytes
    double tolerance;  // of the largest number, or of 1; negative: bytes are compared
    std::vector<char> data;
  };

  explicit SelfTest(DType type) : type_(type) {}
  const std::vector<Result>& run();

 private:
  const void* draw(int64_t n);  // of `type`
  const void* draw(DType type, int64_t n);
  const int32_t* draw_ids(int64_t n, int32_t most);
  void* out(const char* name, int64_t n);
  void* out(const char* name, DType type, int64_t n);
  int32_t* out_ids(const char* name, int64_t n);
  void* bytes(int64_t n);  // scratch

  void rows();
  void products();
  void quantised_products();
  void activations();
  void mixtures();
  void attention();
  void routers();
  void small_experts();

  DType type_, sums_ = accumulate_type(type_);
  uint32_t state_ = 1;
  std::vector<std::vector<char>> operands_;
  std::vector<Result> results_;
};

}  // namespace moe_ops::cpu
