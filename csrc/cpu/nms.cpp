// Non-maximum suppression on the CPU.
//
// Boxes of one category are visited by falling score; each is compared with the boxes kept so far, some vectors at a
// time, until one overlaps it. Categories are independent and run in parallel.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../common/stable.h"
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

namespace baseline {
constexpr int kVectorBytes = 16;
#define DETLIB_TARGET
#include "nms_kernels.inc"
#undef DETLIB_TARGET
}  // namespace baseline

// Without fused multiply-add: IoU is compared with a threshold, so it is rounded alike on every x86 processor.
#if DETLIB_HAS_AVX2
namespace avx2 {
constexpr int kVectorBytes = 32;
#define DETLIB_TARGET __attribute__((target("avx2")))
#include "nms_kernels.inc"
#undef DETLIB_TARGET
}  // namespace avx2
#else
namespace avx2 = baseline;
#endif

// The largest T that is at most `threshold`, so that `iou > threshold` means the same in T as in double.
template <typename T>
T round_down(double threshold) {
  const T rounded = static_cast<T>(threshold);
  return static_cast<double>(rounded) > threshold ? std::nextafter(rounded, -std::numeric_limits<T>::infinity())
                                                  : rounded;
}

template <typename T>
void suppress_category(
    const T* boxes, const int64_t* members, int64_t num_members, T threshold, uint8_t* keep) {
  const auto overlaps_kept = use_avx2() ? &avx2::overlaps_kept<T> : &baseline::overlaps_kept<T>;
  KeptBoxes<T> kept;
  for (int64_t i = 0; i < num_members; ++i) {
    const T* box = boxes + 4 * members[i];
    const T area = (box[2] - box[0]) * (box[3] - box[1]);
    if (!overlaps_kept(kept, box, area, threshold)) {
      kept.add(box, area);
      keep[members[i]] = 1;
    }
  }
}

// Positions 0..n-1 of the score order, grouped by category, in order within each; and where each group begins.
std::vector<int64_t> group_by_category(
    const int64_t* categories, const int64_t* order, int64_t n, std::vector<int64_t>& begins) {
  std::vector<int64_t> positions(n);
  std::iota(positions.begin(), positions.end(), 0);
  begins.assign(1, 0);
  if (categories != nullptr) {
    const auto category = [&](int64_t position) { return categories[order[position]]; };
    std::stable_sort(positions.begin(), positions.end(), [&](int64_t a, int64_t b) {
      return category(a) < category(b);
    });
    for (int64_t i = 1; i < n; ++i) {
      if (category(positions[i]) != category(positions[i - 1])) {
        begins.push_back(i);
      }
    }
  }
  begins.push_back(n);
  return positions;
}

template <typename T>
std::vector<uint8_t> kept_positions(
    const Tensor& boxes, const int64_t* order, const int64_t* categories, double iou_threshold) {
  const int64_t n = boxes.size(0);
  const T* source = boxes.const_data_ptr<T>();
  std::vector<T> sorted(4 * n);
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(source + 4 * order[i], 4, sorted.data() + 4 * i);
  }
  std::vector<int64_t> begins;
  const auto positions = group_by_category(categories, order, n, begins);
  std::vector<uint8_t> keep(n, 0);
  const T threshold = round_down<T>(iou_threshold);
  // Waking threads costs more than the few milliseconds a smaller set takes.
  const int64_t num_groups = static_cast<int64_t>(begins.size()) - 1;
  const int64_t grain = n < 32768 ? num_groups : 1;
  torch::stable::parallel_for(0, num_groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      suppress_category(
          sorted.data(), positions.data() + begins[group], begins[group + 1] - begins[group], threshold,
          keep.data());
    }
  });
  return keep;
}

Tensor nms_impl(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  DETLIB_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "boxes must have shape (N, 4)");
  DETLIB_CHECK(scores.dim() == 1 && scores.size(0) == boxes.size(0), "scores must have shape (N,)");
  const int64_t n = boxes.size(0);
  if (n == 0) {
    return torch::stable::new_empty(boxes, {0}, ScalarType::Long);
  }
  const Tensor order_tensor = stable_sort(scores, true).indices;
  const int64_t* order = order_tensor.const_data_ptr<int64_t>();
  const Tensor corners = as_contiguous(boxes, compute_type(boxes.scalar_type()));
  std::optional<Tensor> categories;
  if (idxs != nullptr) {
    DETLIB_CHECK(idxs->dim() == 1 && idxs->size(0) == n, "idxs must have shape (N,)");
    categories = as_contiguous(*idxs, ScalarType::Long);
  }
  const int64_t* category_data = categories ? categories->const_data_ptr<int64_t>() : nullptr;
  const auto keep = corners.scalar_type() == ScalarType::Double
      ? kept_positions<double>(corners, order, category_data, iou_threshold)
      : kept_positions<float>(corners, order, category_data, iou_threshold);

  const int64_t num_kept = std::accumulate(keep.begin(), keep.end(), int64_t{0});
  Tensor output = torch::stable::new_empty(boxes, {num_kept}, ScalarType::Long);
  int64_t* kept = output.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    if (keep[i]) {
      *kept++ = order[i];
    }
  }
  return output;
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
