// Non-maximum suppression of boxes on CUDA.
#include "../common/nms_tiles.cuh"

namespace detlib {
namespace {

template <typename T>
struct Corners {
  T x1, y1, x2, y2;
};

template <typename T>
struct Overlaps {
  double threshold;

  __device__ __forceinline__ bool operator()(const Corners<T>& a, const Corners<T>& b) const {
    const T width = min(a.x2, b.x2) - max(a.x1, b.x1);
    const T height = min(a.y2, b.y2) - max(a.y1, b.y1);
    const T intersection = max(width, T(0)) * max(height, T(0));
    const T area_a = (a.x2 - a.x1) * (a.y2 - a.y1), area_b = (b.x2 - b.x1) * (b.y2 - b.y1);
    return static_cast<double>(intersection / (area_a + area_b - intersection)) > threshold;
  }
};

template <typename T>
Tensor suppress_corners(const Tensor& corners, const Tensor& scores, const Tensor* idxs, double threshold) {
  const auto* boxes = reinterpret_cast<const Corners<T>*>(corners.const_data_ptr<T>());
  return suppress(scores, idxs, boxes, Overlaps<T>{threshold});
}

Tensor nms_impl(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  DETLIB_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "boxes must have shape (N, 4)");
  DETLIB_CHECK(scores.dim() == 1 && scores.size(0) == boxes.size(0), "scores must have shape (N,)");
  DETLIB_CHECK(
      scores.is_cuda() && scores.get_device_index() == boxes.get_device_index(),
      "scores must be on the device of boxes");
  const DeviceGuard guard(boxes.get_device_index());
  if (boxes.size(0) == 0) {
    return torch::stable::new_empty(boxes, {0}, ScalarType::Long);
  }
  const Tensor corners = as_contiguous(boxes, compute_type(boxes.scalar_type()));
  return corners.scalar_type() == ScalarType::Double ? suppress_corners<double>(corners, scores, idxs, iou_threshold)
                                                     : suppress_corners<float>(corners, scores, idxs, iou_threshold);
}

Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return nms_impl(boxes, scores, nullptr, iou_threshold);
}

Tensor batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold) {
  return nms_impl(boxes, scores, &idxs, iou_threshold);
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CUDA, m) {
  m.impl("nms", TORCH_BOX(&nms));
  m.impl("batched_nms", TORCH_BOX(&batched_nms));
}

}  // namespace
}  // namespace detlib
