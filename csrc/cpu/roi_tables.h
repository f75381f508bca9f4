// What RoIAlign on the CPU knows about a box before it touches the map: the weights of its bins, axis by axis.
//
// Columns are handled in slots of neighbouring cells, as many as a vector has lanes, so that a slot is one load of a map
// row. Slot j starts at cell min(first_column + lanes * j, last_slot); only at the right border of the map do slots
// overlap, and there the lanes that an earlier slot has covered weigh zero.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/roi_grid.h"

namespace detlib {

struct RoiAlignShape {
  int64_t images, channels, height, width;
  int64_t bins_y, bins_x;
  double scale;
  int64_t sampling_ratio;
  bool aligned;
  int64_t lanes;  // of the vectors that the kernels use

  int64_t bins() const {
    return bins_y * bins_x;
  }
  // Cells of a row as the kernels see it: at least one slot.
  int64_t row_cells() const {
    return std::max(width, lanes);
  }
};

template <typename T>
struct AxisWeight {
  int64_t bin, cell;
  T weight;
};

// The weights of all bins along one axis, ordered by bin, then cell. `dense` is scratch of at least `size` zeros and is
// left as zeros.
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

template <typename T>
struct RowTap {
  int64_t row;  // forward: map row that the bin reads; backward: row of bins that the map row receives from
  T weight;
};

struct Band {
  int64_t begin, end;
};

// Where a box's columns lie, and its taps along y. `tap_begins` separates bins (forward) or map rows (backward).
template <typename T>
struct RoiTable {
  bool finite = true;
  int64_t lanes = 0, first_column = 0, num_slots = 0, last_slot = 0;
  std::vector<int64_t> rows;  // backward only: the map rows that receive anything
  std::vector<int64_t> tap_begins;
  std::vector<RowTap<T>> taps;
  std::vector<T> columns;
  std::vector<Band> bands;  // forward: columns a group of bins reads; backward: bins a slot receives from

  int64_t slot_start(int64_t slot) const {
    return std::min(first_column + slot * lanes, last_slot);
  }
  int64_t cells() const {
    return num_slots * lanes;
  }
  // Position of a map column among the lanes of the slots: in the first that covers it. Where the border of the map has
  // shifted that slot to the left, the column lies further right in it.
  int64_t lane_of(int64_t column) const {
    const int64_t slot = (column - first_column) / lanes;
    return slot * lanes + column - slot_start(slot);
  }
  // Forward: bins of a row are formed in groups of `lanes`, the last one shifted back to end at the last bin.
  int64_t group_start(int64_t group, int64_t bins) const {
    return std::max<int64_t>(std::min(group * lanes, bins - lanes), 0);
  }
};

template <typename T>
class RoiTableBuilder {
 public:
  explicit RoiTableBuilder(const RoiAlignShape& shape)
      : shape_(shape), dense_(std::max(shape.height, shape.width), T(0)) {}

  RoiTable<T> forward(const T* box) {
    RoiTable<T> table = prepare(box);
    table.tap_begins.assign(shape_.bins_y + 1, 0);
    for (const auto& y : y_) {
      table.taps.push_back({y.cell, y.weight});
      ++table.tap_begins[y.bin + 1];
    }
    for (int64_t bin = 0; bin < shape_.bins_y; ++bin) {
      table.tap_begins[bin + 1] += table.tap_begins[bin];
    }
    const int64_t lanes = table.lanes, groups = (shape_.bins_x + lanes - 1) / lanes;
    table.columns.assign(groups * table.cells() * lanes, T(0));
    table.bands.assign(groups, {table.cells(), 0});
    for (const auto& x : x_) {
      const int64_t lane = table.lane_of(x.cell);
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t bin = x.bin - table.group_start(group, shape_.bins_x);
        if (bin >= 0 && bin < lanes) {
          table.columns[(group * table.cells() + lane) * lanes + bin] = x.weight;
          widen(table.bands[group], lane);
        }
      }
    }
    return table;
  }

  RoiTable<T> backward(const T* box) {
    RoiTable<T> table = prepare(box);
    std::stable_sort(y_.begin(), y_.end(), [](const auto& a, const auto& b) { return a.cell < b.cell; });
    for (const auto& y : y_) {
      if (table.rows.empty() || table.rows.back() != y.cell) {
        table.rows.push_back(y.cell);
        table.tap_begins.push_back(static_cast<int64_t>(table.taps.size()));
      }
      table.taps.push_back({y.bin, y.weight});
    }
    table.tap_begins.push_back(static_cast<int64_t>(table.taps.size()));
    table.columns.assign(shape_.bins_x * table.cells(), T(0));
    table.bands.assign(table.num_slots, {shape_.bins_x, 0});
    for (const auto& x : x_) {
      const int64_t lane = table.lane_of(x.cell);
      table.columns[x.bin * table.cells() + lane] = x.weight;
      widen(table.bands[lane / table.lanes], x.bin);
    }
    return table;
  }

 private:
  // Fills y_ and x_ and everything that both directions share.
  RoiTable<T> prepare(const T* box) {
    RoiTable<T> table;
    table.lanes = shape_.lanes;
    y_.clear();
    x_.clear();
    const T scale = static_cast<T>(shape_.scale);
    for (int i = 1; i < 5; ++i) {
      table.finite &= std::isfinite(box[i]);
    }
    if (!table.finite) {
      return table;
    }
    const auto axis = [&](T low, T high, int64_t bins) {
      return roi_axis<T>(low, high, scale, shape_.aligned, bins, shape_.sampling_ratio);
    };
    axis_weights(axis(box[2], box[4], shape_.bins_y), shape_.bins_y, shape_.height, dense_, y_);
    axis_weights(axis(box[1], box[3], shape_.bins_x), shape_.bins_x, shape_.width, dense_, x_);
    if (x_.empty() || y_.empty()) {
      x_.clear();
      y_.clear();
      return table;
    }
    const auto by_cell = [](const auto& a, const auto& b) { return a.cell < b.cell; };
    const auto [left, right] = std::minmax_element(x_.begin(), x_.end(), by_cell);
    table.first_column = left->cell;
    table.last_slot = shape_.row_cells() - table.lanes;
    table.num_slots = (right->cell - left->cell) / table.lanes + 1;
    return table;
  }

  static void widen(Band& band, int64_t index) {
    band.begin = std::min(band.begin, index);
    band.end = std::max(band.end, index + 1);
  }

  RoiAlignShape shape_;
  std::vector<T> dense_;
  std::vector<AxisWeight<T>> y_, x_;
};

}  // namespace detlib
