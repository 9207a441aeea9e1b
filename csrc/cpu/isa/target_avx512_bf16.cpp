// AVX-512 with AVX512-BF16 and VNNI: kernels that write bfloat16, or multiply pairs of it or
// integers of 8 bits.
#define MOE_ISA avx512_bf16
#define MOE_BASE avx512
#define MOE_VEC_BYTES 64
#define MOE_MR1 24
#define MOE_MR2 14
#define MOE_DOT_TOKENS 4
#include "cpu/kernels/kernels-inl.h"
