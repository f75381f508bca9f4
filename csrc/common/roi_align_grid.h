// RoIAlign's geometry along one axis, for host and device.
//
// A box is divided into bins, and each bin has a regular grid of samples. Rows and columns are independent: the value
// of a bin is the sum over feature map cells of (weight of the row) * (weight of the column) * cell.
//
// Operations are in the same order as in published implementations, in the compute type: the number of samples is a
// ceil(), so different rounding would give a different grid.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DETLIB_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DETLIB_HOST_DEVICE inline
#endif

namespace detlib {

template <typename T>
struct RoiAxis {
  T start;        // start of the box, in cells
  T bin;          // side of a bin, in cells
  int64_t count;  // samples per bin, 0 for an empty or inverted box on an adaptive grid
};

template <typename T>
DETLIB_HOST_DEVICE RoiAxis<T> roi_axis(
    T low, T high, T scale, bool aligned, int64_t bins, int64_t sampling_ratio) {
  const T offset = aligned ? T(0.5) : T(0);
  const T start = low * scale - offset;
  T extent = high * scale - offset - start;
  if (!aligned && extent < T(1)) {
    extent = T(1);
  }
  RoiAxis<T> axis{start, extent / static_cast<T>(bins), sampling_ratio};
  if (sampling_ratio <= 0) {
    const T samples = std::ceil(axis.bin);
    axis.count = samples < T(1) ? 0 : samples < T(1 << 30) ? static_cast<int64_t>(samples) : 1 << 30;
  }
  return axis;
}

// Finds the samples [first, last) of bin `index` that can be in [-1, size]; the rest of a huge box is skipped.
template <typename T>
DETLIB_HOST_DEVICE void roi_sample_range(
    const RoiAxis<T>& axis, int64_t index, int64_t size, int64_t& first, int64_t& last) {
  first = 0;
  last = axis.count;
  if (axis.count <= 4) {
    return;
  }
  const double step = static_cast<double>(axis.bin) / static_cast<double>(axis.count);
  if (!(step > 0)) {
    return;
  }
  const double start = static_cast<double>(axis.start) + static_cast<double>(index) * axis.bin;
  const double begin = (-1 - start) / step - 2;
  const double end = (static_cast<double>(size) - start) / step + 2;
  if (begin > 0) {
    first = begin < static_cast<double>(last) ? static_cast<int64_t>(begin) : last;
  }
  if (end < static_cast<double>(last)) {
    last = end > static_cast<double>(first) ? static_cast<int64_t>(end) + 1 : first;
  }
}

// The two cells that one sample reads, and their weights. `inside` is false for a sample more than one cell outside the
// feature map. GPUs are faster with an int_t of 32 bits.
template <typename T, typename int_t = int64_t>
struct RoiSample {
  int_t low, high;
  T low_weight, high_weight;
  bool inside;
};

template <typename T, typename int_t = int64_t>
DETLIB_HOST_DEVICE RoiSample<T, int_t> roi_sample(const RoiAxis<T>& axis, int_t index, int_t sample, int_t size) {
  T position = axis.start + static_cast<T>(index) * axis.bin +
      (static_cast<T>(sample) + T(0.5)) * axis.bin / static_cast<T>(axis.count);
  if (!(position >= T(-1) && position <= static_cast<T>(size))) {
    return {0, 0, T(0), T(0), false};
  }
  position = position > T(0) ? position : T(0);
  const int_t low = static_cast<int_t>(position);
  if (low >= size - 1) {
    return {size - 1, size - 1, T(1), T(0), true};
  }
  const T fraction = position - static_cast<T>(low);
  return {low, low + 1, T(1) - fraction, fraction, true};
}

}  // namespace detlib
