// AVX-512 F, BW, DQ, VL: 32 registers of 16 floats.
#define MOE_ISA avx512
#define MOE_VEC_BYTES 64
#define MOE_MR1 24
#define MOE_MR2 14
#define MOE_DOT_TOKENS 4
#define MOE_DOT_MAX_ROWS 8
#include "cpu/kernels/kernels-inl.h"
