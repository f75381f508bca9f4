// The map cells that the bins of a box read along each axis, and their weights, for RoIAlign on the CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../../common/roi_align_grid.h"
#include "../../common/stable.h"

namespace detlib {

struct RoiAlignShape {
  int64_t images, channels, height, width;
  int64_t bins_y, bins_x;
  double scale;
  int64_t sampling_ratio;
  bool aligned;

  int64_t bins() const {
    return bins_y * bins_x;
  }
};

template <typename T>
struct AxisWeight {
  int64_t bin, cell;
  T weight;
};

// Computes the weights of all bins along one axis, ordered by bin, then cell. `dense` is scratch memory of at least
// `size` zeros, and is all zeros again afterwards.
template <typename T>
void axis_weights(
    const RoiAxis<T>& axis, int64_t bins, int64_t size, std::vector<T>& dense, std::vector<AxisWeight<T>>& weights) {
  weights.clear();
  for (int64_t bin = 0; bin < bins; ++bin) {
    int64_t sample, last, low = size, high = -1;
    for (roi_sample_range(axis, bin, size, sample, last); sample < last; ++sample) {
      const RoiSample<T> s = roi_sample(axis, bin, sample, size);
      if (s.inside) {
        dense[s.low] += s.low_weight;
        dense[s.high] += s.high_weight;
        low = std::min(low, s.low);
        high = std::max(high, s.high);
      }
    }
    for (int64_t cell = low; cell <= high; ++cell) {
      if (dense[cell] != T(0)) {
        weights.push_back({bin, cell, dense[cell] / static_cast<T>(axis.count)});
        dense[cell] = T(0);
      }
    }
  }
}

// Computes the weights of both axes of a box; both are empty if the box is outside the feature map. Returns false if
// the box is not finite.
template <typename T>
bool box_weights(
    const T* box, const RoiAlignShape& shape, std::vector<T>& dense, std::vector<AxisWeight<T>>& y,
    std::vector<AxisWeight<T>>& x) {
  y.clear();
  x.clear();
  if (!std::all_of(box + 1, box + 5, [](T corner) { return std::isfinite(corner); })) {
    return false;
  }
  const auto axis = [&](T low, T high, int64_t bins) {
    return roi_axis<T>(low, high, static_cast<T>(shape.scale), shape.aligned, bins, shape.sampling_ratio);
  };
  axis_weights(axis(box[2], box[4], shape.bins_y), shape.bins_y, shape.height, dense, y);
  axis_weights(axis(box[1], box[3], shape.bins_x), shape.bins_x, shape.width, dense, x);
  if (x.empty() || y.empty()) {
    x.clear();
    y.clear();
  }
  return true;
}

template <typename T>
struct Tap {
  int64_t source;
  T weight;
};

// Weighted sums: the value at targets[i] is the sum over taps [begins[i], begins[i + 1]).
template <typename T>
struct Taps {
  std::vector<int64_t> targets, begins;
  std::vector<Tap<T>> taps;

  int64_t size() const {
    return static_cast<int64_t>(targets.size());
  }
};

// Returns the taps of the forward pass: the targets are bins, the taps cells.
template <typename T>
Taps<T> taps_by_bin(const std::vector<AxisWeight<T>>& weights, int64_t bins) {
  Taps<T> result;
  result.begins.assign(bins + 1, 0);
  for (const auto& w : weights) {
    result.taps.push_back({w.cell, w.weight});
    ++result.begins[w.bin + 1];
  }
  for (int64_t bin = 0; bin < bins; ++bin) {
    result.targets.push_back(bin);
    result.begins[bin + 1] += result.begins[bin];
  }
  return result;
}

// Returns the taps of the backward pass: the targets are the cells that receive a gradient, the taps bins.
template <typename T>
Taps<T> taps_by_cell(std::vector<AxisWeight<T>>& weights) {
  std::stable_sort(weights.begin(), weights.end(), [](const auto& a, const auto& b) { return a.cell < b.cell; });
  Taps<T> result;
  for (const auto& w : weights) {
    if (result.targets.empty() || result.targets.back() != w.cell) {
      result.targets.push_back(w.cell);
      result.begins.push_back(static_cast<int64_t>(result.taps.size()));
    }
    result.taps.push_back({w.bin, w.weight});
  }
  result.begins.push_back(static_cast<int64_t>(result.taps.size()));
  return result;
}

// One table for each box, and the boxes of each image.
template <typename Table>
struct PreparedBoxes {
  std::vector<Table> tables;
  std::vector<std::vector<int64_t>> of_image;
};

// Builds the tables of all boxes in parallel. `builder()` is called once per thread and returns a function that
// converts the five numbers of a box to its table.
template <typename Table, typename T, typename Builder>
PreparedBoxes<Table> prepare_boxes(const Tensor& boxes, const RoiAlignShape& shape, const Builder& builder) {
  const int64_t num_boxes = boxes.size(0);
  const Tensor corners = as_contiguous(boxes, std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float);
  const T* data = corners.const_data_ptr<T>();
  PreparedBoxes<Table> prepared;
  prepared.of_image.resize(shape.images);
  for (int64_t k = 0; k < num_boxes; ++k) {
    const T image = data[5 * k];
    DETLIB_CHECK(
        image >= T(0) && image < static_cast<T>(shape.images), "boxes[:, 0] must be image indices in [0, ",
        shape.images, "), got ", image, " for box ", k);
    prepared.of_image[static_cast<int64_t>(image)].push_back(k);
  }
  prepared.tables.resize(num_boxes);
  torch::stable::parallel_for(0, num_boxes, 64, [&](int64_t begin, int64_t end) {
    auto build = builder();
    for (int64_t k = begin; k < end; ++k) {
      prepared.tables[k] = build(data + 5 * k);
    }
  });
  return prepared;
}

}  // namespace detlib
