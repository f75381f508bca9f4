// Pasting of masks into images on CUDA, with one block per row of pixels.
#include "../common/cuda.cuh"
#include "../common/paste_masks.h"

namespace detlib {
namespace {

template <typename T>
struct Job {
  const T *masks, *boxes;
  int64_t count, mask_height, mask_width, height, width;
};

// The cell at or before a position, and the distance of the position from it.
template <typename T>
struct Position {
  int64_t cell;
  T fraction;

  __device__ __forceinline__ explicit Position(T position)
      : cell(static_cast<int64_t>(floor(position))), fraction(position - floor(position)) {}
};

// Returns cell (y, x) of a mask, or 0 outside the mask.
template <typename T>
__device__ __forceinline__ T cell_at(const T* mask, const Job<T>& job, int64_t y, int64_t x) {
  return y >= 0 && y < job.mask_height && x >= 0 && x < job.mask_width ? mask[y * job.mask_width + x] : T(0);
}

template <typename T>
__device__ __forceinline__ uint8_t paste_pixel(
    const T* mask, const Job<T>& job, const Position<T>& y, const Position<T>& x, T threshold) {
  const T above = blend(cell_at(mask, job, y.cell, x.cell), cell_at(mask, job, y.cell, x.cell + 1), x.fraction);
  const T below =
      blend(cell_at(mask, job, y.cell + 1, x.cell), cell_at(mask, job, y.cell + 1, x.cell + 1), x.fraction);
  const T value = blend(above, below, y.fraction);
  return threshold >= T(0) ? static_cast<uint8_t>(value >= threshold) : to_byte(value);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) paste_rows(Job<T> job, T threshold, uint8_t* images) {
  for (int64_t row = blockIdx.x; row < job.count * job.height; row += gridDim.x) {
    const int64_t index = row / job.height;
    const T* box = job.boxes + 4 * index;
    const PasteSide<T> rows(box[1], box[3], job.mask_height), columns(box[0], box[2], job.mask_width);
    const T y = rows.position(row % job.height);
    const bool reached = rows.valid && columns.valid && rows.after_start(y) && rows.before_end(y);
    const Position<T> row_position(reached ? y : T(0));
    for (int64_t pixel = threadIdx.x; pixel < job.width; pixel += blockDim.x) {
      uint8_t value = 0;
      if (reached) {
        const T x = columns.position(pixel);
        if (columns.after_start(x) && columns.before_end(x)) {
          const T* mask = job.masks + index * job.mask_height * job.mask_width;
          value = paste_pixel(mask, job, row_position, Position<T>(x), threshold);
        }
      }
      images[row * job.width + pixel] = value;
    }
  }
}

template <typename T>
void launch(const Tensor& masks, const Tensor& boxes, double threshold, Tensor& output) {
  const Job<T> job{masks.const_data_ptr<T>(), boxes.const_data_ptr<T>(), masks.size(0), masks.size(1),
                   masks.size(2),             output.size(1),            output.size(2)};
  auto* images = threshold >= 0 ? reinterpret_cast<uint8_t*>(output.mutable_data_ptr<bool>())
                                : output.mutable_data_ptr<uint8_t>();
  const auto blocks = static_cast<unsigned int>(std::min<int64_t>(job.count * job.height, 1 << 20));
  paste_rows<T><<<blocks, kThreads, 0, current_stream(masks)>>>(job, static_cast<T>(threshold), images);
  check_launch("paste_masks: paste_rows");
}

Tensor paste_masks(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, double threshold) {
  DETLIB_CHECK(masks.dim() == 3, "masks must have shape (R, Hm, Wm)");
  DETLIB_CHECK(
      boxes.dim() == 2 && boxes.size(0) == masks.size(0) && boxes.size(1) == 4,
      "boxes must have shape (R, 4) with one box for each mask");
  DETLIB_CHECK(
      boxes.is_cuda() && boxes.get_device_index() == masks.get_device_index(), "boxes must be on the device of masks");
  DETLIB_CHECK(height >= 0 && width >= 0, "height and width must not be negative");
  const DeviceGuard guard(masks.get_device_index());
  Tensor output = torch::stable::new_empty(
      masks, {masks.size(0), height, width}, threshold >= 0 ? ScalarType::Bool : ScalarType::Byte);
  if (output.numel() > 0) {
    const bool is_double = masks.scalar_type() == ScalarType::Double || boxes.scalar_type() == ScalarType::Double;
    const ScalarType type = is_double ? ScalarType::Double : ScalarType::Float;
    const Tensor values = as_contiguous(masks, type), corners = as_contiguous(boxes, type);
    if (is_double) {
      launch<double>(values, corners, threshold, output);
    } else {
      launch<float>(values, corners, threshold, output);
    }
  }
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CUDA, m) {
  m.impl("paste_masks", TORCH_BOX(&paste_masks));
}

}  // namespace
}  // namespace detlib
