// Intersection over union and non-maximum suppression of rotated boxes on CUDA, in double precision as on the CPU: most
// pairs of boxes are far apart and never reach it.
#include "../common/cuda.cuh"
#include "../common/nms_tiles.cuh"
#include "../common/rotated_box.h"

namespace detlib {
namespace {

#define DETLIB_TARGET
#include "../common/rotated_iou.h"
#undef DETLIB_TARGET

using Box = RotatedBox<double>;
constexpr int64_t kBoxNumbers = sizeof(Box) / sizeof(double);

__device__ __forceinline__ bool may_overlap(const Box& a, const Box& b) {
  return circles_meet(a.x, a.y, a.radius, b.x, b.y, b.radius);
}

__global__ void __launch_bounds__(kThreads) prepare_kernel(int64_t count, const double* numbers, Box* boxes) {
  for (int64_t i = thread_index(); i < count; i += grid_size()) {
    boxes[i] = rotated_box(numbers + 5 * i);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) iou_kernel(
    int64_t total, int64_t num_columns, const Box* rows, const Box* columns, T* output) {
  for (int64_t i = thread_index(); i < total; i += grid_size()) {
    const Box& a = rows[i / num_columns];
    const Box& b = columns[i % num_columns];
    output[i] = may_overlap(a, b) ? static_cast<T>(rotated_iou<double>(a, b)) : T(0);
  }
}

// Bit j of mask[i, w] tells that box i of the order would suppress box 64 w + j; words before the diagonal are not
// written.
__global__ void __launch_bounds__(kTile) suppression_kernel(
    const Box* boxes, const int64_t* order, const int64_t* categories, int64_t num_boxes, double threshold,
    int64_t words, unsigned long long* mask) {
  const int64_t row_tile = blockIdx.y, column_tile = blockIdx.x;
  if (row_tile > column_tile) {
    return;
  }
  const int64_t row = row_tile * kTile + threadIdx.x, column_begin = column_tile * kTile;
  const int num_columns = static_cast<int>(min(static_cast<int64_t>(kTile), num_boxes - column_begin));
  __shared__ Box tile[kTile];
  __shared__ int64_t tile_categories[kTile];
  if (threadIdx.x < num_columns) {
    const int64_t box = order[column_begin + threadIdx.x];
    tile[threadIdx.x] = boxes[box];
    tile_categories[threadIdx.x] = categories == nullptr ? 0 : categories[box];
  }
  __syncthreads();
  if (row >= num_boxes) {
    return;
  }
  const Box box = boxes[order[row]];
  const int64_t category = categories == nullptr ? 0 : categories[order[row]];
  unsigned long long bits = 0;
  for (int j = row_tile == column_tile ? threadIdx.x + 1 : 0; j < num_columns; ++j) {
    if (category == tile_categories[j] && may_overlap(tile[j], box) &&
        rotated_iou<double>(tile[j], box) > threshold) {
      bits |= 1ULL << j;
    }
  }
  mask[row * words + column_tile] = bits;
}

// One block goes through the tiles in order: which boxes of a tile stay, and what they remove from later tiles.
// `removed` holds `words` words of zeros.
__global__ void keep_kernel(
    const unsigned long long* mask, int64_t num_boxes, int64_t words, unsigned long long* removed, bool* keep) {
  settle_tiles(mask, num_boxes, words, removed, keep);
}

void check_boxes(const Tensor& boxes, const char* name) {
  DETLIB_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, name, " must have shape (N, 5)");
}

void check_device(const Tensor& tensor, const char* name, const Tensor& boxes) {
  DETLIB_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == boxes.get_device_index(), name, " must be on the boxes' device");
}

// The boxes as an (N, kBoxNumbers) tensor that holds one Box a row; N > 0.
Tensor prepare(const Tensor& boxes) {
  const Tensor numbers = as_contiguous(boxes, ScalarType::Double);
  const int64_t count = boxes.size(0);
  Tensor prepared = torch::stable::new_empty(numbers, {count, kBoxNumbers});
  prepare_kernel<<<num_blocks(count), kThreads, 0, current_stream(boxes)>>>(
      count, numbers.const_data_ptr<double>(), reinterpret_cast<Box*>(prepared.mutable_data_ptr<double>()));
  check_launch("rotated: prepare_kernel");
  return prepared;
}

const Box* box_data(const Tensor& prepared) {
  return reinterpret_cast<const Box*>(prepared.const_data_ptr<double>());
}

template <typename T>
void launch_iou(const Tensor& rows, const Tensor& columns, Tensor& output) {
  const int64_t total = output.numel();
  iou_kernel<T><<<num_blocks(total), kThreads, 0, current_stream(output)>>>(
      total, columns.size(0), box_data(rows), box_data(columns), output.mutable_data_ptr<T>());
  check_launch("box_iou_rotated: iou_kernel");
}

Tensor box_iou_rotated(const Tensor& boxes1, const Tensor& boxes2) {
  check_boxes(boxes1, "boxes1");
  check_boxes(boxes2, "boxes2");
  check_device(boxes2, "boxes2", boxes1);
  const DeviceGuard guard(boxes1.get_device_index());
  const bool is_double = boxes1.scalar_type() == ScalarType::Double || boxes2.scalar_type() == ScalarType::Double;
  Tensor output = torch::stable::new_empty(
      boxes1, {boxes1.size(0), boxes2.size(0)}, is_double ? ScalarType::Double : ScalarType::Float);
  if (output.numel() == 0) {
    return output;
  }
  const Tensor rows = prepare(boxes1), columns = prepare(boxes2);
  if (is_double) {
    launch_iou<double>(rows, columns, output);
  } else {
    launch_iou<float>(rows, columns, output);
  }
  return output;
}

void launch_nms(
    const Tensor& boxes, const Tensor& order, const int64_t* categories, double threshold, Tensor& mask,
    Tensor& removed, Tensor& keep) {
  const int64_t num_boxes = boxes.size(0), words = mask.size(1);
  auto* mask_data = reinterpret_cast<unsigned long long*>(mask.mutable_data_ptr<int64_t>());
  const cudaStream_t stream = current_stream(boxes);
  const dim3 tiles(static_cast<unsigned int>(words), static_cast<unsigned int>(words));
  suppression_kernel<<<tiles, kTile, 0, stream>>>(
      box_data(boxes), order.const_data_ptr<int64_t>(), categories, num_boxes, threshold, words, mask_data);
  check_launch("nms_rotated: suppression_kernel");
  keep_kernel<<<1, 1024, 0, stream>>>(
      mask_data, num_boxes, words, reinterpret_cast<unsigned long long*>(removed.mutable_data_ptr<int64_t>()),
      keep.mutable_data_ptr<bool>());
  check_launch("nms_rotated: keep_kernel");
}

Tensor nms_impl(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  check_boxes(boxes, "boxes");
  const int64_t num_boxes = boxes.size(0), words = (num_boxes + kTile - 1) / kTile;
  DETLIB_CHECK(scores.dim() == 1 && scores.size(0) == num_boxes, "scores must have shape (N,)");
  check_device(scores, "scores", boxes);
  const DeviceGuard guard(boxes.get_device_index());
  if (num_boxes == 0) {
    return torch::stable::new_empty(boxes, {0}, ScalarType::Long);
  }
  DETLIB_CHECK(words <= 65535, "boxes must be at most ", 65535 * kTile, ", got ", num_boxes);
  const Tensor order = as_contiguous(argsort_descending(scores), ScalarType::Long);
  std::optional<Tensor> categories;
  if (idxs != nullptr) {
    DETLIB_CHECK(idxs->dim() == 1 && idxs->size(0) == num_boxes, "idxs must have shape (N,)");
    check_device(*idxs, "idxs", boxes);
    categories = as_contiguous(*idxs, ScalarType::Long);
  }
  const Tensor prepared = prepare(boxes);
  Tensor mask = torch::stable::new_empty(boxes, {num_boxes, words}, ScalarType::Long);
  Tensor removed = torch::stable::new_empty(boxes, {words}, ScalarType::Long);
  torch::stable::zero_(removed);
  Tensor keep = torch::stable::new_empty(boxes, {num_boxes}, ScalarType::Bool);
  launch_nms(
      prepared, order, categories ? categories->const_data_ptr<int64_t>() : nullptr, iou_threshold, mask, removed,
      keep);
  return masked_select(order, keep);
}

Tensor nms_rotated(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return nms_impl(boxes, scores, nullptr, iou_threshold);
}

Tensor batched_nms_rotated(
    const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold) {
  return nms_impl(boxes, scores, &idxs, iou_threshold);
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CUDA, m) {
  m.impl("box_iou_rotated", TORCH_BOX(&box_iou_rotated));
  m.impl("nms_rotated", TORCH_BOX(&nms_rotated));
  m.impl("batched_nms_rotated", TORCH_BOX(&batched_nms_rotated));
}

}  // namespace
}  // namespace detlib
