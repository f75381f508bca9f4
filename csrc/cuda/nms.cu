// Non-maximum suppression on CUDA.
//
// Boxes are taken by falling score in tiles of 64. One kernel writes, for each box, a bit per later box that it would
// suppress; a second one, a single block, walks through the tiles and settles which boxes are kept. Only the number of
// kept boxes returns to the host.
#include "../common/cuda.cuh"
#include "../common/nms_tiles.cuh"

namespace detlib {
namespace {

constexpr int64_t kMaxWords = 48 * 1024 / 8 - 2 * kTile;  // of shared memory, beside the kernel's own

template <typename T>
struct Corners {
  T x1, y1, x2, y2;
};

template <typename T>
__device__ __forceinline__ bool overlaps(const Corners<T>& a, const Corners<T>& b, double threshold) {
  const T width = min(a.x2, b.x2) - max(a.x1, b.x1);
  const T height = min(a.y2, b.y2) - max(a.y1, b.y1);
  const T intersection = max(width, T(0)) * max(height, T(0));
  const T area_a = (a.x2 - a.x1) * (a.y2 - a.y1), area_b = (b.x2 - b.x1) * (b.y2 - b.y1);
  return static_cast<double>(intersection / (area_a + area_b - intersection)) > threshold;
}

// Bit j of mask[i, w] tells that box i would suppress box 64 w + j; only words from the diagonal on are written.
template <typename T>
__global__ void __launch_bounds__(kTile) suppression_mask(
    const Corners<T>* boxes, const int64_t* order, const int64_t* categories, int64_t num_boxes, double threshold,
    int64_t words, unsigned long long* mask) {
  const int64_t row_tile = blockIdx.y, column_tile = blockIdx.x;
  if (row_tile > column_tile) {
    return;
  }
  const int64_t row = row_tile * kTile + threadIdx.x;
  const int64_t column_begin = column_tile * kTile;
  const int num_columns = static_cast<int>(min(static_cast<int64_t>(kTile), num_boxes - column_begin));

  __shared__ T tile[kTile][4];
  __shared__ int64_t tile_categories[kTile];
  if (threadIdx.x < num_columns) {
    const int64_t box = order[column_begin + threadIdx.x];
    tile[threadIdx.x][0] = boxes[box].x1;
    tile[threadIdx.x][1] = boxes[box].y1;
    tile[threadIdx.x][2] = boxes[box].x2;
    tile[threadIdx.x][3] = boxes[box].y2;
    tile_categories[threadIdx.x] = categories == nullptr ? 0 : categories[box];
  }
  __syncthreads();
  if (row >= num_boxes) {
    return;
  }
  const Corners<T> box = boxes[order[row]];
  const int64_t category = categories == nullptr ? 0 : categories[order[row]];
  unsigned long long bits = 0;
  for (int j = row_tile == column_tile ? threadIdx.x + 1 : 0; j < num_columns; ++j) {
    const Corners<T> other{tile[j][0], tile[j][1], tile[j][2], tile[j][3]};
    if (category == tile_categories[j] && overlaps(box, other, threshold)) {
      bits |= 1ULL << j;
    }
  }
  mask[row * words + column_tile] = bits;
}

// One block. keep[i] for the boxes in order of score.
__global__ void settle(const unsigned long long* mask, int64_t num_boxes, int64_t words, bool* keep) {
  extern __shared__ unsigned long long removed[];
  for (int64_t w = threadIdx.x; w < words; w += blockDim.x) {
    removed[w] = 0;
  }
  __syncthreads();
  settle_tiles(mask, num_boxes, words, removed, keep);
}

template <typename T>
void launch(
    const Tensor& boxes, const Tensor& order, const int64_t* categories, double threshold, Tensor& mask,
    Tensor& keep) {
  const int64_t num_boxes = boxes.size(0), words = mask.size(1);
  auto* mask_data = reinterpret_cast<unsigned long long*>(mask.mutable_data_ptr<int64_t>());
  const cudaStream_t stream = current_stream(boxes);
  const dim3 tiles(static_cast<unsigned int>(words), static_cast<unsigned int>(words));
  suppression_mask<T><<<tiles, kTile, 0, stream>>>(
      reinterpret_cast<const Corners<T>*>(boxes.const_data_ptr<T>()), order.const_data_ptr<int64_t>(), categories,
      num_boxes, threshold, words, mask_data);
  check_launch("nms: suppression_mask");
  settle<<<1, 1024, words * sizeof(unsigned long long), stream>>>(
      mask_data, num_boxes, words, keep.mutable_data_ptr<bool>());
  check_launch("nms: settle");
}

Tensor nms_impl(const Tensor& boxes, const Tensor& scores, const Tensor* idxs, double iou_threshold) {
  DETLIB_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "boxes must have shape (N, 4)");
  const int64_t num_boxes = boxes.size(0), words = (num_boxes + kTile - 1) / kTile;
  DETLIB_CHECK(scores.dim() == 1 && scores.size(0) == num_boxes, "scores must have shape (N,)");
  DETLIB_CHECK(
      scores.is_cuda() && scores.get_device_index() == boxes.get_device_index(), "scores must be on boxes' device");
  const DeviceGuard guard(boxes.get_device_index());
  if (num_boxes == 0) {
    return torch::stable::new_empty(boxes, {0}, ScalarType::Long);
  }
  DETLIB_CHECK(words <= kMaxWords, "boxes must be at most ", kMaxWords * kTile, ", got ", num_boxes);
  const Tensor order = as_contiguous(argsort_descending(scores), ScalarType::Long);
  const Tensor corners = as_contiguous(boxes, compute_type(boxes.scalar_type()));
  std::optional<Tensor> categories;
  if (idxs != nullptr) {
    DETLIB_CHECK(idxs->dim() == 1 && idxs->size(0) == num_boxes, "idxs must have shape (N,)");
    DETLIB_CHECK(
        idxs->is_cuda() && idxs->get_device_index() == boxes.get_device_index(), "idxs must be on boxes' device");
    categories = as_contiguous(*idxs, ScalarType::Long);
  }
  const int64_t* category_data = categories ? categories->const_data_ptr<int64_t>() : nullptr;
  Tensor mask = torch::stable::new_empty(boxes, {num_boxes, words}, ScalarType::Long);
  Tensor keep = torch::stable::new_empty(boxes, {num_boxes}, ScalarType::Bool);
  if (corners.scalar_type() == ScalarType::Double) {
    launch<double>(corners, order, category_data, iou_threshold, mask, keep);
  } else {
    launch<float>(corners, order, category_data, iou_threshold, mask, keep);
  }
  return masked_select(order, keep);
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
