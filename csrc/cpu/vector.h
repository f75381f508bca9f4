// Fixed-width vectors in the compiler's own notation, and the choice of instruction set.
//
// Hot loops lie in *.inc files that are included once per instruction set, in a namespace of its own, with
//   DETLIB_TARGET   the attribute every function in the file bears,
//   kVectorBytes    the width of a vector register.
// This is not done with target_clones: compilers break vectors down to what the baseline has before they clone.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define DETLIB_HAS_AVX2 1
#else
#define DETLIB_HAS_AVX2 0
#endif

namespace detlib {

inline bool use_avx2() {
#if DETLIB_HAS_AVX2
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported;
#else
  return false;
#endif
}

// AVX-512 in the flavour that servers have had from the start, and AVX2 beside it.
inline bool use_avx512() {
#if DETLIB_HAS_AVX2
  static const bool supported = use_avx2() && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return supported;
#else
  return false;
#endif
}

// A vector of `bytes` bytes, with memory access at any address.
template <typename T, int bytes>
struct VectorOf;

#define DETLIB_VECTOR(T, bytes)                                    \
  template <>                                                      \
  struct VectorOf<T, bytes> {                                      \
    typedef T type __attribute__((vector_size(bytes)));            \
    typedef T unaligned __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias)); \
  }
DETLIB_VECTOR(float, 16);
DETLIB_VECTOR(double, 16);
DETLIB_VECTOR(float, 32);
DETLIB_VECTOR(double, 32);
DETLIB_VECTOR(float, 64);
DETLIB_VECTOR(double, 64);
#undef DETLIB_VECTOR

// Vector width that kernels without an AVX-512 variant work with.
inline int64_t vector_bytes() {
  return use_avx2() ? 32 : 16;
}

}  // namespace detlib
