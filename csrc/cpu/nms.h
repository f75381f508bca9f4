// Non-maximum suppression on the CPU, for every type of box: score order, categories and result.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "../common/stable.h"

namespace detlib {

inline void check_nms_arguments(const Tensor& boxes, const Tensor& scores, const Tensor* idxs) {
  const int64_t n = boxes.size(0);
  DETLIB_CHECK(scores.dim() == 1 && scores.size(0) == n, "scores must have shape (N,)");
  DETLIB_CHECK(idxs == nullptr || (idxs->dim() == 1 && idxs->size(0) == n), "idxs must have shape (N,)");
}

// Returns the indices of the kept boxes, in descending score order.
//
// Args:
//   scores: (N,).
//   idxs: (N,) the category of each box, or nullptr for one category.
//   parallel_boxes: number of boxes from which categories run in parallel; for fewer, starting threads takes longer.
//   suppress_category: called as (begin, end, keep) with the indices of the boxes of one category, in descending score
//     order; sets keep[i] to 1 for each box i that stays.
template <typename SuppressCategory>
Tensor suppress(
    const Tensor& scores, const Tensor* idxs, int64_t parallel_boxes, const SuppressCategory& suppress_category) {
  const int64_t n = scores.size(0);
  if (n == 0) {
    return torch::stable::new_empty(scores, {0}, ScalarType::Long);
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

  std::vector<uint8_t> keep(n, 0);
  const int64_t num_groups = static_cast<int64_t>(begins.size()) - 1;
  const int64_t grain = n < parallel_boxes ? num_groups : 1;
  torch::stable::parallel_for(0, num_groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      suppress_category(grouped.data() + begins[group], grouped.data() + begins[group + 1], keep.data());
    }
  });

  const int64_t num_kept = std::accumulate(keep.begin(), keep.end(), int64_t{0});
  Tensor output = torch::stable::new_empty(scores, {num_kept}, ScalarType::Long);
  std::copy_if(order, order + n, output.mutable_data_ptr<int64_t>(), [&](int64_t i) { return keep[i] != 0; });
  return output;
}

}  // namespace detlib
