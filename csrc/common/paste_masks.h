// Positions of image pixels in a mask that is stretched over a box, for host and device.
//
// Rounding is monotonic, so positions never decrease from one pixel to the next, and `blend` is monotonic between two
// cells. The run lengths on the CPU depend on this (see cpu/paste_masks.cpp).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DETLIB_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DETLIB_HOST_DEVICE inline
#endif

namespace detlib {

// One side of a box, and the cells of the mask along it.
template <typename T>
struct PasteSide {
  T low, extent, cells;
  bool valid;  // false if there is nothing to paste: no cells, no extent, or not finite

  DETLIB_HOST_DEVICE PasteSide(T first, T last, int64_t num_cells)
      : low(first), extent(last - first), cells(static_cast<T>(num_cells)), valid(false) {
    // x - x is 0 only for finite x.
    valid = num_cells > 0 && extent > T(0) && first - first == T(0) && last - last == T(0);
  }

  // Returns the position of a pixel's center; the center of cell i is at i. Normalizes to [-1, 1] first, for the same
  // rounding as detectron2.
  DETLIB_HOST_DEVICE T position(int64_t pixel) const {
    const T normalized = (static_cast<T>(pixel) + T(0.5) - low) / extent * T(2) - T(1);
    return ((normalized + T(1)) * cells - T(1)) / T(2);
  }

  // The mask fades to zero over the width of one cell on each side.
  DETLIB_HOST_DEVICE bool after_start(T position) const {
    return position > T(-1);
  }

  DETLIB_HOST_DEVICE bool before_end(T position) const {
    return position < cells;
  }
};

template <typename T>
DETLIB_HOST_DEVICE T blend(T first, T second, T fraction) {
  return first + fraction * (second - first);
}

// Converts a soft value to a byte, rounded down.
template <typename T>
DETLIB_HOST_DEVICE uint8_t to_byte(T value) {
  const T scaled = value * T(255);
  return scaled > T(0) ? static_cast<uint8_t>(scaled < T(255) ? scaled : T(255)) : uint8_t{0};
}

}  // namespace detlib
