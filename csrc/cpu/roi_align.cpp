// RoIAlign on the CPU, forward and backward.
//
// The map is worked on plane by plane (one channel of one image), all boxes of the image in turn, so that a plane stays
// in the cache and, in the backward pass, belongs to one thread: no atomics, and the same sums on every run. A box
// costs two small passes in each direction, since its weights are separable (see roi_tables.h):
//   forward   bin rows = row taps * map rows,            bins = bin rows * column weights
//   backward  bin rows = gradient * column weights,      map rows += row taps * bin rows
// All lanes are multiplied, also those of weight zero: a nan in the map reaches every bin of the boxes around it.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../common/stable.h"
#include "roi_tables.h"
#include "vector.h"

namespace detlib {
namespace {

// A few planes that one call works on, `plane_stride` and `row_cells` values apart.
template <typename T>
struct Planes {
  T* data;
  int64_t plane_stride, row_cells, count;
};

namespace baseline {
constexpr int kVectorBytes = 16;
#define DETLIB_TARGET
#include "roi_kernels.inc"
#undef DETLIB_TARGET
}  // namespace baseline

#if DETLIB_HAS_AVX2
namespace avx2 {
constexpr int kVectorBytes = 32;
#define DETLIB_TARGET __attribute__((target("avx2,fma")))
#include "roi_kernels.inc"
#undef DETLIB_TARGET
}  // namespace avx2
#else
namespace avx2 = baseline;
#endif

// The tables of all boxes, and which boxes lie on each image.
template <typename T>
struct Boxes {
  std::vector<RoiTable<T>> tables;
  std::vector<std::vector<int64_t>> of_image;
  int64_t most_cells = 0;
};

template <typename T, typename Build>
Boxes<T> prepare_boxes(const Tensor& boxes, const RoiAlignShape& shape, const Build& build) {
  const int64_t num_boxes = boxes.size(0);
  const Tensor corners = as_contiguous(boxes, std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float);
  const T* data = corners.const_data_ptr<T>();
  Boxes<T> prepared;
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
    RoiTableBuilder<T> builder(shape);
    for (int64_t k = begin; k < end; ++k) {
      prepared.tables[k] = build(builder, data + 5 * k);
    }
  });
  for (const auto& table : prepared.tables) {
    prepared.most_cells = std::max(prepared.most_cells, table.cells());
  }
  return prepared;
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

// Whether the kernels can work on the tensor's own memory.
template <typename scalar_t>
bool works_in_place(const RoiAlignShape& shape) {
  return std::is_same_v<scalar_t, compute_t<scalar_t>> && shape.width >= shape.lanes;
}

template <typename scalar_t>
void forward_impl(const Tensor& input, const Tensor& boxes, const RoiAlignShape& shape, Tensor& output) {
  using T = compute_t<scalar_t>;
  const auto prepared = prepare_boxes<T>(
      boxes, shape, [](RoiTableBuilder<T>& builder, const T* box) { return builder.forward(box); });
  const scalar_t* maps = input.const_data_ptr<scalar_t>();
  scalar_t* pooled = output.mutable_data_ptr<scalar_t>();
  const int64_t map_cells = shape.height * shape.width, bins = shape.bins(), bins_stride = bins + shape.lanes;

  const auto run = use_avx2() ? &avx2::forward_box<T> : &baseline::forward_box<T>;
  for_plane_blocks(shape, [&](int64_t image, int64_t channel, int64_t count) {
    const auto& members = prepared.of_image[image];
    if (members.empty()) {
      return;
    }
    const scalar_t* source = maps + (image * shape.channels + channel) * map_cells;
    Planes<const T> planes{nullptr, shape.height * shape.row_cells(), shape.row_cells(), count};
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
    std::vector<T> bin_rows(shape.bins_y * prepared.most_cells), result(count * bins_stride);
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
  const auto prepared = prepare_boxes<T>(
      boxes, shape, [](RoiTableBuilder<T>& builder, const T* box) { return builder.backward(box); });
  const scalar_t* pooled = grad.const_data_ptr<scalar_t>();
  scalar_t* maps = output.mutable_data_ptr<scalar_t>();
  const int64_t map_cells = shape.height * shape.width, bins = shape.bins();

  const auto run = use_avx2() ? &avx2::backward_box<T> : &baseline::backward_box<T>;
  for_plane_blocks(shape, [&](int64_t image, int64_t channel, int64_t count) {
    scalar_t* target = maps + (image * shape.channels + channel) * map_cells;
    std::fill(target, target + count * map_cells, scalar_t(0));
    const auto& members = prepared.of_image[image];
    if (members.empty()) {
      return;
    }
    Planes<T> planes{nullptr, shape.height * shape.row_cells(), shape.row_cells(), count};
    std::vector<T> sums;
    if (works_in_place<scalar_t>(shape)) {
      planes.data = reinterpret_cast<T*>(target);
    } else {
      sums.resize(count * planes.plane_stride, T(0));
      planes.data = sums.data();
    }
    std::vector<T> bin_rows(shape.bins_y * shape.lanes), gradient(count * bins);
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

void check_boxes(const Tensor& boxes) {
  DETLIB_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, "boxes must have shape (K, 5)");
}

int64_t num_lanes(const Tensor& values) {
  return vector_bytes() / (values.scalar_type() == ScalarType::Double ? 8 : 4);
}

Tensor roi_align(
    const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height, int64_t pooled_width,
    int64_t sampling_ratio, bool aligned) {
  check_boxes(boxes);
  DETLIB_CHECK(input.dim() == 4, "input must have shape (N, C, H, W)");
  const RoiAlignShape shape{
      input.size(0), input.size(1),  input.size(2), input.size(3), pooled_height, pooled_width,
      spatial_scale, sampling_ratio, aligned,       num_lanes(input)};
  Tensor output = torch::stable::new_empty(input, {boxes.size(0), shape.channels, pooled_height, pooled_width});
  if (input.numel() == 0) {
    return torch::stable::zero_(output);
  }
  if (output.numel() > 0) {
    const Tensor maps = as_contiguous(input, input.scalar_type());
    dispatch_floating(input.scalar_type(), "input", [&](auto type) {
      forward_impl<typename decltype(type)::type>(maps, boxes, shape, output);
    });
  }
  return output;
}

Tensor roi_align_backward(
    const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t pooled_height, int64_t pooled_width,
    int64_t batch_size, int64_t channels, int64_t height, int64_t width, int64_t sampling_ratio, bool aligned) {
  check_boxes(boxes);
  DETLIB_CHECK(
      grad.dim() == 4 && grad.size(0) == boxes.size(0) && grad.size(1) == channels && grad.size(2) == pooled_height &&
          grad.size(3) == pooled_width,
      "grad must have shape (K, C, pooled_height, pooled_width)");
  const RoiAlignShape shape{
      batch_size,   channels,      height,         width,   pooled_height,
      pooled_width, spatial_scale, sampling_ratio, aligned, num_lanes(grad)};
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
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&roi_align_backward));
}

}  // namespace
}  // namespace detlib
