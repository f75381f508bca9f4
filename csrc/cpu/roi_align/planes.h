// The weights of a box in the form that RoIAlign's kernels for planes (N, C, H, W) need.
//
// Columns are grouped in slots of as many neighboring cells as a vector has lanes, so that a slot is one load from a
// map row. Slot j starts at cell min(first_column + lanes * j, last_slot). Slots overlap only at the right border of
// the feature map; lanes that an earlier slot has covered have weight zero there.
#pragma once

#include "taps.h"

namespace detlib {

struct Band {
  int64_t begin, end;
};

// The column slots of a box, and its taps along y: bins from map rows (forward), map rows from bins (backward).
template <typename T>
struct RoiTable {
  bool finite = true;
  int64_t lanes = 0, first_column = 0, num_slots = 0, last_slot = 0;
  Taps<T> y;
  std::vector<T> columns;
  std::vector<Band> bands;  // forward: columns a group of bins reads; backward: bins a slot receives from

  int64_t slot_start(int64_t slot) const {
    return std::min(first_column + slot * lanes, last_slot);
  }
  int64_t cells() const {
    return num_slots * lanes;
  }
  // Returns the position of a map column among the lanes of all slots: in the first slot that covers it. If that slot
  // is shifted to the left at the border of the feature map, the column is further right in it.
  int64_t lane_of(int64_t column) const {
    const int64_t slot = (column - first_column) / lanes;
    return slot * lanes + column - slot_start(slot);
  }
  // Forward: the bins of a row are computed in groups of `lanes`; the last group is shifted to end at the last bin.
  int64_t group_start(int64_t group, int64_t bins) const {
    return std::max<int64_t>(std::min(group * lanes, bins - lanes), 0);
  }
};

// Returns the number of cells of a map row for the kernels: at least one slot.
inline int64_t row_cells(const RoiAlignShape& shape, int64_t lanes) {
  return std::max(shape.width, lanes);
}

template <typename T>
class RoiTableBuilder {
 public:
  RoiTableBuilder(const RoiAlignShape& shape, int64_t lanes)
      : shape_(shape), lanes_(lanes), dense_(std::max(shape.height, shape.width), T(0)) {}

  RoiTable<T> forward(const T* box) {
    RoiTable<T> table = prepare(box);
    table.y = taps_by_bin(y_, shape_.bins_y);
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
    table.y = taps_by_cell(y_);
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
  // Fills y_, x_ and the fields that both passes use.
  RoiTable<T> prepare(const T* box) {
    RoiTable<T> table;
    table.lanes = lanes_;
    table.finite = box_weights(box, shape_, dense_, y_, x_);
    if (!x_.empty()) {
      const auto by_cell = [](const auto& a, const auto& b) { return a.cell < b.cell; };
      const auto [left, right] = std::minmax_element(x_.begin(), x_.end(), by_cell);
      table.first_column = left->cell;
      table.last_slot = row_cells(shape_, lanes_) - lanes_;
      table.num_slots = (right->cell - left->cell) / lanes_ + 1;
    }
    return table;
  }

  static void widen(Band& band, int64_t index) {
    band.begin = std::min(band.begin, index);
    band.end = std::max(band.end, index + 1);
  }

  RoiAlignShape shape_;
  int64_t lanes_;
  std::vector<T> dense_;
  std::vector<AxisWeight<T>> y_, x_;
};

}  // namespace detlib
