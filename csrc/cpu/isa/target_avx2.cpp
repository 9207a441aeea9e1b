// AVX2 + FMA + F16C: 16 registers of 8 floats.
#define MOE_ISA avx2
#define MOE_VEC_BYTES 32
#define MOE_MR1 12
#define MOE_MR2 6
#define MOE_DOT_TOKENS 2
#define MOE_DOT_MAX_ROWS 8
#include "cpu/kernels/kernels-inl.h"
