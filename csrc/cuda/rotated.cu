// Intersection over union and non-maximum suppression of rotated boxes on CUDA. Double precision, as on the CPU, costs
// little: most pairs of boxes are far apart, and their intersection is not computed.
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

struct Overlaps {
  double threshold;

  __device__ __forceinline__ bool operator()(const Box& a, const Box& b) const {
    return may_overlap(b, a) && rotated_iou<double>(b, a) > threshold;
  }
};

void check_boxes(const Tensor& boxes, const char* name) {
  DETLIB_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, name, " must have shape (N, 5)");
}

void check_device(const Tensor& tensor, const char* name, const Tensor& boxes) {
  DETLIB_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == boxes.get_device_index(), name,
      " must be on the device of boxes");
}

// Returns the boxes as a tensor (N, kBoxNumbers) with one Box per row; N > 0.
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

Tensor nms_impl(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  check_boxes(boxes, "boxes");
  DETLIB_CHECK(scores.dim() == 1 && scores.size(0) == boxes.size(0), "scores must have shape (N,)");
  check_device(scores, "scores", boxes);
  const DeviceGuard guard(boxes.get_device_index());
  if (boxes.size(0) == 0) {
    return torch::stable::new_empty(boxes, {0}, ScalarType::Long);
  }
  const Tensor prepared = prepare(boxes);
  return suppress(scores, idxs, box_data(prepared), Overlaps{iou_threshold});
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
