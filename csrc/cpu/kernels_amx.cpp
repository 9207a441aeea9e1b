// AVX-512 with AVX512-BF16, and AMX tiles for products of bfloat16.
#define MOE_ISA amx
#define MOE_VEC_BYTES 64
#define MOE_MR1 24
#define MOE_MR2 14
#define MOE_DOT_TOKENS 4
#define MOE_DOT_MAX_ROWS 8
#define MOE_AMX
#include "cpu/kernels-inl.h"
