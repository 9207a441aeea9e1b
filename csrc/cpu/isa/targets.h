// The targets: instruction sets for which the kernels are compiled, from the lowest to the highest.
// A new one is a line here, its file target_<name>.cpp, a line with its flags in CMakeLists.txt and
// the question whether a machine has it, in isa.cpp.
#pragma once

#if defined(__x86_64__)
#define MOE_HAS_X86 true
#else
#define MOE_HAS_X86 false
#endif
#if defined(MOE_OPS_HAS_AMX)
#define MOE_HAS_AMX true
#else
#define MOE_HAS_AMX false
#endif

// X(name and namespace, enumerator of Isa, whether the build has it)
#define MOE_FOR_EACH_TARGET(X)             \
  X(portable, kPortable, true)             \
  X(avx2, kAvx2, MOE_HAS_X86)              \
  X(avx512, kAvx512, MOE_HAS_X86)          \
  X(avx512_bf16, kAvx512Bf16, MOE_HAS_X86) \
  X(amx, kAmx, MOE_HAS_AMX)
