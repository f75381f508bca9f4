// RoIAlign on the CPU: checks and the choice of kernels. The result is channels-last if the input (backward: the
// gradient) is, else contiguous.
//
// The kernels receive non-empty tensors, boxes of any dtype and layout, and an uninitialized output.
#include "align.h"

namespace detlib {
namespace {

void check_boxes(const Tensor& boxes) {
  DETLIB_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, "boxes must have shape (K, 5)");
}

Tensor roi_align(
    const Tensor& input, const Tensor& boxes, double spatial_scale, int64_t pooled_height, int64_t pooled_width,
    int64_t sampling_ratio, bool aligned) {
  check_boxes(boxes);
  DETLIB_CHECK(input.dim() == 4, "input must have shape (N, C, H, W)");
  const RoiAlignShape shape{
      input.size(0), input.size(1),  input.size(2), input.size(3), pooled_height, pooled_width,
      spatial_scale, sampling_ratio, aligned};
  const ScalarType type = input.scalar_type();
  const bool channels_last = is_channels_last(input);
  Tensor output = new_map(
      input, {boxes.size(0), shape.channels, pooled_height, pooled_width}, channels_last ? compute_type(type) : type,
      channels_last);
  if (input.numel() == 0) {
    torch::stable::zero_(output);
  } else if (output.numel() > 0 && channels_last) {
    roi_align_channels_last(as_type(input, compute_type(type)), boxes, shape, output);
  } else if (output.numel() > 0) {
    roi_align_planes(as_contiguous(input, type), boxes, shape, output);
  }
  return as_type(output, type);
}

Tensor roi_align_backward(
    const Tensor& grad, const Tensor& boxes, double spatial_scale, int64_t pooled_height, int64_t pooled_width,
    int64_t batch_size, int64_t channels, int64_t height, int64_t width, int64_t sampling_ratio, bool aligned,
    bool /*deterministic: always*/) {
  check_boxes(boxes);
  DETLIB_CHECK(
      grad.dim() == 4 && grad.size(0) == boxes.size(0) && grad.size(1) == channels && grad.size(2) == pooled_height &&
          grad.size(3) == pooled_width,
      "grad must have shape (K, C, pooled_height, pooled_width)");
  const RoiAlignShape shape{
      batch_size, channels, height, width, pooled_height, pooled_width, spatial_scale, sampling_ratio, aligned};
  const ScalarType type = grad.scalar_type();
  const bool channels_last = is_channels_last(grad);
  Tensor output = new_map(
      grad, {batch_size, channels, height, width}, channels_last ? compute_type(type) : type, channels_last);
  if (grad.numel() == 0 || output.numel() == 0) {
    torch::stable::zero_(output);
  } else if (channels_last) {
    roi_align_channels_last_backward(as_type(grad, compute_type(type)), boxes, shape, output);
  } else {
    roi_align_planes_backward(as_contiguous(grad, type), boxes, shape, output);
  }
  return as_type(output, type);
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&roi_align_backward));
}

}  // namespace
}  // namespace detlib
