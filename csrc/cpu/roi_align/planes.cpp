// RoIAlign on the CPU for contiguous feature maps (N, C, H, W), forward and backward.
//
// Feature maps are processed one plane (one channel of one image) at a time, for all boxes of the image in turn, so
// that a plane stays in the cache. In the backward pass, a plane belongs to one thread, so no atomics are needed and
// the sums are the same on every run. A box takes two small passes in each direction, since its weights are separable
// (see planes.h):
//   forward   bin rows = row taps * map rows,            bins = bin rows * column weights
//   backward  bin rows = gradient * column weights,      map rows += row taps * bin rows
// All lanes are multiplied, also those of weight zero: a nan in the feature map reaches every bin of the boxes around
// it.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../vector.h"
#include "align.h"
#include "planes.h"

namespace detlib {
namespace {

// A few planes that one call processes. Planes are `plane_stride` values apart, and rows `row_cells`.
template <typename T>
struct Planes {
  T* data;
  int64_t plane_stride, row_cells, count;
};

#define DETLIB_KERNELS "roi_align/planes_kernels.inc"
#include "../each_instruction_set.inc"

template <typename T>
int64_t num_lanes() {
  return vector_bytes() / static_cast<int64_t>(sizeof(T));
}

// Runs `body(image, first channel, number of channels)` over all planes, a few channels at a time.
template <typename Body>
void for_plane_blocks(const RoiAlignShape& shape, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t block = std::clamp<int64_t>(shape.images * shape.channels / (4 * threads), 1, 4);
  const int64_t blocks = (shape.channels + block - 1) / block;
  torch::stable::parallel_for(0, shape.images * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i % blocks * block;
      body(i / blocks, channel, std::min(block, shape.channels - channel));
    }
  });
}

// Returns whether the kernels can work on the memory of the tensor itself.
template <typename scalar_t>
bool works_in_place(const RoiAlignShape& shape) {
  using T = compute_t<scalar_t>;
  return std::is_same_v<scalar_t, T> && shape.width >= num_lanes<T>();
}

template <typename scalar_t>
void forward_impl(const Tensor& input, const Tensor& boxes, const RoiAlignShape& shape, Tensor& output) {
  using T = compute_t<scalar_t>;
  const int64_t lanes = num_lanes<T>(), width = row_cells(shape, lanes);
  const auto prepared = prepare_boxes<RoiTable<T>, T>(boxes, shape, [&] {
    return [builder = RoiTableBuilder<T>(shape, lanes)](const T* box) mutable { return builder.forward(box); };
  });
  const scalar_t* maps = input.const_data_ptr<scalar_t>();
  scalar_t* pooled = output.mutable_data_ptr<scalar_t>();
  const int64_t map_cells = shape.height * shape.width, bins = shape.bins(), bins_stride = bins + lanes;
  int64_t most_cells = 0;
  for (const auto& table : prepared.tables) {
    most_cells = std::max(most_cells, table.cells());
  }

  const auto run = DETLIB_FASTEST(forward_box<T>);
  for_plane_blocks(shape, [&](int64_t image, int64_t channel, int64_t count) {
    const auto& members = prepared.of_image[image];
    if (members.empty()) {
      return;
    }
    const scalar_t* source = maps + (image * shape.channels + channel) * map_cells;
    Planes<const T> planes{nullptr, shape.height * width, width, count};
    std::vector<T> converted;
    if (works_in_place<scalar_t>(shape)) {
      planes.data = reinterpret_cast<const T*>(source);
    } else {
      converted.resize(count * planes.plane_stride, T(0));
      for (int64_t row = 0; row < count * shape.height; ++row) {
        std::transform(
            source + row * shape.width, source + (row + 1) * shape.width, converted.data() + row * planes.row_cells,
            [](scalar_t value) { return static_cast<T>(value); });
      }
      planes.data = converted.data();
    }
    std::vector<T> bin_rows(shape.bins_y * most_cells), result(count * bins_stride);
    for (const int64_t k : members) {
      const auto& table = prepared.tables[k];
      if (table.finite) {
        run(planes, table, shape.bins_y, shape.bins_x, bin_rows.data(), result.data(), bins_stride);
      } else {
        std::fill(result.begin(), result.end(), std::numeric_limits<T>::quiet_NaN());
      }
      for (int64_t p = 0; p < count; ++p) {
        std::transform(
            result.data() + p * bins_stride, result.data() + p * bins_stride + bins,
            pooled + (k * shape.channels + channel + p) * bins, [](T value) { return static_cast<scalar_t>(value); });
      }
    }
  });
}

template <typename scalar_t>
void backward_impl(const Tensor& grad, const Tensor& boxes, const RoiAlignShape& shape, Tensor& output) {
  using T = compute_t<scalar_t>;
  const int64_t lanes = num_lanes<T>(), width = row_cells(shape, lanes);
  const auto prepared = prepare_boxes<RoiTable<T>, T>(boxes, shape, [&] {
    return [builder = RoiTableBuilder<T>(shape, lanes)](const T* box) mutable { return builder.backward(box); };
  });
  const scalar_t* pooled = grad.const_data_ptr<scalar_t>();
  scalar_t* maps = output.mutable_data_ptr<scalar_t>();
  const int64_t map_cells = shape.height * shape.width, bins = shape.bins();

  const auto run = DETLIB_FASTEST(backward_box<T>);
  for_plane_blocks(shape, [&](int64_t image, int64_t channel, int64_t count) {
    scalar_t* target = maps + (image * shape.channels + channel) * map_cells;
    std::fill(target, target + count * map_cells, scalar_t(0));
    const auto& members = prepared.of_image[image];
    if (members.empty()) {
      return;
    }
    Planes<T> planes{nullptr, shape.height * width, width, count};
    std::vector<T> sums;
    if (works_in_place<scalar_t>(shape)) {
      planes.data = reinterpret_cast<T*>(target);
    } else {
      sums.resize(count * planes.plane_stride, T(0));
      planes.data = sums.data();
    }
    std::vector<T> bin_rows(shape.bins_y * lanes), gradient(count * bins);
    for (const int64_t k : members) {
      const scalar_t* source = pooled + (k * shape.channels + channel) * bins;
      std::transform(
          source, source + count * bins, gradient.begin(), [](scalar_t value) { return static_cast<T>(value); });
      const auto& table = prepared.tables[k];
      run(planes, table, shape.bins_y, shape.bins_x, bin_rows.data(), gradient.data(), bins);
    }
    for (int64_t row = 0; !sums.empty() && row < count * shape.height; ++row) {
      const T* from = sums.data() + row * planes.row_cells;
      std::transform(
          from, from + shape.width, target + row * shape.width, [](T value) { return static_cast<scalar_t>(value); });
    }
  });
}

}  // namespace

void roi_align_planes(const Tensor& input, const Tensor& boxes, const RoiAlignShape& shape, Tensor& output) {
  dispatch_floating(input.scalar_type(), "input", [&](auto type) {
    forward_impl<typename decltype(type)::type>(input, boxes, shape, output);
  });
}

void roi_align_planes_backward(const Tensor& grad, const Tensor& boxes, const RoiAlignShape& shape, Tensor& output) {
  dispatch_floating(grad.scalar_type(), "grad", [&](auto type) {
    backward_impl<typename decltype(type)::type>(grad, boxes, shape, output);
  });
}

}  // namespace detlib
