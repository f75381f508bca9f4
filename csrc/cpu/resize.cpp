// Resizing of 8-bit images on the CPU, bit-exact with Pillow.
//
// The filter is separable, and widened by the scale when it shrinks the image. Weights have 22 fractional bits. An
// image is filtered along x, rounded to bytes, and then filtered along y, or in the reverse order. Along x, 32 rows are
// transposed to columns of 32 bytes, so that one weight applies to a vector of pixels; along y, the pixels of a row are
// the vector. The result is planar, as models need it, for planar and interleaved input.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/stable.h"
#include "resize_weigh.h"

namespace detlib {
namespace {

// Number of columns that are filtered along x before they are transposed back: they stay in the L1 cache.
constexpr int64_t kColumnBlock = 64;

// Values of PIL.Image.Resampling.
enum FilterKind : int64_t { kBilinear = 2, kBicubic = 3 };

double triangle(double x) {
  x = std::abs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

// Keys' cubic convolution with a = -1/2.
double cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) {
    return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  }
  return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

// For each pixel of the result along one axis: the first source pixel, the number of source pixels, and their weights.
struct Filter {
  std::vector<int64_t> first, count;
  std::vector<int32_t> weights;
  std::vector<TapPair> pairs;
  int64_t stride = 0;

  Filter(int64_t source, int64_t target, int64_t kind) : first(target), count(target) {
    const double scale = static_cast<double>(source) / target, widening = std::max(scale, 1.0);
    const double reach = (kind == kBilinear ? 1.0 : 2.0) * widening, narrowing = 1.0 / widening;
    stride = static_cast<int64_t>(std::ceil(reach)) * 2 + 2;  // even, with a 0 after the last tap
    weights.resize(target * stride);
    pairs.resize(target * stride / 2);
    std::vector<double> values(stride);
    for (int64_t i = 0; i < target; ++i) {
      const double center = (i + 0.5) * scale;
      const int64_t begin = std::max<int64_t>(static_cast<int64_t>(center - reach + 0.5), 0);
      const int64_t end = std::min<int64_t>(static_cast<int64_t>(center + reach + 0.5), source);
      double sum = 0.0;
      for (int64_t k = begin; k < end; ++k) {
        const double x = (k - center + 0.5) * narrowing;
        sum += values[k - begin] = kind == kBilinear ? triangle(x) : cubic(x);
      }
      int32_t* row = weights.data() + i * stride;
      for (int64_t k = 0; k < end - begin; ++k) {
        const double value = (sum != 0.0 ? values[k] / sum : values[k]) * (1 << kDigits);
        row[k] = static_cast<int32_t>(value < 0.0 ? value - 0.5 : value + 0.5);
      }
      first[i] = begin;
      count[i] = end - begin;
      while (count[i] > 1 && row[count[i] - 1] == 0) {
        --count[i];
      }
      for (int64_t k = 0; k < stride; k += 2) {
        pairs[(i * stride + k) / 2] = make_pair(row[k], row[k + 1]);
      }
    }
  }

  int64_t size() const {
    return static_cast<int64_t>(first.size());
  }

  Taps taps_of(int64_t index) const {
    return {weights.data() + index * stride, pairs.data() + index * stride / 2, count[index]};
  }
};

#define DETLIB_WITHOUT_FMA
#define DETLIB_KERNELS "resize_kernels.inc"
#include "each_instruction_set.inc"

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t UnalignedBytes __attribute__((vector_size(16), aligned(1), may_alias));

// Transposes 16 x 16 bytes: four times, rows i and i + 8 are interleaved.
void transpose_16(Bytes (&rows)[16]) {
  for (int round = 0; round < 4; ++round) {
    Bytes next[16];
    for (int i = 0; i < 8; ++i) {
      const Bytes a = rows[i], b = rows[i + 8];
      next[2 * i] =
          __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] =
          __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::copy(next, next + 16, rows);
  }
}

// Transposes sixteen rows of `length` bytes to `length` columns, kBlock apart. Past `count`, the last row is repeated.
void rows_to_columns(const uint8_t* source, int64_t row_step, int64_t count, int64_t length, uint8_t* columns) {
  Bytes block[16];
  for (int64_t x = 0; x < length; x += 16) {
    const int64_t width = std::min<int64_t>(length - x, 16);
    for (int64_t r = 0; r < 16; ++r) {
      const uint8_t* row = source + std::min(r, count - 1) * row_step + x;
      if (width == 16) {
        block[r] = *reinterpret_cast<const UnalignedBytes*>(row);
      } else {
        std::copy(row, row + width, reinterpret_cast<uint8_t*>(&block[r]));
      }
    }
    transpose_16(block);
    for (int64_t i = 0; i < width; ++i) {
      *reinterpret_cast<UnalignedBytes*>(columns + (x + i) * kBlock) = block[i];
    }
  }
}

// Transposes `length` columns back to the first `count` of sixteen rows.
void columns_to_rows(const uint8_t* columns, int64_t row_step, int64_t count, int64_t length, uint8_t* target) {
  Bytes block[16];
  for (int64_t x = 0; x < length; x += 16) {
    const int64_t width = std::min<int64_t>(length - x, 16);
    for (int64_t i = 0; i < width; ++i) {
      block[i] = *reinterpret_cast<const UnalignedBytes*>(columns + (x + i) * kBlock);
    }
    transpose_16(block);
    for (int64_t r = 0; r < count; ++r) {
      uint8_t* row = target + r * row_step + x;
      if (width == 16) {
        *reinterpret_cast<UnalignedBytes*>(row) = block[r];
      } else {
        std::copy_n(reinterpret_cast<const uint8_t*>(&block[r]), width, row);
      }
    }
  }
}

// An image in memory: `groups` planes of rows with `channels` interleaved channels.
struct Source {
  const uint8_t* data;
  int64_t groups, channels, height, width, row_step;
};

// Filters along x; writes planes (groups * channels, height, filter.size()) to `target`.
void resize_rows(const Source& source, const Filter& filter, uint8_t* target) {
  const auto filter_columns = DETLIB_FASTEST(filter_columns);
  const int64_t blocks = (source.height + kBlock - 1) / kBlock, length = source.width * source.channels;
  const int64_t plane = source.height * filter.size();
  torch::stable::parallel_for(0, source.groups * blocks, 2, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> columns(length * kBlock), filtered(source.channels * kColumnBlock * kBlock);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / blocks, y = i % blocks * kBlock, count = std::min(kBlock, source.height - y);
      const uint8_t* rows = source.data + (group * source.height + y) * source.row_step;
      for (int64_t r = 0; r < count; r += 16) {
        rows_to_columns(rows + r * source.row_step, source.row_step, count - r, length, columns.data() + r);
      }
      for (int64_t x = 0; x < filter.size(); x += kColumnBlock) {
        const int64_t width = std::min(kColumnBlock, filter.size() - x);
        filter_columns(filter, columns.data(), source.channels, x, x + width, filtered.data());
        for (int64_t c = 0; c < source.channels; ++c) {
          const uint8_t* from = filtered.data() + c * width * kBlock;
          uint8_t* to = target + (group * source.channels + c) * plane + y * filter.size() + x;
          for (int64_t r = 0; r < count; r += 16) {
            const int64_t number = std::min<int64_t>(count - r, 16);
            columns_to_rows(from + r, filter.size(), number, width, to + r * filter.size());
          }
        }
      }
    }
  });
}

// Filters along y: planes (planes, height, width) to (planes, filter.size(), width).
void resize_columns(
    const uint8_t* source, int64_t planes, int64_t height, int64_t width, const Filter& filter, uint8_t* target) {
  const auto filter_row = DETLIB_FASTEST(filter_row);
  const int64_t rows = filter.size();
  torch::stable::parallel_for(0, planes * rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = i % rows;
      const uint8_t* from = source + (i / rows * height + filter.first[y]) * width;
      filter_row(from, width, filter.taps_of(y), target + i * width);
    }
  });
}

Tensor resize_image(const Tensor& image, int64_t height, int64_t width, int64_t filter, bool vertical_first) {
  DETLIB_CHECK(image.dim() == 3 && image.scalar_type() == ScalarType::Byte, "image must be uint8 of shape (H, W, C)");
  DETLIB_CHECK(
      height > 0 && width > 0 && image.numel() > 0, "the size of the image, height and width must be positive");
  DETLIB_CHECK(filter == kBilinear || filter == kBicubic, "filter must be 2 (bilinear) or 3 (bicubic)");
  const int64_t rows = image.size(0), columns = image.size(1), channels = image.size(2);
  // Planes must be contiguous; interleaved pixels may be in rows that are parts of longer ones.
  const bool planes = channels > 1 && image.stride(1) == 1 && image.stride(0) == columns &&
      image.stride(2) == rows * columns;
  const bool pixels = image.stride(2) == 1 && image.stride(1) == channels &&
      (!vertical_first || image.stride(0) == columns * channels);
  const Tensor input = planes || pixels ? image : torch::stable::contiguous(image);
  Source source{
      input.const_data_ptr<uint8_t>(), planes ? channels : 1, planes ? 1 : channels, rows, columns, input.stride(0)};
  const Tensor output = torch::stable::new_empty(image, {channels, height, width}, ScalarType::Byte);
  const Filter along_x(columns, width, filter), along_y(rows, height, filter);
  if (height == rows) {
    resize_rows(source, along_x, output.mutable_data_ptr<uint8_t>());
    return output;
  }
  const int64_t middle_rows = vertical_first ? height : rows, middle_columns = vertical_first ? columns : width;
  const Tensor middle = torch::stable::new_empty(image, {channels, middle_rows, middle_columns}, ScalarType::Byte);
  if (vertical_first) {
    resize_columns(
        source.data, source.groups, rows, columns * source.channels, along_y, middle.mutable_data_ptr<uint8_t>());
    source.data = middle.const_data_ptr<uint8_t>();
    source.height = height;
    source.row_step = columns * source.channels;
    resize_rows(source, along_x, output.mutable_data_ptr<uint8_t>());
  } else {
    resize_rows(source, along_x, middle.mutable_data_ptr<uint8_t>());
    resize_columns(
        middle.const_data_ptr<uint8_t>(), channels, rows, width, along_y, output.mutable_data_ptr<uint8_t>());
  }
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CPU, m) {
  m.impl("resize_image", TORCH_BOX(&resize_image));
}

}  // namespace
}  // namespace detlib
