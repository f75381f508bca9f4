// RoIAlign of rotated boxes on CUDA: one thread per pooled value. The backward pass adds atomically, in no fixed
// order.
#include "../common/cuda.cuh"
#include "../common/roi_align_rotated_grid.h"

namespace detlib {
namespace {

struct Geometry {
  int64_t images, channels, height, width;
  int64_t bins_y, bins_x;
  double scale;
  int64_t sampling_ratio;
};

struct Strides {
  int64_t image, channel, row, column;
};

// The box, channel and bin of a pooled value, and its sampling grid.
template <typename T>
struct Bin {
  int64_t x, y, channel, image;
  RotatedGrid<T> grid;
  int64_t first_row, last_row, first_column, last_column;
  bool valid;  // false for a box that is not finite or has an invalid image index

  __device__ __forceinline__ Bin(int64_t index, const T* boxes, const Geometry& g)
      : x(index % g.bins_x),
        y(index / g.bins_x % g.bins_y),
        channel(index / (g.bins_x * g.bins_y) % g.channels) {
    const T* box = boxes + 6 * (index / (g.bins_x * g.bins_y * g.channels));
    valid = box[0] >= T(0) && box[0] < static_cast<T>(g.images);
    for (int i = 1; i < 6; ++i) {
      valid = valid && isfinite(box[i]);
    }
    if (!valid) {
      return;
    }
    image = static_cast<int64_t>(box[0]);
    grid = rotated_grid<T>(
        box + 1, static_cast<T>(g.scale), g.bins_y, g.bins_x, g.height, g.width, g.sampling_ratio);
    rotated_sample_range(grid.rows, grid.first_row, grid.reach, y, first_row, last_row);
    rotated_sample_range(grid.columns, grid.first_column, grid.reach, x, first_column, last_column);
  }

  // Runs `body(sample)` for each sample inside the feature map.
  template <typename Body>
  __device__ __forceinline__ void for_samples(const Geometry& g, const Body& body) const {
    for (int64_t i = first_row; i < last_row; ++i) {
      const T along_height = rotated_position(grid.rows, y, i);
      for (int64_t j = first_column; j < last_column; ++j) {
        const RotatedSample<T> sample =
            rotated_sample(grid, along_height, rotated_position(grid.columns, x, j), g.height, g.width);
        if (sample.inside) {
          body(sample);
        }
      }
    }
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
    bin.for_samples(g, [&](const RotatedSample<T>& s) {
      const scalar_t* top = plane + s.top * strides.row;
      const scalar_t* bottom = plane + s.bottom * strides.row;
      const int64_t left = s.left * strides.column, right = s.right * strides.column;
      sum += (T(1) - s.bottom_weight) * ((T(1) - s.right_weight) * static_cast<T>(top[left]) +
                                        s.right_weight * static_cast<T>(top[right])) +
          s.bottom_weight * ((T(1) - s.right_weight) * static_cast<T>(bottom[left]) +
                            s.right_weight * static_cast<T>(bottom[right]));
    });
    const T count = bin.grid.num_samples();
    output[index] = static_cast<scalar_t>(count > T(0) ? sum / count : T(0));
  }
}

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    int64_t total, const scalar_t* grad, const T* boxes, Geometry g, T* grad_input) {
  for (int64_t index = thread_index(); index < total; index += grid_size()) {
    const Bin<T> bin(index, boxes, g);
    if (!bin.valid || bin.grid.num_samples() == T(0)) {
      continue;
    }
    T* plane = grad_input + (bin.image * g.channels + bin.channel) * g.height * g.width;
    const T sample_grad = static_cast<T>(grad[index]) / bin.grid.num_samples();
    bin.for_samples(g, [&](const RotatedSample<T>& s) {
      T* top = plane + s.top * g.width;
      T* bottom = plane + s.bottom * g.width;
      atomicAdd(top + s.left, sample_grad * (T(1) - s.bottom_weight) * (T(1) - s.right_weight));
      atomicAdd(top + s.right, sample_grad * (T(1) - s.bottom_weight) * s.right_weight);
      atomicAdd(bottom + s.left, sample_grad * s.bottom_weight * (T(1) - s.right_weight));
      atomicAdd(bottom + s.right, sample_grad * s.bottom_weight * s.right_weight);
    });
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
  check_launch("roi_align_rotated: forward_kernel");
}

template <typename scalar_t>
void launch_backward(const Tensor& grad, const Tensor& boxes, const Geometry& g, Tensor& sums) {
  using T = compute_t<scalar_t>;
  const int64_t total = grad.numel();
  backward_kernel<scalar_t, T><<<num_blocks(total), kThreads, 0, current_stream(grad)>>>(
      total, grad.const_data_ptr<scalar_t>(), boxes.const_data_ptr<T>(), g, sums.mutable_data_ptr<T>());
  check_launch("roi_align_rotated: backward_kernel");
}

void check_boxes(const Tensor& boxes, const Tensor& values) {
  DETLIB_CHECK(boxes.dim() == 2 && boxes.size(1) == 6, "boxes must have shape (K, 6)");
  DETLIB_CHECK(
      boxes.is_cuda() && boxes.get_device_index() == values.get_device_index(),
      "boxes must be on the device of the other tensor");
}

Tensor roi_align_rotated(
    const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height, int64_t pooled_width,
    int64_t sampling_ratio) {
  check_boxes(boxes, input);
  DETLIB_CHECK(input.dim() == 4, "input must have shape (N, C, H, W)");
  const Geometry g{input.size(0), input.size(1), input.size(2),  input.size(3),
                   pooled_height, pooled_width,  spatial_scale, sampling_ratio};
  const DeviceGuard guard(input.get_device_index());
  Tensor output = torch::stable::new_empty(input, {boxes.size(0), g.channels, pooled_height, pooled_width});
  if (input.numel() == 0) {
    return torch::stable::zero_(output);
  }
  if (output.numel() > 0) {
    const Tensor numbers = as_contiguous(boxes, compute_type(input.scalar_type()));
    dispatch_floating(input.scalar_type(), "input", [&](auto type) {
      launch_forward<typename decltype(type)::type>(input, numbers, g, output);
    });
  }
  return output;
}

Tensor roi_align_rotated_backward(
    const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t pooled_height, int64_t pooled_width,
    int64_t batch_size, int64_t channels, int64_t height, int64_t width, int64_t sampling_ratio) {
  check_boxes(boxes, grad);
  DETLIB_CHECK(
      grad.dim() == 4 && grad.size(0) == boxes.size(0) && grad.size(1) == channels && grad.size(2) == pooled_height &&
          grad.size(3) == pooled_width,
      "grad must have shape (K, C, pooled_height, pooled_width)");
  const Geometry g{batch_size,    channels,     height,        width,
                   pooled_height, pooled_width, spatial_scale, sampling_ratio};
  const DeviceGuard guard(grad.get_device_index());
  const ScalarType type = grad.scalar_type();
  // Reduced precision is summed in float32 and rounded once.
  Tensor sums = torch::stable::new_empty(grad, {batch_size, channels, height, width}, compute_type(type));
  torch::stable::zero_(sums);
  if (grad.numel() > 0 && sums.numel() > 0) {
    const Tensor numbers = as_contiguous(boxes, compute_type(type));
    const Tensor gradient = as_contiguous(grad, type);
    dispatch_floating(type, "grad", [&](auto tag) {
      launch_backward<typename decltype(tag)::type>(gradient, numbers, g, sums);
    });
  }
  return as_type(sums, type);
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CUDA, m) {
  m.impl("roi_align_rotated", TORCH_BOX(&roi_align_rotated));
  m.impl("roi_align_rotated_backward", TORCH_BOX(&roi_align_rotated_backward));
}

}  // namespace
}  // namespace detlib
