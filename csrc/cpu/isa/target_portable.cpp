// 16-byte vectors, which are SSE2 on x86-64 and NEON on 64-bit Arm.
#define MOE_ISA portable
#define MOE_VEC_BYTES 16
#define MOE_MR1 8
#define MOE_MR2 4
#define MOE_DOT_TOKENS 2
#define MOE_DOT_MAX_ROWS 2
#include "cpu/kernels/kernels-inl.h"
