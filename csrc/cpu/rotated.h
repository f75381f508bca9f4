// Rotated boxes as columns, for vector loads on the CPU; see rotated.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/rotated_box.h"
#include "../common/stable.h"

namespace detlib {

// Padded with boxes that overlap nothing, so that a vector can be loaded from any index.
struct RotatedColumns {
  std::vector<double> x, y, half_width, half_height, cosine, sine, radius;
  int64_t count = 0;

  void add(const RotatedBox<double>& box) {
    if (count + kPadding >= static_cast<int64_t>(x.size())) {
      resize(std::max<int64_t>(64, 2 * count));
    }
    x[count] = box.x;
    y[count] = box.y;
    half_width[count] = box.half_width;
    half_height[count] = box.half_height;
    cosine[count] = box.cosine;
    sine[count] = box.sine;
    radius[count] = box.radius;
    ++count;
  }

  RotatedBox<double> operator[](int64_t i) const {
    return {x[i], y[i], half_width[i], half_height[i], cosine[i], sine[i], radius[i]};
  }

 private:
  static constexpr int64_t kPadding = 8;

  void resize(int64_t size) {
    for (auto* column : {&x, &y, &half_width, &half_height, &cosine, &sine}) {
      column->resize(size, 0.0);
    }
    radius.resize(size, NAN);
  }
};

// Converts a tensor (N, 5) of any floating point type.
inline RotatedColumns rotated_columns(const Tensor& boxes) {
  RotatedColumns columns;
  const Tensor numbers = as_contiguous(boxes, ScalarType::Double);
  const double* data = numbers.const_data_ptr<double>();
  for (int64_t i = 0; i < numbers.size(0); ++i) {
    columns.add(rotated_box(data + 5 * i));
  }
  return columns;
}

}  // namespace detlib
