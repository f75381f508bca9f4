// Intersection over union and non-maximum suppression of rotated boxes on the CPU.
//
// Most pairs of boxes are far apart, and a test of the circles around them is enough. The others are computed one pair
// per lane of a vector. Both operators use double precision for any dtype of the boxes.
#include <algorithm>
#include <vector>

#include "nms.h"
#include "rotated.h"
#include "vector.h"

namespace detlib {
namespace {

// The IoU is compared with a threshold, so every x86 processor must round it the same.
#define DETLIB_WITHOUT_FMA
#define DETLIB_KERNELS "rotated_kernels.inc"
#include "each_instruction_set.inc"

void check_boxes(const Tensor& boxes, const char* name) {
  DETLIB_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, name, " must have shape (N, 5)");
}

template <typename T>
void fill_iou(const RotatedColumns& rows, const RotatedColumns& columns, T* output) {
  const auto run = DETLIB_FASTEST(iou_with_all<T>);
  const int64_t grain = std::max<int64_t>(1, 16384 / columns.count);
  torch::stable::parallel_for(0, rows.count, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> near(columns.count + 8);
    for (int64_t i = begin; i < end; ++i) {
      run(rows[i], columns, near.data(), output + i * columns.count);
    }
  });
}

Tensor box_iou_rotated(const Tensor& boxes1, const Tensor& boxes2) {
  check_boxes(boxes1, "boxes1");
  check_boxes(boxes2, "boxes2");
  const bool is_double = boxes1.scalar_type() == ScalarType::Double || boxes2.scalar_type() == ScalarType::Double;
  Tensor output = torch::stable::new_empty(
      boxes1, {boxes1.size(0), boxes2.size(0)}, is_double ? ScalarType::Double : ScalarType::Float);
  if (output.numel() == 0) {
    return output;
  }
  const RotatedColumns rows = rotated_columns(boxes1), columns = rotated_columns(boxes2);
  if (is_double) {
    fill_iou(rows, columns, output.mutable_data_ptr<double>());
  } else {
    fill_iou(rows, columns, output.mutable_data_ptr<float>());
  }
  return output;
}

// Keeps or drops the boxes of one category, given in descending score order.
void suppress_category(
    const RotatedColumns& boxes, const int64_t* begin, const int64_t* end, double threshold, uint8_t* keep) {
  const auto overlaps_kept = DETLIB_FASTEST(overlaps_kept);
  RotatedColumns kept;
  for (const int64_t* member = begin; member != end; ++member) {
    const RotatedBox<double> box = boxes[*member];
    if (!overlaps_kept(kept, box, threshold)) {
      kept.add(box);
      keep[*member] = 1;
    }
  }
}

Tensor nms_impl(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  check_boxes(boxes, "boxes");
  check_nms_arguments(boxes, scores, idxs);
  const RotatedColumns columns = rotated_columns(boxes);
  return suppress(scores, idxs, 16384, [&](const int64_t* begin, const int64_t* end, uint8_t* keep) {
    suppress_category(columns, begin, end, iou_threshold, keep);
  });
}

Tensor nms_rotated(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return nms_impl(boxes, scores, nullptr, iou_threshold);
}

Tensor batched_nms_rotated(
    const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold) {
  return nms_impl(boxes, scores, &idxs, iou_threshold);
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CPU, m) {
  m.impl("box_iou_rotated", TORCH_BOX(&box_iou_rotated));
  m.impl("nms_rotated", TORCH_BOX(&nms_rotated));
  m.impl("batched_nms_rotated", TORCH_BOX(&batched_nms_rotated));
}

}  // namespace
}  // namespace detlib
