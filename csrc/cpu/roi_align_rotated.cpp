// RoIAlign of rotated boxes on the CPU, forward and backward.
//
// The weights of an axis-aligned box are separable; those of a rotated box are not. But they are the same for all
// channels. So the feature map is converted to channels-last, and each bin becomes a list of cells with weights, by
// which vectors of channels are added; samples that read the same cell are merged. The forward pass runs boxes in
// parallel. In the backward pass, each thread owns some channels of the feature map and visits all boxes in turn, so no
// atomics are needed and the sums are the same on every run.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../common/roi_align_rotated_grid.h"
#include "../common/stable.h"
#include "vector.h"

namespace detlib {
namespace {

template <typename T>
struct Tap {
  int64_t cell;
  T weight;
};

#define DETLIB_KERNELS "roi_align_rotated_kernels.inc"
#include "each_instruction_set.inc"

struct Shape {
  int64_t images, channels, height, width;
  int64_t bins_y, bins_x;
  double scale;
  int64_t sampling_ratio;

  int64_t bins() const {
    return bins_y * bins_x;
  }
  int64_t cells() const {
    return height * width;
  }
};

int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

template <typename T>
int64_t padded_channels(const Shape& shape) {
  return round_up(shape.channels, vector_bytes() / static_cast<int64_t>(sizeof(T)));
}

// The cells that the bins of one box read: taps[begins[bin]] to taps[begins[bin + 1]].
template <typename T>
struct BoxTaps {
  std::vector<int64_t> begins;
  std::vector<Tap<T>> taps;
  int64_t image = 0;
  bool finite = true;
};

template <typename T>
class TapBuilder {
 public:
  explicit TapBuilder(const Shape& shape) : shape_(shape), tap_of_cell_(shape.cells(), -1) {}

  // `box` is the index of the image, center x and y, width, height and angle in degrees.
  void build(const T* box, BoxTaps<T>& result) {
    result.image = static_cast<int64_t>(box[0]);
    result.finite = true;
    result.taps.clear();
    result.begins.assign(shape_.bins() + 1, 0);
    for (int i = 1; i < 6; ++i) {
      result.finite &= std::isfinite(box[i]);
    }
    if (!result.finite) {
      return;
    }
    const RotatedGrid<T> grid = rotated_grid<T>(
        box + 1, static_cast<T>(shape_.scale), shape_.bins_y, shape_.bins_x, shape_.height, shape_.width,
        shape_.sampling_ratio);
    for (int64_t bin = 0; bin < shape_.bins(); ++bin) {
      if (grid.num_samples() > T(0)) {
        add_bin(grid, bin / shape_.bins_x, bin % shape_.bins_x, result.taps);
      }
      result.begins[bin + 1] = static_cast<int64_t>(result.taps.size());
    }
  }

 private:
  void add_bin(const RotatedGrid<T>& grid, int64_t bin_y, int64_t bin_x, std::vector<Tap<T>>& taps) {
    const size_t first_tap = taps.size();
    int64_t first_row, last_row, first_column, last_column;
    rotated_sample_range(grid.rows, grid.first_row, grid.reach, bin_y, first_row, last_row);
    rotated_sample_range(grid.columns, grid.first_column, grid.reach, bin_x, first_column, last_column);
    for (int64_t i = first_row; i < last_row; ++i) {
      const T along_height = rotated_position(grid.rows, bin_y, i);
      for (int64_t j = first_column; j < last_column; ++j) {
        const RotatedSample<T> s = rotated_sample(
            grid, along_height, rotated_position(grid.columns, bin_x, j), shape_.height, shape_.width);
        if (s.inside) {
          const int64_t top = s.top * shape_.width, bottom = s.bottom * shape_.width;
          add(top + s.left, (T(1) - s.bottom_weight) * (T(1) - s.right_weight), first_tap, taps);
          add(top + s.right, (T(1) - s.bottom_weight) * s.right_weight, first_tap, taps);
          add(bottom + s.left, s.bottom_weight * (T(1) - s.right_weight), first_tap, taps);
          add(bottom + s.right, s.bottom_weight * s.right_weight, first_tap, taps);
        }
      }
    }
    const T count = grid.num_samples();
    for (size_t i = first_tap; i < taps.size(); ++i) {
      taps[i].weight /= count;
      tap_of_cell_[taps[i].cell] = -1;
    }
  }

  // Adds to the tap of a cell. Each cell has at most one tap per bin; tap_of_cell_ has its index in the bin, or -1.
  void add(int64_t cell, T weight, size_t first_tap, std::vector<Tap<T>>& taps) {
    int32_t& tap = tap_of_cell_[cell];
    if (tap < 0) {
      tap = static_cast<int32_t>(taps.size() - first_tap);
      taps.push_back({cell, weight});
    } else {
      taps[first_tap + tap].weight += weight;
    }
  }

  Shape shape_;
  std::vector<int32_t> tap_of_cell_;
};

// Returns the boxes in the compute type, after checking their image indices.
template <typename T>
Tensor checked_boxes(const Tensor& boxes, const Shape& shape) {
  const Tensor numbers = as_contiguous(boxes, std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float);
  const T* data = numbers.const_data_ptr<T>();
  for (int64_t k = 0; k < boxes.size(0); ++k) {
    const T image = data[6 * k];
    DETLIB_CHECK(
        image >= T(0) && image < static_cast<T>(shape.images), "boxes[:, 0] must be image indices in [0, ",
        shape.images, "), got ", image, " for box ", k);
  }
  return numbers;
}

constexpr int64_t kCellBlock = 16;

// Runs `body(image, first cell, number of cells)` over all cells of all images.
template <typename Body>
void for_cell_blocks(const Shape& shape, const Body& body) {
  const int64_t blocks = (shape.cells() + kCellBlock - 1) / kCellBlock;
  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(shape.channels, 1));
  torch::stable::parallel_for(0, shape.images * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t cell = i % blocks * kCellBlock;
      body(i / blocks, cell, std::min(kCellBlock, shape.cells() - cell));
    }
  });
}

// Returns the feature map as [image, cell, channel] in the compute type, with channels padded with zeros.
template <typename scalar_t, typename T = compute_t<scalar_t>>
std::vector<T> channels_last_map(const Tensor& input, const Shape& shape) {
  const int64_t stride = padded_channels<T>(shape), cells = shape.cells();
  std::vector<T> map(shape.images * cells * stride);
  const scalar_t* source = input.const_data_ptr<scalar_t>();
  for_cell_blocks(shape, [&](int64_t image, int64_t first, int64_t count) {
    const scalar_t* from = source + image * shape.channels * cells + first;
    T* to = map.data() + (image * cells + first) * stride;
    for (int64_t c = 0; c < shape.channels; ++c) {
      for (int64_t i = 0; i < count; ++i) {
        to[i * stride + c] = static_cast<T>(from[c * cells + i]);
      }
    }
  });
  return map;
}

// Returns whether the memory of the input already is what `channels_last_map` would return.
template <typename scalar_t>
bool is_channels_last_map(const Tensor& input, const Shape& shape) {
  using T = compute_t<scalar_t>;
  return std::is_same_v<scalar_t, T> && padded_channels<T>(shape) == shape.channels && input.stride(1) == 1 &&
      input.stride(3) == shape.channels && input.stride(2) == shape.channels * shape.width &&
      input.stride(0) == shape.channels * shape.cells();
}

template <typename scalar_t>
void forward_impl(const Tensor& input, const Tensor& boxes, const Shape& shape, Tensor& output) {
  using T = compute_t<scalar_t>;
  const Tensor numbers = checked_boxes<T>(boxes, shape);
  const T* box_data = numbers.const_data_ptr<T>();
  std::vector<T> copy;
  const T* map = nullptr;
  if (is_channels_last_map<scalar_t>(input, shape)) {
    map = reinterpret_cast<const T*>(input.const_data_ptr<scalar_t>());
  } else {
    copy = channels_last_map<scalar_t>(as_contiguous(input, input.scalar_type()), shape);
    map = copy.data();
  }
  const int64_t stride = padded_channels<T>(shape), bins = shape.bins();
  scalar_t* pooled = output.mutable_data_ptr<scalar_t>();
  const auto run = DETLIB_FASTEST(gather_taps<T>);
  torch::stable::parallel_for(0, boxes.size(0), 1, [&](int64_t begin, int64_t end) {
    TapBuilder<T> builder(shape);
    BoxTaps<T> box;
    std::vector<T> sums(bins * stride);
    for (int64_t k = begin; k < end; ++k) {
      builder.build(box_data + 6 * k, box);
      const T* image = map + box.image * shape.cells() * stride;
      for (int64_t bin = 0; bin < bins; ++bin) {
        run(image, stride, stride, box.taps.data() + box.begins[bin], box.taps.data() + box.begins[bin + 1],
            sums.data() + bin * stride);
      }
      scalar_t* target = pooled + k * shape.channels * bins;
      for (int64_t c = 0; c < shape.channels; ++c) {
        for (int64_t bin = 0; bin < bins; ++bin) {
          const T value = box.finite ? sums[bin * stride + c] : std::numeric_limits<T>::quiet_NaN();
          target[c * bins + bin] = static_cast<scalar_t>(value);
        }
      }
    }
  });
}

// Number of boxes that are processed together in the backward pass; their taps are kept in memory.
constexpr int64_t kBoxBlock = 64;

template <typename scalar_t>
void backward_impl(const Tensor& grad, const Tensor& boxes, const Shape& shape, Tensor& output) {
  using T = compute_t<scalar_t>;
  const Tensor numbers = checked_boxes<T>(boxes, shape);
  const T* box_data = numbers.const_data_ptr<T>();
  const scalar_t* pooled = grad.const_data_ptr<scalar_t>();
  const int64_t stride = padded_channels<T>(shape), bins = shape.bins(), num_boxes = boxes.size(0);
  const int64_t lanes = vector_bytes() / static_cast<int64_t>(sizeof(T));
  const int64_t block = round_up((stride + torch::stable::get_num_threads() - 1) / torch::stable::get_num_threads(), lanes);
  std::vector<T> map(shape.images * shape.cells() * stride, T(0));
  std::vector<BoxTaps<T>> taps(std::min(kBoxBlock, num_boxes));
  const auto run = DETLIB_FASTEST(scatter_taps<T>);
  for (int64_t first = 0; first < num_boxes; first += kBoxBlock) {
    const int64_t count = std::min(kBoxBlock, num_boxes - first);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      TapBuilder<T> builder(shape);
      for (int64_t k = begin; k < end; ++k) {
        builder.build(box_data + 6 * (first + k), taps[k]);
      }
    });
    torch::stable::parallel_for(0, (stride + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
      const int64_t low = begin * block, high = std::min(end * block, stride);
      std::vector<T> gradient(bins * (high - low), T(0));
      for (int64_t k = 0; k < count; ++k) {
        const BoxTaps<T>& box = taps[k];
        if (box.taps.empty()) {
          continue;
        }
        const scalar_t* source = pooled + (first + k) * shape.channels * bins;
        for (int64_t c = low; c < std::min(high, shape.channels); ++c) {
          for (int64_t bin = 0; bin < bins; ++bin) {
            gradient[bin * (high - low) + c - low] = static_cast<T>(source[c * bins + bin]);
          }
        }
        T* image = map.data() + box.image * shape.cells() * stride + low;
        for (int64_t bin = 0; bin < bins; ++bin) {
          run(image, stride, high - low, box.taps.data() + box.begins[bin], box.taps.data() + box.begins[bin + 1],
              gradient.data() + bin * (high - low));
        }
      }
    });
  }
  scalar_t* target = output.mutable_data_ptr<scalar_t>();
  for_cell_blocks(shape, [&](int64_t image, int64_t cell, int64_t count) {
    const T* from = map.data() + (image * shape.cells() + cell) * stride;
    scalar_t* to = target + image * shape.channels * shape.cells() + cell;
    for (int64_t c = 0; c < shape.channels; ++c) {
      for (int64_t i = 0; i < count; ++i) {
        to[c * shape.cells() + i] = static_cast<scalar_t>(from[i * stride + c]);
      }
    }
  });
}

void check_boxes(const Tensor& boxes) {
  DETLIB_CHECK(boxes.dim() == 2 && boxes.size(1) == 6, "boxes must have shape (K, 6)");
}

Tensor roi_align_rotated(
    const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height, int64_t pooled_width,
    int64_t sampling_ratio) {
  check_boxes(boxes);
  DETLIB_CHECK(input.dim() == 4, "input must have shape (N, C, H, W)");
  const Shape shape{input.size(0), input.size(1), input.size(2),  input.size(3),
                    pooled_height, pooled_width,  spatial_scale, sampling_ratio};
  Tensor output = torch::stable::new_empty(input, {boxes.size(0), shape.channels, pooled_height, pooled_width});
  if (input.numel() == 0) {
    return torch::stable::zero_(output);
  }
  if (output.numel() > 0) {
    dispatch_floating(input.scalar_type(), "input", [&](auto type) {
      forward_impl<typename decltype(type)::type>(input, boxes, shape, output);
    });
  }
  return output;
}

Tensor roi_align_rotated_backward(
    const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t pooled_height, int64_t pooled_width,
    int64_t batch_size, int64_t channels, int64_t height, int64_t width, int64_t sampling_ratio) {
  check_boxes(boxes);
  DETLIB_CHECK(
      grad.dim() == 4 && grad.size(0) == boxes.size(0) && grad.size(1) == channels && grad.size(2) == pooled_height &&
          grad.size(3) == pooled_width,
      "grad must have shape (K, C, pooled_height, pooled_width)");
  const Shape shape{batch_size,    channels,     height,        width,
                    pooled_height, pooled_width, spatial_scale, sampling_ratio};
  Tensor output = torch::stable::new_empty(grad, {batch_size, channels, height, width});
  if (grad.numel() == 0 || output.numel() == 0) {
    return torch::stable::zero_(output);
  }
  const Tensor gradient = as_contiguous(grad, grad.scalar_type());
  dispatch_floating(grad.scalar_type(), "grad", [&](auto type) {
    backward_impl<typename decltype(type)::type>(gradient, boxes, shape, output);
  });
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CPU, m) {
  m.impl("roi_align_rotated", TORCH_BOX(&roi_align_rotated));
  m.impl("roi_align_rotated_backward", TORCH_BOX(&roi_align_rotated_backward));
}

}  // namespace
}  // namespace detlib
