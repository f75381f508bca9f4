// RoIAlign on the CPU for feature maps in channels-last layout (N, H, W, C in memory), forward and backward.
//
// Channels are the lanes, so every step is a weighted sum of vectors. Reading the feature map dominates the cost, so
// both passes work on a few of its rows at a time, which stay in the cache, and on a block of channels:
//   forward   the rows of bins of all boxes, sorted by the first map row that they read,
//   backward  a band of map rows, to which each box in turn adds its gradient. A band belongs to one thread, and boxes
//             are added in order, so the sums are the same on every run and for any number of threads.
#include <limits>
#include <vector>

#include "../vector.h"
#include "align.h"

namespace detlib {
namespace {

constexpr int64_t kBlockBytes = 1024;    // size of a task's channels at one cell
constexpr int64_t kBandBytes = 3 << 18;  // size of a task's map rows in the backward pass

// The channels of a task, and the strides of the feature map's cells and rows, in values.
struct ChannelsLast {
  int64_t channels, cell_stride, row_stride;
};

template <typename T>
struct RoiTaps {
  bool finite = true;
  Taps<T> y, x;
};

#define DETLIB_WITH_AVX512
#define DETLIB_KERNELS "roi_align/channels_last_kernels.inc"
#include "../each_instruction_set.inc"

template <typename T, typename Make>
PreparedBoxes<RoiTaps<T>> prepare_taps(const Tensor& boxes, const RoiAlignShape& shape, const Make& make) {
  return prepare_boxes<RoiTaps<T>, T>(boxes, shape, [&] {
    std::vector<T> dense(std::max(shape.height, shape.width), T(0));
    return [&shape, &make, dense, y = std::vector<AxisWeight<T>>(), x = std::vector<AxisWeight<T>>()](
               const T* box) mutable {
      RoiTaps<T> table;
      table.finite = box_weights(box, shape, dense, y, x);
      table.y = make(y, shape.bins_y);
      table.x = make(x, shape.bins_x);
      return table;
    };
  });
}

template <typename T>
int64_t block_channels() {
  return kBlockBytes / static_cast<int64_t>(sizeof(T));
}

struct BinRow {
  int64_t image, box, bin;
};

// Returns the rows of bins of all boxes, ordered by image and the first map row that they read.
template <typename T>
std::vector<BinRow> sorted_bin_rows(const PreparedBoxes<RoiTaps<T>>& prepared, const RoiAlignShape& shape) {
  std::vector<BinRow> sorted;
  std::vector<std::vector<BinRow>> of_row(shape.height);
  for (int64_t image = 0; image < shape.images; ++image) {
    for (const int64_t box : prepared.of_image[image]) {
      const Taps<T>& y = prepared.tables[box].y;
      for (int64_t bin = 0; bin < shape.bins_y; ++bin) {
        const int64_t row = y.begins[bin] < y.begins[bin + 1] ? y.taps[y.begins[bin]].source : 0;
        of_row[row].push_back({image, box, bin});
      }
    }
    for (auto& bin_rows : of_row) {
      sorted.insert(sorted.end(), bin_rows.begin(), bin_rows.end());
      bin_rows.clear();
    }
  }
  return sorted;
}

template <typename T>
void forward_impl(const Tensor& input, const Tensor& boxes, const RoiAlignShape& shape, Tensor& output) {
  const auto prepared = prepare_taps<T>(boxes, shape, taps_by_bin<T>);
  const auto bin_rows = sorted_bin_rows(prepared, shape);
  const T* maps = input.const_data_ptr<T>();
  T* pooled = output.mutable_data_ptr<T>();
  const int64_t row_stride = shape.width * shape.channels, bin_row_values = shape.bins_x * shape.channels;
  const int64_t blocks = (shape.channels + block_channels<T>() - 1) / block_channels<T>();
  const int64_t num_rows = static_cast<int64_t>(bin_rows.size());
  const int64_t parts = std::min(num_rows, 4 * static_cast<int64_t>(torch::stable::get_num_threads()));

  const auto run = use_avx512() ? &avx512::forward_row<T> : DETLIB_FASTEST(forward_row<T>);
  torch::stable::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task / parts * block_channels<T>(), part = task % parts;
      const ChannelsLast block{
          std::min(block_channels<T>(), shape.channels - channel), shape.channels, row_stride};
      for (int64_t i = num_rows * part / parts; i < num_rows * (part + 1) / parts; ++i) {
        const auto [image, box, bin] = bin_rows[i];
        const RoiTaps<T>& table = prepared.tables[box];
        T* bins = pooled + (box * shape.bins_y + bin) * bin_row_values + channel;
        if (table.finite && table.y.begins[bin] < table.y.begins[bin + 1]) {
          run(maps + image * shape.height * row_stride + channel, block, table, bin, bins);
          continue;
        }
        const T value = table.finite ? T(0) : std::numeric_limits<T>::quiet_NaN();
        for (int64_t x = 0; x < shape.bins_x; ++x) {
          std::fill_n(bins + x * shape.channels, block.channels, value);
        }
      }
    }
  });
}

template <typename T>
void backward_impl(const Tensor& grad, const Tensor& boxes, const RoiAlignShape& shape, Tensor& output) {
  const auto prepared =
      prepare_taps<T>(boxes, shape, [](auto& weights, int64_t) { return taps_by_cell<T>(weights); });
  const T* pooled = grad.const_data_ptr<T>();
  T* maps = output.mutable_data_ptr<T>();
  const int64_t row_stride = shape.width * shape.channels, box_values = shape.bins() * shape.channels;
  const int64_t blocks = (shape.channels + block_channels<T>() - 1) / block_channels<T>();
  const int64_t band = std::clamp<int64_t>(kBandBytes / (shape.width * kBlockBytes), 1, shape.height);
  const int64_t bands = (shape.height + band - 1) / band;

  const auto run = use_avx512() ? &avx512::backward_row<T> : DETLIB_FASTEST(backward_row<T>);
  torch::stable::parallel_for(0, shape.images * blocks * bands, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> bin_row(shape.bins_x * block_channels<T>());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / (blocks * bands), channel = task / bands % blocks * block_channels<T>();
      const int64_t top = task % bands * band, bottom = std::min(top + band, shape.height);
      const ChannelsLast block{
          std::min(block_channels<T>(), shape.channels - channel), shape.channels, row_stride};
      T* map = maps + image * shape.height * row_stride + channel;
      for (int64_t cell = top * shape.width; cell < bottom * shape.width; ++cell) {
        std::fill_n(map + cell * shape.channels, block.channels, T(0));
      }
      for (const int64_t box : prepared.of_image[image]) {
        const RoiTaps<T>& table = prepared.tables[box];
        const auto& rows = table.y.targets;
        const auto first = std::lower_bound(rows.begin(), rows.end(), top);
        for (int64_t row = first - rows.begin(); row < table.y.size() && rows[row] < bottom; ++row) {
          run(pooled + box * box_values + channel, block, table, row, shape.bins_x, bin_row.data(),
              map + rows[row] * row_stride);
        }
      }
    }
  });
}

}  // namespace

void roi_align_channels_last(const Tensor& input, const Tensor& boxes, const RoiAlignShape& shape, Tensor& output) {
  if (input.scalar_type() == ScalarType::Double) {
    forward_impl<double>(input, boxes, shape, output);
  } else {
    forward_impl<float>(input, boxes, shape, output);
  }
}

void roi_align_channels_last_backward(
    const Tensor& grad, const Tensor& boxes, const RoiAlignShape& shape, Tensor& output) {
  if (grad.scalar_type() == ScalarType::Double) {
    backward_impl<double>(grad, boxes, shape, output);
  } else {
    backward_impl<float>(grad, boxes, shape, output);
  }
}

}  // namespace detlib
