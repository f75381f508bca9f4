// Non-maximum suppression on the CPU.
//
// Boxes of one category are visited in descending score order. Each is compared with the boxes kept so far, a few
// vectors at a time, until one overlaps it. Categories are independent and run in parallel.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "nms.h"
#include "vector.h"

namespace detlib {
namespace {

// Corners and areas of the kept boxes, padded with boxes at the origin that overlap nothing.
template <typename T>
struct KeptBoxes {
  std::vector<T> x1, y1, x2, y2, area;
  int64_t count = 0;

  void add(const T* box, T box_area) {
    if (count == static_cast<int64_t>(x1.size())) {
      const size_t size = std::max<size_t>(64, 2 * x1.size());
      for (auto* column : {&x1, &y1, &x2, &y2, &area}) {
        column->resize(size, T(0));
      }
    }
    x1[count] = box[0];
    y1[count] = box[1];
    x2[count] = box[2];
    y2[count] = box[3];
    area[count] = box_area;
    ++count;
  }
};

// The IoU is compared with a threshold, so every x86 processor must round it the same.
#define DETLIB_WITHOUT_FMA
#define DETLIB_KERNELS "nms_kernels.inc"
#include "each_instruction_set.inc"

// Returns the largest T that is at most `threshold`, so that `iou > threshold` means the same in T as in double.
template <typename T>
T round_down(double threshold) {
  const T rounded = static_cast<T>(threshold);
  return static_cast<double>(rounded) > threshold ? std::nextafter(rounded, -std::numeric_limits<T>::infinity())
                                                  : rounded;
}

// Keeps or drops the boxes of one category, given in descending score order.
template <typename T>
void suppress_category(const T* boxes, const int64_t* begin, const int64_t* end, T threshold, uint8_t* keep) {
  const auto overlaps_kept = DETLIB_FASTEST(overlaps_kept<T>);
  KeptBoxes<T> kept;
  for (const int64_t* member = begin; member != end; ++member) {
    const T* box = boxes + 4 * *member;
    const T area = (box[2] - box[0]) * (box[3] - box[1]);
    if (!overlaps_kept(kept, box, area, threshold)) {
      kept.add(box, area);
      keep[*member] = 1;
    }
  }
}

template <typename T>
Tensor suppress_corners(const Tensor& corners, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  const T* boxes = corners.const_data_ptr<T>();
  const T threshold = round_down<T>(iou_threshold);
  return suppress(scores, idxs, 32768, [&](const int64_t* begin, const int64_t* end, uint8_t* keep) {
    suppress_category(boxes, begin, end, threshold, keep);
  });
}

Tensor nms_impl(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  DETLIB_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "boxes must have shape (N, 4)");
  check_nms_arguments(boxes, scores, idxs);
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

STABLE_TORCH_LIBRARY_IMPL(detlib, CPU, m) {
  m.impl("nms", TORCH_BOX(&nms));
  m.impl("batched_nms", TORCH_BOX(&batched_nms));
}

}  // namespace
}  // namespace detlib
