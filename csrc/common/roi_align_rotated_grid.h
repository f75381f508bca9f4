// RoIAlign's sampling grid in a rotated box, for host and device.
//
// Samples are on a regular grid along the axes of the box; roi_align_grid.h has the geometry of one axis. Operations
// are in the same order as in published implementations, in the compute type: the number of samples is a ceil(), so
// different rounding would give a different grid.
#pragma once

#include "roi_align_grid.h"

namespace detlib {

template <typename T>
struct RotatedGrid {
  T x, y, cosine, sine;      // center of the box in cells, and its angle
  RoiAxis<T> rows, columns;  // along the height and the width, from the center
  // Along each axis, samples can be inside the feature map only in `reach` cells from here on.
  T first_row, first_column;
  int64_t reach;

  DETLIB_HOST_DEVICE T num_samples() const {
    return static_cast<T>(rows.count) * static_cast<T>(columns.count);
  }
};

template <typename T>
DETLIB_HOST_DEVICE RoiAxis<T> rotated_axis(T extent, int64_t bins, int64_t sampling_ratio) {
  RoiAxis<T> axis{-extent / T(2), extent / static_cast<T>(bins), sampling_ratio};
  if (sampling_ratio <= 0) {
    const T samples = std::ceil(axis.bin);
    axis.count = samples < T(1) ? 0 : samples < T(1 << 30) ? static_cast<int64_t>(samples) : 1 << 30;
  }
  return axis;
}

// `box` is center x and y, width, height and angle in degrees.
template <typename T>
DETLIB_HOST_DEVICE RotatedGrid<T> rotated_grid(
    const T* box, T scale, int64_t bins_y, int64_t bins_x, int64_t height, int64_t width, int64_t sampling_ratio) {
  RotatedGrid<T> grid;
  const T radians = box[4] * static_cast<T>(3.14159265358979323846 / 180);
  grid.x = box[0] * scale - T(0.5);
  grid.y = box[1] * scale - T(0.5);
  grid.cosine = std::cos(radians);
  grid.sine = std::sin(radians);
  grid.rows = rotated_axis<T>(box[3] * scale, bins_y, sampling_ratio);
  grid.columns = rotated_axis<T>(box[2] * scale, bins_x, sampling_ratio);
  // The circle around the feature map, in the coordinates of the box.
  const T to_x = static_cast<T>(width) / T(2) - grid.x, to_y = static_cast<T>(height) / T(2) - grid.y;
  const T radius = std::sqrt(static_cast<T>(width) * static_cast<T>(width) +
                             static_cast<T>(height) * static_cast<T>(height)) / T(2) + T(2);
  grid.first_column = to_x * grid.cosine - to_y * grid.sine - radius;
  grid.first_row = to_x * grid.sine + to_y * grid.cosine - radius;
  grid.reach = static_cast<int64_t>(T(2) * radius) + 1;
  return grid;
}

// Finds the samples [first, last) of bin `index` that can be inside the feature map; `start` is first_row or
// first_column.
template <typename T>
DETLIB_HOST_DEVICE void rotated_sample_range(
    const RoiAxis<T>& axis, T start, int64_t reach, int64_t index, int64_t& first, int64_t& last) {
  roi_sample_range(RoiAxis<T>{axis.start - start, axis.bin, axis.count}, index, reach, first, last);
}

// Returns the position of a sample along one axis, in cells from the center of the box.
template <typename T>
DETLIB_HOST_DEVICE T rotated_position(const RoiAxis<T>& axis, int64_t index, int64_t sample) {
  return axis.start + static_cast<T>(index) * axis.bin +
      (static_cast<T>(sample) + T(0.5)) * axis.bin / static_cast<T>(axis.count);
}

// The four cells that a sample reads, as rows and columns of the feature map, and their weights.
template <typename T>
struct RotatedSample {
  int64_t top, bottom, left, right;
  T bottom_weight, right_weight;
  bool inside;
};

template <typename T>
DETLIB_HOST_DEVICE RotatedSample<T> rotated_sample(
    const RotatedGrid<T>& grid, T along_height, T along_width, int64_t height, int64_t width) {
  T y = along_height * grid.cosine - along_width * grid.sine + grid.y;
  T x = along_height * grid.sine + along_width * grid.cosine + grid.x;
  RotatedSample<T> sample{0, 0, 0, 0, T(0), T(0), false};
  if (!(y >= T(-1) && y <= static_cast<T>(height) && x >= T(-1) && x <= static_cast<T>(width))) {
    return sample;
  }
  y = y > T(0) ? y : T(0);
  x = x > T(0) ? x : T(0);
  sample.inside = true;
  sample.top = static_cast<int64_t>(y);
  sample.left = static_cast<int64_t>(x);
  if (sample.top >= height - 1) {
    sample.top = sample.bottom = height - 1;
  } else {
    sample.bottom = sample.top + 1;
    sample.bottom_weight = y - static_cast<T>(sample.top);
  }
  if (sample.left >= width - 1) {
    sample.left = sample.right = width - 1;
  } else {
    sample.right = sample.left + 1;
    sample.right_weight = x - static_cast<T>(sample.left);
  }
  return sample;
}

}  // namespace detlib
