// Multi-scale deformable attention on CUDA. A group of lanes (a power of two, in one warp) computes one head of one
// query. The channels are interleaved over the lanes, so that neighboring lanes read neighboring values. The backward
// pass adds to the gradient of the values atomically, in float32 or float64 and in no fixed order; the other gradients
// are sums over a group.
#include <type_traits>

#include "../common/cuda.cuh"

namespace detlib {
namespace {

// value (images, cells, heads, channels), locations (images, queries, heads, levels, points, 2) as x and y in [0, 1],
// weights likewise without the last dimension; all contiguous.
template <typename scalar_t, typename T>
struct Attention {
  const scalar_t* value;
  const T* locations;
  const T* weights;
  const int64_t* sizes;  // (levels, 2): height and width
  const int64_t* starts;
  int64_t images, cells, heads, channels, queries, levels, points;
};

// One sample: the positions of its cells in the values of the image, and their weights.
template <typename T>
struct Sample {
  int64_t offset;  // of the top left cell
  T down, right;
  bool inside[4];  // top left, top right, bottom left, bottom right
};

// Finds the cells of a sample; returns false if it reads no cell of its level.
template <typename T>
__device__ __forceinline__ bool locate(
    const T* location, int64_t height, int64_t width, int64_t start, int64_t row, Sample<T>& sample) {
  const T x = location[0] * static_cast<T>(width) - T(0.5);
  const T y = location[1] * static_cast<T>(height) - T(0.5);
  if (!(x > T(-1) && y > T(-1) && x < static_cast<T>(width) && y < static_cast<T>(height))) {
    return false;
  }
  const T floor_x = floor(x), floor_y = floor(y);
  const int64_t left = static_cast<int64_t>(floor_x), top = static_cast<int64_t>(floor_y);
  sample.right = x - floor_x;
  sample.down = y - floor_y;
  sample.offset = (start + top * width + left) * row;
  const bool on_top = top >= 0, on_bottom = top + 1 < height, on_left = left >= 0, on_right = left + 1 < width;
  sample.inside[0] = on_top && on_left;
  sample.inside[1] = on_top && on_right;
  sample.inside[2] = on_bottom && on_left;
  sample.inside[3] = on_bottom && on_right;
  return true;
}

// Returns whether a level exceeds the values. The host does not check the levels, so the kernels must not read this
// one.
__device__ __forceinline__ bool is_wrong_level(int64_t height, int64_t width, int64_t start, int64_t cells) {
  const bool empty = height == 0 || width == 0;  // else no product below overflows: tensors have fewer cells
  return height < 0 || width < 0 || start < 0 || start > cells ||
      (!empty && (height > cells || width > cells || height * width > cells - start));
}

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    Attention<scalar_t, T> a, int64_t total, int64_t lanes, scalar_t* output) {
  const int64_t row = a.heads * a.channels, samples = a.levels * a.points;
  for (int64_t index = thread_index(); index < total; index += grid_size()) {
    const int64_t lane = index % lanes, group = index / lanes;
    const int64_t head = group % a.heads, image = group / (a.heads * a.queries);
    const scalar_t* values = a.value + image * a.cells * row + head * a.channels;
    for (int64_t c = lane; c < a.channels; c += lanes) {
      const T* location = a.locations + 2 * group * samples;
      const T* weight = a.weights + group * samples;
      T sum = T(0);
      for (int64_t level = 0; level < a.levels; ++level) {
        const int64_t height = a.sizes[2 * level], width = a.sizes[2 * level + 1], start = a.starts[level];
        if (is_wrong_level(height, width, start, a.cells)) {
          sum = static_cast<T>(NAN);
          break;
        }
        for (int64_t p = 0; p < a.points; ++p, location += 2, ++weight) {
          Sample<T> s;
          if (!locate(location, height, width, start, row, s)) {
            sum += (location[0] + location[1] + *weight) * T(0);  // nan if any is not finite
            continue;
          }
          const scalar_t* cell = values + s.offset + c;
          const scalar_t* below = cell + width * row;
          const T top_left = s.inside[0] ? static_cast<T>(cell[0]) : T(0);
          const T top_right = s.inside[1] ? static_cast<T>(cell[row]) : T(0);
          const T bottom_left = s.inside[2] ? static_cast<T>(below[0]) : T(0);
          const T bottom_right = s.inside[3] ? static_cast<T>(below[row]) : T(0);
          const T upper = (T(1) - s.right) * top_left + s.right * top_right;
          const T lower = (T(1) - s.right) * bottom_left + s.right * bottom_right;
          sum += *weight * ((T(1) - s.down) * upper + s.down * lower);
        }
      }
      output[group * a.channels + c] = static_cast<scalar_t>(sum);
    }
  }
}

// Returns the sum over a group of `lanes` neighboring threads, in its first thread.
template <int lanes, typename T>
__device__ __forceinline__ T sum_over_lanes(T value) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, step, lanes);
  }
  return value;
}

// If the cell is in the feature map: adds to its gradient, and adds its product with the output's gradient to
// `product`.
template <typename scalar_t, typename T>
__device__ __forceinline__ void visit_cell(
    bool inside, const scalar_t* cell, T* grad_cell, T gradient, T weight, T& product) {
  if (inside) {
    product += gradient * static_cast<T>(*cell);
    atomicAdd(grad_cell, gradient * weight);
  }
}

// All threads of a warp take the same number of turns, since they exchange sums; threads without a head do nothing
// else.
template <int lanes, typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    Attention<scalar_t, T> a, int64_t groups, int64_t turns, const scalar_t* grad, T* grad_value, T* grad_locations,
    T* grad_weights) {
  const int64_t row = a.heads * a.channels, samples = a.levels * a.points;
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t index = turn * grid_size() + thread_index();
    const int64_t lane = index % lanes, group = index / lanes;
    const bool active = group < groups;
    const int64_t head = group % a.heads, image = group / (a.heads * a.queries);
    const int64_t base = image * a.cells * row + head * a.channels;
    for (int64_t level = 0; level < a.levels; ++level) {
      const int64_t height = a.sizes[2 * level], width = a.sizes[2 * level + 1], start = a.starts[level];
      const bool readable = active && !is_wrong_level(height, width, start, a.cells);
      for (int64_t p = 0; p < a.points; ++p) {
        const int64_t i = group * samples + level * a.points + p;
        Sample<T> s;
        T top_left = T(0), top_right = T(0), bottom_left = T(0), bottom_right = T(0), weight = T(0);
        const bool inside = readable && locate(a.locations + 2 * i, height, width, start, row, s);
        if (inside) {
          weight = a.weights[i];
          const T up = (T(1) - s.down) * weight, down = s.down * weight, left = T(1) - s.right;
          for (int64_t c = lane; c < a.channels; c += lanes) {
            const T gradient = static_cast<T>(grad[group * a.channels + c]);
            const int64_t cell = base + s.offset + c, below = cell + width * row;
            visit_cell(s.inside[0], a.value + cell, grad_value + cell, gradient, up * left, top_left);
            visit_cell(s.inside[1], a.value + cell + row, grad_value + cell + row, gradient, up * s.right, top_right);
            visit_cell(s.inside[2], a.value + below, grad_value + below, gradient, down * left, bottom_left);
            visit_cell(
                s.inside[3], a.value + below + row, grad_value + below + row, gradient, down * s.right, bottom_right);
          }
        }
        top_left = sum_over_lanes<lanes>(top_left);
        top_right = sum_over_lanes<lanes>(top_right);
        bottom_left = sum_over_lanes<lanes>(bottom_left);
        bottom_right = sum_over_lanes<lanes>(bottom_right);
        if (inside && lane == 0) {
          const T up = T(1) - s.down, left = T(1) - s.right;
          grad_weights[i] = up * (left * top_left + s.right * top_right) +
              s.down * (left * bottom_left + s.right * bottom_right);
          grad_locations[2 * i] = weight * static_cast<T>(width) *
              (up * (top_right - top_left) + s.down * (bottom_right - bottom_left));
          grad_locations[2 * i + 1] = weight * static_cast<T>(height) *
              (left * (bottom_left - top_left) + s.right * (bottom_right - top_right));
        }
      }
    }
  }
}

// Returns the number of lanes of a group: the smallest power of two that covers the channels, at most a warp.
int num_lanes(int64_t channels) {
  int lanes = 1;
  while (lanes < channels && lanes < 32) {
    lanes *= 2;
  }
  return lanes;
}

// Calls `body(std::integral_constant<int, lanes>{})`.
template <typename Body>
void dispatch_lanes(int lanes, const Body& body) {
  switch (lanes) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    case 8:
      return body(std::integral_constant<int, 8>{});
    case 16:
      return body(std::integral_constant<int, 16>{});
    default:
      return body(std::integral_constant<int, 32>{});
  }
}

template <typename scalar_t, typename T>
void launch_forward(const Attention<scalar_t, T>& attention, Tensor& output) {
  const int64_t lanes = num_lanes(attention.channels);
  const int64_t total = attention.images * attention.queries * attention.heads * lanes;
  forward_kernel<scalar_t, T><<<num_blocks(total), kThreads, 0, current_stream(output)>>>(
      attention, total, lanes, output.mutable_data_ptr<scalar_t>());
  check_launch("ms_deform_attn: forward_kernel");
}

template <int lanes, typename scalar_t, typename T>
void launch_backward(
    const Attention<scalar_t, T>& attention, const Tensor& grad, Tensor& grad_value, Tensor& grad_locations,
    Tensor& grad_weights) {
  const int64_t groups = attention.images * attention.queries * attention.heads;
  const unsigned int blocks = num_blocks(groups * lanes);
  const int64_t threads = static_cast<int64_t>(blocks) * kThreads;
  const int64_t turns = (groups * lanes + threads - 1) / threads;
  backward_kernel<lanes, scalar_t, T><<<blocks, kThreads, 0, current_stream(grad)>>>(
      attention, groups, turns, grad.const_data_ptr<scalar_t>(), grad_value.mutable_data_ptr<T>(),
      grad_locations.mutable_data_ptr<T>(), grad_weights.mutable_data_ptr<T>());
  check_launch("ms_deform_attn: backward_kernel");
}

bool on_same_device(const Tensor& tensor, const Tensor& value) {
  return tensor.is_cuda() && tensor.get_device_index() == value.get_device_index();
}

void check_arguments(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  DETLIB_CHECK(value.dim() == 4, "value must have shape (N, S, M, D)");
  DETLIB_CHECK(spatial_shapes.dim() == 2 && spatial_shapes.size(1) == 2, "spatial_shapes must have shape (L, 2)");
  const int64_t levels = spatial_shapes.size(0);
  DETLIB_CHECK(
      level_start_index.dim() == 1 && level_start_index.size(0) == levels, "level_start_index must have shape (L,)");
  DETLIB_CHECK(
      sampling_locations.dim() == 6 && sampling_locations.size(0) == value.size(0) &&
          sampling_locations.size(2) == value.size(2) && sampling_locations.size(3) == levels &&
          sampling_locations.size(5) == 2,
      "sampling_locations must have shape (N, Q, M, L, P, 2)");
  bool fits = attention_weights.dim() == 5;
  for (int64_t i = 0; fits && i < 5; ++i) {
    fits = attention_weights.size(i) == sampling_locations.size(i);
  }
  DETLIB_CHECK(fits, "attention_weights must have shape (N, Q, M, L, P)");
  DETLIB_CHECK(
      on_same_device(spatial_shapes, value) && on_same_device(level_start_index, value) &&
          on_same_device(sampling_locations, value) && on_same_device(attention_weights, value),
      "spatial_shapes, level_start_index, sampling_locations and attention_weights must be on the device of value");
}

// Calls `body(attention)` with contiguous tensors; locations and weights are in the compute type.
template <typename Body>
void with_attention(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights, const Body& body) {
  const ScalarType type = value.scalar_type();
  const Tensor values = as_contiguous(value, type);
  const Tensor sizes = as_contiguous(spatial_shapes, ScalarType::Long);
  const Tensor starts = as_contiguous(level_start_index, ScalarType::Long);
  const Tensor locations = as_contiguous(sampling_locations, compute_type(type));
  const Tensor weights = as_contiguous(attention_weights, compute_type(type));
  dispatch_floating(type, "value", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using T = compute_t<scalar_t>;
    body(Attention<scalar_t, T>{
        values.const_data_ptr<scalar_t>(), locations.const_data_ptr<T>(), weights.const_data_ptr<T>(),
        sizes.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>(), value.size(0), value.size(1),
        value.size(2), value.size(3), locations.size(1), locations.size(3), locations.size(4)});
  });
}

Tensor ms_deform_attn(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  check_arguments(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  const DeviceGuard guard(value.get_device_index());
  Tensor output =
      torch::stable::new_empty(value, {value.size(0), sampling_locations.size(1), value.size(2) * value.size(3)});
  if (output.numel() > 0) {
    const auto run = [&](const auto& attention) { launch_forward(attention, output); };
    with_attention(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, run);
  }
  return output;
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad, const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  check_arguments(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  DETLIB_CHECK(
      grad.dim() == 3 && grad.size(0) == value.size(0) && grad.size(1) == sampling_locations.size(1) &&
          grad.size(2) == value.size(2) * value.size(3) && on_same_device(grad, value),
      "grad must have shape (N, Q, M * D) and be on the device of value");
  const DeviceGuard guard(value.get_device_index());
  const ScalarType type = compute_type(value.scalar_type());
  const auto zeros_like = [&](const Tensor& tensor) {
    Tensor result = torch::stable::new_empty(value, tensor.sizes(), type);
    return torch::stable::zero_(result);
  };
  Tensor grad_value = zeros_like(value);
  Tensor grad_locations = zeros_like(sampling_locations), grad_weights = zeros_like(attention_weights);
  if (grad.numel() > 0 && attention_weights.numel() > 0) {
    const Tensor gradient = as_contiguous(grad, value.scalar_type());
    const auto run = [&](const auto& attention) {
      dispatch_lanes(num_lanes(attention.channels), [&](auto lanes) {
        launch_backward<decltype(lanes)::value>(attention, gradient, grad_value, grad_locations, grad_weights);
      });
    };
    with_attention(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, run);
  }
  return {
      as_type(grad_value, value.scalar_type()), as_type(grad_locations, sampling_locations.scalar_type()),
      as_type(grad_weights, attention_weights.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
}

}  // namespace
}  // namespace detlib
