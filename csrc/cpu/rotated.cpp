// Intersection over union and non-maximum suppression of rotated boxes on the CPU.
//
// Most pairs of boxes are far apart and are settled by the circles around them; the others are worked on some at a time,
// one pair per lane of a vector. Both operators compute in double precision, whatever the dtype of the boxes.
#include <algorithm>
#include <numeric>
#include <vector>

#include "rotated_columns.h"
#include "vector.h"

namespace detlib {
namespace {

namespace baseline {
constexpr int kVectorBytes = 16;
#define DETLIB_TARGET
#include "rotated_kernels.inc"
#undef DETLIB_TARGET
}  // namespace baseline

// Without fused multiply-add: IoU is compared with a threshold, so it is rounded alike on every x86 processor.
#if DETLIB_HAS_AVX2
namespace avx2 {
constexpr int kVectorBytes = 32;
#define DETLIB_TARGET __attribute__((target("avx2")))
#include "rotated_kernels.inc"
#undef DETLIB_TARGET
}  // namespace avx2
#else
namespace avx2 = baseline;
#endif

void check_boxes(const Tensor& boxes, const char* name) {
  DETLIB_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, name, " must have shape (N, 5)");
}

template <typename T>
void fill_iou(const RotatedColumns& rows, const RotatedColumns& columns, T* output) {
  const auto run = use_avx2() ? &avx2::iou_with_all<T> : &baseline::iou_with_all<T>;
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

// Members of one category, by falling score; sets keep[i] for those that stay.
void suppress_category(
    const RotatedColumns& boxes, const int64_t* begin, const int64_t* end, double threshold, uint8_t* keep) {
  const auto overlaps = use_avx2() ? &avx2::overlaps_kept : &baseline::overlaps_kept;
  RotatedColumns kept;
  for (const int64_t* member = begin; member != end; ++member) {
    const RotatedBox<double> box = boxes[*member];
    if (!overlaps(kept, box, threshold)) {
      kept.add(box);
      keep[*member] = 1;
    }
  }
}

Tensor nms_impl(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  check_boxes(boxes, "boxes");
  const int64_t n = boxes.size(0);
  DETLIB_CHECK(scores.dim() == 1 && scores.size(0) == n, "scores must have shape (N,)");
  DETLIB_CHECK(idxs == nullptr || (idxs->dim() == 1 && idxs->size(0) == n), "idxs must have shape (N,)");
  if (n == 0) {
    return torch::stable::new_empty(boxes, {0}, ScalarType::Long);
  }
  const Tensor order_tensor = stable_sort(scores, true).indices;
  const int64_t* order = order_tensor.const_data_ptr<int64_t>();
  std::vector<int64_t> grouped(order, order + n), begins{0};
  if (idxs != nullptr) {
    const Tensor categories = as_contiguous(*idxs, ScalarType::Long);
    const int64_t* category = categories.const_data_ptr<int64_t>();
    std::stable_sort(
        grouped.begin(), grouped.end(), [&](int64_t a, int64_t b) { return category[a] < category[b]; });
    for (int64_t i = 1; i < n; ++i) {
      if (category[grouped[i]] != category[grouped[i - 1]]) {
        begins.push_back(i);
      }
    }
  }
  begins.push_back(n);

  const RotatedColumns columns = rotated_columns(boxes);
  std::vector<uint8_t> keep(n, 0);
  const int64_t num_groups = static_cast<int64_t>(begins.size()) - 1;
  // Waking threads costs more than a small set takes.
  torch::stable::parallel_for(0, num_groups, n < 16384 ? num_groups : 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      suppress_category(
          columns, grouped.data() + begins[group], grouped.data() + begins[group + 1], iou_threshold, keep.data());
    }
  });

  const int64_t num_kept = std::accumulate(keep.begin(), keep.end(), int64_t{0});
  Tensor output = torch::stable::new_empty(boxes, {num_kept}, ScalarType::Long);
  std::copy_if(order, order + n, output.mutable_data_ptr<int64_t>(), [&](int64_t i) { return keep[i] != 0; });
  return output;
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
