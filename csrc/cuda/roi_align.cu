// RoIAlign on CUDA: one thread per pooled value. The backward pass adds atomically, in any order.
#include "../common/cuda.cuh"
#include "../common/roi_grid.h"

namespace detlib {
namespace {

struct Geometry {
  int64_t images, channels, height, width;
  int64_t bins_y, bins_x;
  double scale;
  int64_t sampling_ratio;
  bool aligned;
};

struct Strides {
  int64_t image, channel, row, column;
};

// The box, channel and bin of a pooled value, and the sampling grid of the bin.
template <typename T>
struct Bin {
  int64_t x, y, channel, box, image;
  RoiAxis<T> rows, columns;
  int64_t first_row, last_row, first_column, last_column;
  bool valid;  // false for a box that is not finite or names no image

  __device__ __forceinline__ Bin(int64_t index, const T* boxes, const Geometry& g)
      : x(index % g.bins_x),
        y(index / g.bins_x % g.bins_y),
        channel(index / (g.bins_x * g.bins_y) % g.channels),
        box(index / (g.bins_x * g.bins_y * g.channels)) {
    const T* corners = boxes + 5 * box;
    valid = corners[0] >= T(0) && corners[0] < static_cast<T>(g.images);
    for (int i = 1; i < 5; ++i) {
      valid = valid && isfinite(corners[i]);
    }
    if (!valid) {
      return;
    }
    image = static_cast<int64_t>(corners[0]);
    const T scale = static_cast<T>(g.scale);
    rows = roi_axis<T>(corners[2], corners[4], scale, g.aligned, g.bins_y, g.sampling_ratio);
    columns = roi_axis<T>(corners[1], corners[3], scale, g.aligned, g.bins_x, g.sampling_ratio);
    roi_sample_range(rows, y, g.height, first_row, last_row);
    roi_sample_range(columns, x, g.width, first_column, last_column);
  }

  __device__ __forceinline__ T num_samples() const {
    return static_cast<T>(rows.count) * static_cast<T>(columns.count);
  }
};

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    int64_t total, const scalar_t* input, Strides strides, const T* boxes, Geometry g, scalar_t* output) {
  for (int64_t index = thread_index(); index < total; index += grid_size()) {
    const Bin<T> bin(index, boxes, g);
    if (!bin.valid) {
      output[index] = static_cast<scalar_t>(static_cast<T>(NAN));
      continue;
    }
    const scalar_t* plane = input + bin.image * strides.image + bin.channel * strides.channel;
    T sum = T(0);
    for (int64_t i = bin.first_row; i < bin.last_row; ++i) {
      const RoiSample<T> r = roi_sample(bin.rows, bin.y, i, g.height);
      if (!r.inside) {
        continue;
      }
      const scalar_t* low = plane + r.low * strides.row;
      const scalar_t* high = plane + r.high * strides.row;
      for (int64_t j = bin.first_column; j < bin.last_column; ++j) {
        const RoiSample<T> c = roi_sample(bin.columns, bin.x, j, g.width);
        if (c.inside) {
          const int64_t left = c.low * strides.column, right = c.high * strides.column;
          sum += r.low_weight *
                  (c.low_weight * static_cast<T>(low[left]) + c.high_weight * static_cast<T>(low[right])) +
              r.high_weight *
                  (c.low_weight * static_cast<T>(high[left]) + c.high_weight * static_cast<T>(high[right]));
        }
      }
    }
    const T count = bin.num_samples();
    output[index] = static_cast<scalar_t>(count > T(0) ? sum / count : T(0));
  }
}

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    int64_t total, const scalar_t* grad, const T* boxes, Geometry g, T* grad_input) {
  for (int64_t index = thread_index(); index < total; index += grid_size()) {
    const Bin<T> bin(index, boxes, g);
    if (!bin.valid || bin.num_samples() == T(0)) {
      continue;
    }
    T* plane = grad_input + (bin.image * g.channels + bin.channel) * g.height * g.width;
    const T share = static_cast<T>(grad[index]) / bin.num_samples();
    for (int64_t i = bin.first_row; i < bin.last_row; ++i) {
      const RoiSample<T> r = roi_sample(bin.rows, bin.y, i, g.height);
      if (!r.inside) {
        continue;
      }
      T* low = plane + r.low * g.width;
      T* high = plane + r.high * g.width;
      for (int64_t j = bin.first_column; j < bin.last_column; ++j) {
        const RoiSample<T> c = roi_sample(bin.columns, bin.x, j, g.width);
        if (c.inside) {
          atomicAdd(low + c.low, share * r.low_weight * c.low_weight);
          atomicAdd(low + c.high, share * r.low_weight * c.high_weight);
          atomicAdd(high + c.low, share * r.high_weight * c.low_weight);
          atomicAdd(high + c.high, share * r.high_weight * c.high_weight);
        }
      }
    }
  }
}

template <typename scalar_t>
void launch_forward(const Tensor& input, const Tensor& boxes, const Geometry& g, Tensor& output) {
  using T = compute_t<scalar_t>;
  const Strides strides{input.stride(0), input.stride(1), input.stride(2), input.stride(3)};
  const int64_t total = output.numel();
  forward_kernel<scalar_t, T><<<num_blocks(total), kThreads, 0, current_stream(input)>>>(
      total, input.const_data_ptr<scalar_t>(), strides, boxes.const_data_ptr<T>(), g,
      output.mutable_data_ptr<scalar_t>());
  check_launch("roi_align: forward_kernel");
}

template <typename scalar_t>
void launch_backward(const Tensor& grad, const Tensor& boxes, const Geometry& g, Tensor& sums) {
  using T = compute_t<scalar_t>;
  const int64_t total = grad.numel();
  backward_kernel<scalar_t, T><<<num_blocks(total), kThreads, 0, current_stream(grad)>>>(
      total, grad.const_data_ptr<scalar_t>(), boxes.const_data_ptr<T>(), g, sums.mutable_data_ptr<T>());
  check_launch("roi_align: backward_kernel");
}

void check_boxes(const Tensor& boxes, const Tensor& values) {
  DETLIB_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, "boxes must have shape (K, 5)");
  DETLIB_CHECK(
      boxes.is_cuda() && boxes.get_device_index() == values.get_device_index(),
      "boxes must be on the device of the other tensor");
}

Tensor roi_align(
    const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height, int64_t pooled_width,
    int64_t sampling_ratio, bool aligned) {
  check_boxes(boxes, input);
  DETLIB_CHECK(input.dim() == 4, "input must have shape (N, C, H, W)");
  const Geometry g{
      input.size(0), input.size(1),  input.size(2), input.size(3), pooled_height, pooled_width,
      spatial_scale, sampling_ratio, aligned};
  const DeviceGuard guard(input.get_device_index());
  Tensor output = torch::stable::new_empty(input, {boxes.size(0), g.channels, pooled_height, pooled_width});
  if (input.numel() == 0) {
    return torch::stable::zero_(output);
  }
  if (output.numel() > 0) {
    const Tensor corners = as_contiguous(boxes, compute_type(input.scalar_type()));
    dispatch_floating(input.scalar_type(), "input", [&](auto type) {
      launch_forward<typename decltype(type)::type>(input, corners, g, output);
    });
  }
  return output;
}

Tensor roi_align_backward(
    const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t pooled_height, int64_t pooled_width,
    int64_t batch_size, int64_t channels, int64_t height, int64_t width, int64_t sampling_ratio, bool aligned) {
  check_boxes(boxes, grad);
  DETLIB_CHECK(
      grad.dim() == 4 && grad.size(0) == boxes.size(0) && grad.size(1) == channels && grad.size(2) == pooled_height &&
          grad.size(3) == pooled_width,
      "grad must have shape (K, C, pooled_height, pooled_width)");
  const Geometry g{
      batch_size, channels, height, width, pooled_height, pooled_width, spatial_scale, sampling_ratio, aligned};
  const DeviceGuard guard(grad.get_device_index());
  const ScalarType type = grad.scalar_type();
  // Reduced precision is summed in float32 and rounded once.
  Tensor sums = torch::stable::new_empty(grad, {batch_size, channels, height, width}, compute_type(type));
  torch::stable::zero_(sums);
  if (grad.numel() > 0 && sums.numel() > 0) {
    const Tensor corners = as_contiguous(boxes, compute_type(type));
    const Tensor gradient = as_contiguous(grad, type);
    dispatch_floating(type, "grad", [&](auto tag) {
      launch_backward<typename decltype(tag)::type>(gradient, corners, g, sums);
    });
  }
  return sums.scalar_type() == type ? sums : torch::stable::to(sums, type);
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CUDA, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&roi_align_backward));
}

}  // namespace
}  // namespace detlib
