// RoIAlign on CUDA. Feature maps and pooled values may be contiguous or channels-last; the result has the layout of the
// input (backward: of the gradient).
//
// One thread per pooled value, in memory order. The backward pass adds atomically, in no fixed order. In deterministic
// mode, one thread per cell of the feature map adds the boxes in order instead: the sums are the same on every run.
#include <type_traits>

#include "../common/cuda.cuh"
#include "../common/roi_align_grid.h"

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

template <typename T>
__device__ __forceinline__ RoiAxis<T> box_rows(const T* corners, const Geometry& g) {
  return roi_axis<T>(corners[2], corners[4], static_cast<T>(g.scale), g.aligned, g.bins_y, g.sampling_ratio);
}

template <typename T>
__device__ __forceinline__ RoiAxis<T> box_columns(const T* corners, const Geometry& g) {
  return roi_axis<T>(corners[1], corners[3], static_cast<T>(g.scale), g.aligned, g.bins_x, g.sampling_ratio);
}

// The box, channel and bin of a pooled value, and the sampling grid of the bin.
template <typename T>
struct Bin {
  int64_t x, y, channel, box, image;
  RoiAxis<T> rows, columns;
  int64_t first_row, last_row, first_column, last_column;
  bool valid;  // false for a box that is not finite or has an invalid image index

  template <typename index_t>
  __device__ __forceinline__ Bin(index_t index, const T* boxes, const Geometry& g, bool channels_last) {
    const index_t bins_x = g.bins_x, bins_y = g.bins_y, channels = g.channels;
    if (channels_last) {
      channel = index % channels;
      index /= channels;
    }
    x = index % bins_x;
    index /= bins_x;
    y = index % bins_y;
    index /= bins_y;
    if (!channels_last) {
      channel = index % channels;
      index /= channels;
    }
    box = index;
    const T* corners = boxes + 5 * box;
    valid = corners[0] >= T(0) && corners[0] < static_cast<T>(g.images);
    for (int i = 1; i < 5; ++i) {
      valid = valid && isfinite(corners[i]);
    }
    if (!valid) {
      return;
    }
    image = static_cast<int64_t>(corners[0]);
    rows = box_rows(corners, g);
    columns = box_columns(corners, g);
    roi_sample_range(rows, y, g.height, first_row, last_row);
    roi_sample_range(columns, x, g.width, first_column, last_column);
  }

  __device__ __forceinline__ T num_samples() const {
    return static_cast<T>(rows.count) * static_cast<T>(columns.count);
  }
};

// index_t is uint32_t if the numbers of pooled values and of cells in a plane fit: 64-bit arithmetic would take most of
// the time.
template <typename scalar_t, typename T, typename index_t>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    int64_t total, const scalar_t* input, Strides strides, const T* boxes, Geometry g, bool channels_last,
    scalar_t* output) {
  using int_t = std::make_signed_t<index_t>;
  for (int64_t index = thread_index(); index < total; index += grid_size()) {
    const Bin<T> bin(static_cast<index_t>(index), boxes, g, channels_last);
    if (!bin.valid) {
      output[index] = static_cast<scalar_t>(static_cast<T>(NAN));
      continue;
    }
    const scalar_t* plane = input + bin.image * strides.image + bin.channel * strides.channel;
    const int_t y = bin.y, x = bin.x, height = g.height, width = g.width;
    const int_t row_stride = strides.row, column_stride = strides.column;
    const int_t first_row = bin.first_row, last_row = bin.last_row;
    const int_t first_column = bin.first_column, last_column = bin.last_column;
    T sum = T(0);
    for (int_t i = first_row; i < last_row; ++i) {
      const auto r = roi_sample<T, int_t>(bin.rows, y, i, height);
      if (!r.inside) {
        continue;
      }
      const scalar_t* low = plane + r.low * row_stride;
      const scalar_t* high = plane + r.high * row_stride;
      for (int_t j = first_column; j < last_column; ++j) {
        const auto c = roi_sample<T, int_t>(bin.columns, x, j, width);
        if (c.inside) {
          const int_t left = c.low * column_stride, right = c.high * column_stride;
          const T upper = fma(c.low_weight, static_cast<T>(low[left]), c.high_weight * static_cast<T>(low[right]));
          const T lower = fma(c.low_weight, static_cast<T>(high[left]), c.high_weight * static_cast<T>(high[right]));
          sum = fma(r.low_weight, upper, fma(r.high_weight, lower, sum));
        }
      }
    }
    const T count = bin.num_samples();
    output[index] = static_cast<scalar_t>(count > T(0) ? sum / count : T(0));
  }
}

template <typename scalar_t, typename T, typename index_t>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    int64_t total, const scalar_t* grad, Strides strides, const T* boxes, Geometry g, bool channels_last,
    T* grad_input) {
  using int_t = std::make_signed_t<index_t>;
  for (int64_t index = thread_index(); index < total; index += grid_size()) {
    const Bin<T> bin(static_cast<index_t>(index), boxes, g, channels_last);
    if (!bin.valid || bin.num_samples() == T(0)) {
      continue;
    }
    T* plane = grad_input + bin.image * strides.image + bin.channel * strides.channel;
    const T sample_grad = static_cast<T>(grad[index]) / bin.num_samples();
    const int_t y = bin.y, x = bin.x, height = g.height, width = g.width;
    const int_t row_stride = strides.row, column_stride = strides.column;
    const int_t first_row = bin.first_row, last_row = bin.last_row;
    const int_t first_column = bin.first_column, last_column = bin.last_column;
    for (int_t i = first_row; i < last_row; ++i) {
      const auto r = roi_sample<T, int_t>(bin.rows, y, i, height);
      if (!r.inside) {
        continue;
      }
      T* low = plane + r.low * row_stride;
      T* high = plane + r.high * row_stride;
      for (int_t j = first_column; j < last_column; ++j) {
        const auto c = roi_sample<T, int_t>(bin.columns, x, j, width);
        if (c.inside) {
          const int_t left = c.low * column_stride, right = c.high * column_stride;
          atomicAdd(low + left, sample_grad * r.low_weight * c.low_weight);
          atomicAdd(low + right, sample_grad * r.low_weight * c.high_weight);
          atomicAdd(high + left, sample_grad * r.high_weight * c.low_weight);
          atomicAdd(high + right, sample_grad * r.high_weight * c.high_weight);
        }
      }
    }
  }
}

constexpr int kTile = 16;         // side of the tile of cells of a block, which has one thread per cell
constexpr int kTileChannels = 8;  // number of channels of each thread
static_assert(kTile * kTile == kThreads);

// Returns whether samples of the axis can read cells [begin, begin + kTile).
template <typename T>
__device__ __forceinline__ bool touches(const RoiAxis<T>& axis, int64_t bins, int64_t begin) {
  const T end = axis.start + axis.bin * static_cast<T>(bins);
  return axis.count > 0 && max(axis.start, end) >= static_cast<T>(begin - 1) &&
      min(axis.start, end) <= static_cast<T>(begin + kTile);
}

// Computes the weights of one bin for cells [begin, begin + kTile) along an axis of `size` cells.
template <typename T>
__device__ void tile_weights(const RoiAxis<T>& axis, int64_t bin, int64_t size, int64_t begin, T* weights) {
  for (int i = 0; i < kTile; ++i) {
    weights[i] = T(0);
  }
  int64_t sample, last;
  for (roi_sample_range(axis, bin, size, sample, last); sample < last; ++sample) {
    const RoiSample<T> s = roi_sample(axis, bin, sample, size);
    if (s.inside && s.low >= begin && s.low < begin + kTile) {
      weights[s.low - begin] += s.low_weight;
    }
    if (s.inside && s.high >= begin && s.high < begin + kTile) {
      weights[s.high - begin] += s.high_weight;
    }
  }
  for (int i = 0; i < kTile; ++i) {
    weights[i] /= static_cast<T>(axis.count);
  }
}

// One block per tile of the feature map and kTileChannels channels. `pooled` has the strides of grad, `strides` has
// those of grad_input.
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) collect_kernel(
    int64_t num_blocks, const scalar_t* grad, Strides pooled, const T* boxes, int64_t num_boxes, Geometry g,
    Strides strides, T* grad_input) {
  extern __shared__ double shared[];
  T* row_weights = reinterpret_cast<T*>(shared);
  T* column_weights = row_weights + g.bins_y * kTile;
  const int64_t tiles_x = (g.width + kTile - 1) / kTile, tiles_y = (g.height + kTile - 1) / kTile;
  const int64_t groups = (g.channels + kTileChannels - 1) / kTileChannels;
  const int row = threadIdx.x / kTile, column = threadIdx.x % kTile;
  for (int64_t block = blockIdx.x; block < num_blocks; block += gridDim.x) {
    const int64_t left = block % tiles_x * kTile, top = block / tiles_x % tiles_y * kTile;
    const int64_t channel = block / (tiles_x * tiles_y) % groups * kTileChannels;
    const int64_t image = block / (tiles_x * tiles_y * groups);
    const int num_channels = static_cast<int>(min(static_cast<int64_t>(kTileChannels), g.channels - channel));
    T sums[kTileChannels] = {};
    for (int64_t box = 0; box < num_boxes; ++box) {
      // The same for all threads of the block, so that all of them reach the barriers.
      const T* corners = boxes + 5 * box;
      bool valid = corners[0] >= static_cast<T>(image) && corners[0] < static_cast<T>(image + 1);
      for (int i = 1; i < 5; ++i) {
        valid = valid && isfinite(corners[i]);
      }
      if (!valid) {
        continue;
      }
      const RoiAxis<T> rows = box_rows(corners, g), columns = box_columns(corners, g);
      if (!touches(rows, g.bins_y, top) || !touches(columns, g.bins_x, left)) {
        continue;
      }
      __syncthreads();
      for (int64_t bin = threadIdx.x; bin < g.bins_y + g.bins_x; bin += kThreads) {
        if (bin < g.bins_y) {
          tile_weights(rows, bin, g.height, top, row_weights + bin * kTile);
        } else {
          tile_weights(columns, bin - g.bins_y, g.width, left, row_weights + bin * kTile);
        }
      }
      __syncthreads();
      for (int64_t y = 0; y < g.bins_y; ++y) {
        const T row_weight = row_weights[y * kTile + row];
        for (int64_t x = 0; x < g.bins_x && row_weight != T(0); ++x) {
          const T weight = row_weight * column_weights[x * kTile + column];
          if (weight != T(0)) {
            const scalar_t* from =
                grad + box * pooled.image + channel * pooled.channel + y * pooled.row + x * pooled.column;
            for (int c = 0; c < kTileChannels; ++c) {
              sums[c] += c < num_channels ? weight * static_cast<T>(from[c * pooled.channel]) : T(0);
            }
          }
        }
      }
    }
    if (top + row < g.height && left + column < g.width) {
      T* cell = grad_input + image * strides.image + channel * strides.channel + (top + row) * strides.row +
          (left + column) * strides.column;
      for (int c = 0; c < num_channels; ++c) {
        cell[c * strides.channel] = sums[c];
      }
    }
    __syncthreads();
  }
}

Strides strides_of(const Tensor& map) {
  return {map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

// Returns whether 32 bits can count `total` pooled values and the distance between any two cells of a plane.
bool fits_32_bits(int64_t total, const Geometry& g, const Strides& strides) {
  const int64_t limit = int64_t{1} << 31;
  return total < limit && g.height * strides.row + g.width * strides.column < limit;
}

template <typename scalar_t>
void launch_forward(const Tensor& input, const Tensor& boxes, const Geometry& g, Tensor& output) {
  using T = compute_t<scalar_t>;
  const int64_t total = output.numel();
  const Strides strides = strides_of(input);
  const auto kernel = fits_32_bits(total, g, strides) ? forward_kernel<scalar_t, T, uint32_t>
                                                      : forward_kernel<scalar_t, T, uint64_t>;
  kernel<<<num_blocks(total), kThreads, 0, current_stream(input)>>>(
      total, input.const_data_ptr<scalar_t>(), strides, boxes.const_data_ptr<T>(), g,
      is_channels_last(output), output.mutable_data_ptr<scalar_t>());
  check_launch("roi_align: forward_kernel");
}

template <typename scalar_t>
void launch_backward(const Tensor& grad, const Tensor& boxes, const Geometry& g, Tensor& sums) {
  using T = compute_t<scalar_t>;
  const int64_t total = grad.numel();
  const Strides strides = strides_of(sums);
  const auto kernel = fits_32_bits(total, g, strides) ? backward_kernel<scalar_t, T, uint32_t>
                                                      : backward_kernel<scalar_t, T, uint64_t>;
  kernel<<<num_blocks(total), kThreads, 0, current_stream(grad)>>>(
      total, grad.const_data_ptr<scalar_t>(), strides, boxes.const_data_ptr<T>(), g, is_channels_last(grad),
      sums.mutable_data_ptr<T>());
  check_launch("roi_align: backward_kernel");
}

template <typename scalar_t>
void launch_collect(const Tensor& grad, const Tensor& boxes, const Geometry& g, Tensor& sums) {
  using T = compute_t<scalar_t>;
  const int64_t shared_bytes = (g.bins_y + g.bins_x) * kTile * static_cast<int64_t>(sizeof(T));
  DETLIB_CHECK(
      shared_bytes <= 48 * 1024, "pooled_height + pooled_width must be at most ", 48 * 1024 / (kTile * sizeof(T)),
      " in deterministic mode, got ", g.bins_y + g.bins_x);
  const int64_t tiles = ((g.width + kTile - 1) / kTile) * ((g.height + kTile - 1) / kTile);
  const int64_t blocks = g.images * ((g.channels + kTileChannels - 1) / kTileChannels) * tiles;
  const auto grid = static_cast<unsigned int>(std::min<int64_t>(blocks, 1 << 30));
  collect_kernel<scalar_t, T><<<grid, kThreads, shared_bytes, current_stream(grad)>>>(
      blocks, grad.const_data_ptr<scalar_t>(), strides_of(grad), boxes.const_data_ptr<T>(), boxes.size(0), g,
      strides_of(sums), sums.mutable_data_ptr<T>());
  check_launch("roi_align: collect_kernel");
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
  Tensor output = new_map(
      input, {boxes.size(0), g.channels, pooled_height, pooled_width}, input.scalar_type(), is_channels_last(input));
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
    int64_t batch_size, int64_t channels, int64_t height, int64_t width, int64_t sampling_ratio, bool aligned,
    bool deterministic) {
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
  const bool channels_last = is_channels_last(grad);
  Tensor sums = new_map(grad, {batch_size, channels, height, width}, compute_type(type), channels_last);
  if (grad.numel() == 0 || sums.numel() == 0) {
    return as_type(torch::stable::zero_(sums), type);
  }
  const Tensor corners = as_contiguous(boxes, compute_type(type));
  const Tensor gradient = channels_last ? grad : as_contiguous(grad, type);
  if (!deterministic) {
    torch::stable::zero_(sums);
  }
  dispatch_floating(type, "grad", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    if (deterministic) {
      launch_collect<scalar_t>(gradient, corners, g, sums);
    } else {
      launch_backward<scalar_t>(gradient, corners, g, sums);
    }
  });
  return as_type(sums, type);
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CUDA, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&roi_align_backward));
}

}  // namespace
}  // namespace detlib
