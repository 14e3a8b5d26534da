// One source, several instruction sets, one binary. CMake compiles the files that compute, its CPU_SOURCES, once per
// instruction set, with MATPAC_ISA naming the namespace: portable, avx2, avx512. A file's kernels live in namespace
// matpac::MATPAC_ISA; its entry point, behind MATPAC_PORTABLE, exists once and calls the kernel that `MATPAC_DISPATCH`
// picks. Files that multiply bfloat16 are compiled a fourth time, for avx512_bf16, and pick with
// `MATPAC_DISPATCH_BF16`.
//
// Kernels must be plain loops over raw pointers: a standard template instantiated in the AVX pass could be the copy
// that the linker keeps for all.
#pragma once

namespace matpac {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best instruction set of this CPU, or a lower one where set_cpu_isa asked for it.
Isa isa();

}  // namespace matpac

#if defined(MATPAC_X86)
#define MATPAC_DECLARE(signature) \
  namespace matpac {              \
  namespace portable {            \
  signature;                      \
  }                               \
  namespace avx2 {                \
  signature;                      \
  }                               \
  namespace avx512 {              \
  signature;                      \
  }                               \
  namespace avx512_bf16 {         \
  signature;                      \
  }                               \
  }
#define MATPAC_DISPATCH(function)                                         \
  (::matpac::isa() >= ::matpac::Isa::avx512 ? &::matpac::avx512::function \
   : ::matpac::isa() == ::matpac::Isa::avx2 ? &::matpac::avx2::function   \
                                            : &::matpac::portable::function)
#else
#define MATPAC_DECLARE(signature) \
  namespace matpac {              \
  namespace portable {            \
  signature;                      \
  }                               \
  }
#define MATPAC_DISPATCH(function) (&::matpac::portable::function)
#endif

#if defined(MATPAC_AVX512_BF16)  // an older compiler has no such instructions
#define MATPAC_DISPATCH_BF16(function) \
  (::matpac::isa() == ::matpac::Isa::avx512_bf16 ? &::matpac::avx512_bf16::function : MATPAC_DISPATCH(function))
#else
#define MATPAC_DISPATCH_BF16(function) MATPAC_DISPATCH(function)
#endif
