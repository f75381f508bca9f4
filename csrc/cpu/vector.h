// Fixed-width vectors in the compiler's own notation, and the choice of instruction set at run time.
//
// Hot loops are in *_kernels.inc files, which each_instruction_set.inc compiles once per instruction set.
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

// Returns whether the processor has AVX2 and AVX-512 with the extensions that all AVX-512 server processors have.
inline bool use_avx512() {
#if DETLIB_HAS_AVX2
  static const bool supported = use_avx2() && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return supported;
#else
  return false;
#endif
}

// A vector of `bytes` bytes; `unaligned` may be at any address.
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

// Picks the baseline or AVX2 variant of a kernel, whichever is best here. AVX-512 variants are picked explicitly.
#define DETLIB_FASTEST(...) (use_avx2() ? &avx2::__VA_ARGS__ : &baseline::__VA_ARGS__)

// Width of the vectors that `DETLIB_FASTEST` kernels work with.
inline int64_t vector_bytes() {
  return use_avx2() ? 32 : 16;
}

}  // namespace detlib
