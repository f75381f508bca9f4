// The innermost step of resizing: 32 bytes, each a weighted sum of bytes that are `step` apart. See resize.cpp.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vector.h"

#if DETLIB_HAS_AVX2
#include <immintrin.h>
#endif

namespace detlib {
namespace {

constexpr int kDigits = 22;
constexpr int32_t kHalf = 1 << (kDigits - 1);
constexpr int64_t kBlock = 32;

inline uint8_t to_byte(int32_t sum) {
  return static_cast<uint8_t>(std::clamp(sum >> kDigits, 0, 255));
}

// The weights of two adjacent taps as 16-bit numbers, which AVX2 multiplies and adds in pairs; the first tap is in the
// low half of each word. A weight is 256 times its signed upper part plus its lower byte.
struct TapPair {
  int32_t upper, lower;
};

struct Taps {
  const int32_t* weights;
  const TapPair* pairs;  // (count + 1) / 2 pairs; if count is odd, the last weight is 0
  int64_t count;
};

inline TapPair make_pair(int32_t first, int32_t second) {
  const auto join = [](int32_t a, int32_t b) {
    return static_cast<int32_t>((static_cast<uint32_t>(b) << 16) | (static_cast<uint32_t>(a) & 0xffffu));
  };
  return {join(first >> 8, second >> 8), join(first & 255, second & 255)};
}

namespace baseline {

// target[i] = sum over k of weights[k] * source[k * step + i]; a `count` of 0 means `taps.count`.
template <int count>
inline void weigh_32(const uint8_t* __restrict source, int64_t step, const Taps& taps, uint8_t* __restrict target) {
  int32_t sums[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) {
    sums[i] = kHalf;
  }
  for (int64_t k = 0; k < (count > 0 ? count : taps.count); ++k) {
    const int32_t weight = taps.weights[k];
    for (int64_t i = 0; i < kBlock; ++i) {
      sums[i] += weight * source[k * step + i];
    }
  }
  for (int64_t i = 0; i < kBlock; ++i) {
    target[i] = to_byte(sums[i]);
  }
}

}  // namespace baseline

#if DETLIB_HAS_AVX2
namespace avx2 {

#define DETLIB_TARGET __attribute__((target("avx2")))

// A 32-bit multiplication is several times as slow as two 16-bit ones, so weights are split into two parts. With U and L
// the sums over upper and lower parts, (256 U + L + 2^21) >> 22 is (U + 2^13 + (L >> 8)) >> 14.
template <int count>
DETLIB_TARGET inline void weigh_32(
    const uint8_t* __restrict source, int64_t step, const Taps& taps, uint8_t* __restrict target) {
  const int64_t number = count > 0 ? count : taps.count;
  const __m256i zero = _mm256_setzero_si256();
  __m256i upper[4], lower[4];
  for (int i = 0; i < 4; ++i) {
    upper[i] = _mm256_set1_epi32(kHalf >> 8);
    lower[i] = zero;
  }
  for (int64_t k = 0; k < number; k += 2) {
    const uint8_t* at = source + k * step;
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    const __m256i second =
        k + 1 < number ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + step)) : zero;
    // Interleaving works on halves of 16 bytes; packing, below, reverses it.
    const __m256i low = _mm256_unpacklo_epi8(first, second), high = _mm256_unpackhi_epi8(first, second);
    const __m256i values[4] = {
        _mm256_unpacklo_epi8(low, zero),
        _mm256_unpackhi_epi8(low, zero),
        _mm256_unpacklo_epi8(high, zero),
        _mm256_unpackhi_epi8(high, zero)};
    const __m256i upper_weights = _mm256_set1_epi32(taps.pairs[k / 2].upper);
    const __m256i lower_weights = _mm256_set1_epi32(taps.pairs[k / 2].lower);
    for (int i = 0; i < 4; ++i) {
      upper[i] = _mm256_add_epi32(upper[i], _mm256_madd_epi16(values[i], upper_weights));
      lower[i] = _mm256_add_epi32(lower[i], _mm256_madd_epi16(values[i], lower_weights));
    }
  }
  for (int i = 0; i < 4; ++i) {
    upper[i] = _mm256_srai_epi32(_mm256_add_epi32(upper[i], _mm256_srai_epi32(lower[i], 8)), kDigits - 8);
  }
  const __m256i packed = _mm256_packus_epi16(
      _mm256_packs_epi32(upper[0], upper[1]), _mm256_packs_epi32(upper[2], upper[3]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), packed);
}

#undef DETLIB_TARGET

}  // namespace avx2
#endif

}  // namespace
}  // namespace detlib
