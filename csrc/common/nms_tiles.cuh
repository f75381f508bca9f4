// Non-maximum suppression on CUDA, for every type of box.
//
// Boxes are ordered and split into tiles of kTile. The first kernel writes for each box one bit per later box that it
// would suppress. The second kernel, a single block, goes through the tiles in order and decides which boxes stay. Only
// the number of kept boxes returns to the host.
//
// Boxes are in descending score order. If there are many boxes and multiple categories, they are first grouped by
// category, so that pairs of tiles without a common category can be skipped.
#pragma once

#include "cuda.cuh"

namespace detlib {

constexpr int kTile = 64;
constexpr int64_t kGroupedBoxes = 1024;  // with fewer boxes, the sort takes longer than it saves

// The boxes in order, on the device.
struct SuppressionOrder {
  const int64_t* boxes;       // index of the box at each position
  const int64_t* categories;  // category of the box at each position; nullptr for a single category
  const int64_t* ranks;       // rank by score of each position if boxes are grouped by category, else nullptr

  __device__ __forceinline__ int64_t category(int64_t position) const {
    return categories == nullptr ? 0 : categories[position];
  }
};

// Sets bit j of mask[i * words + w] if the box at position i, when kept, suppresses the box at w * kTile + j. Only
// tiles on and above the diagonal that have a common category are written.
template <typename Box, typename Removes>
__global__ void __launch_bounds__(kTile) suppression_kernel(
    const Box* boxes, SuppressionOrder order, int64_t num_boxes, int64_t words, Removes removes,
    unsigned long long* mask) {
  const int64_t row_tile = blockIdx.y, column_tile = blockIdx.x;
  if (row_tile > column_tile) {
    return;
  }
  const int64_t row = row_tile * kTile + threadIdx.x, column_begin = column_tile * kTile;
  if (order.ranks != nullptr && row_tile != column_tile &&
      order.category(row_tile * kTile + kTile - 1) < order.category(column_begin)) {
    return;
  }
  const int num_columns = static_cast<int>(min(static_cast<int64_t>(kTile), num_boxes - column_begin));
  __shared__ Box tile[kTile];
  __shared__ int64_t tile_categories[kTile];
  if (threadIdx.x < num_columns) {
    tile[threadIdx.x] = boxes[order.boxes[column_begin + threadIdx.x]];
    tile_categories[threadIdx.x] = order.category(column_begin + threadIdx.x);
  }
  __syncthreads();
  if (row >= num_boxes) {
    return;
  }
  const Box box = boxes[order.boxes[row]];
  const int64_t category = order.category(row);
  unsigned long long bits = 0;
  for (int j = row_tile == column_tile ? threadIdx.x + 1 : 0; j < num_columns; ++j) {
    if (category == tile_categories[j] && removes(box, tile[j])) {
      bits |= 1ULL << j;
    }
  }
  mask[row * words + column_tile] = bits;
}

// Runs as one block. Sets keep[i] of the box with rank i by score; `removed` must contain `words` zeros.
static __global__ void settle_kernel(
    const unsigned long long* mask, SuppressionOrder order, int64_t num_boxes, int64_t words,
    unsigned long long* removed, bool* keep) {
  __shared__ unsigned long long diagonal[kTile];
  __shared__ unsigned long long kept;
  __shared__ int64_t end;  // end of the tiles that have a common category with this one
  if (threadIdx.x == 0) {
    end = order.ranks == nullptr ? words : 1;
  }
  for (int64_t tile = 0; tile < words; ++tile) {
    const int64_t first = tile * kTile;
    const int size = static_cast<int>(min(static_cast<int64_t>(kTile), num_boxes - first));
    if (threadIdx.x < size) {
      diagonal[threadIdx.x] = mask[(first + threadIdx.x) * words + tile];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned long long bits = 0, open = ~__ldcg(removed + tile);
      if (size < kTile) {
        open &= (1ULL << size) - 1;
      }
      while (open != 0) {
        const int i = __ffsll(open) - 1;
        bits |= 1ULL << i;
        open &= ~(diagonal[i] | 1ULL << i);
      }
      kept = bits;
      if (order.ranks != nullptr) {
        const int64_t last = order.category(first + size - 1);
        while (end < words && order.category(end * kTile) <= last) {
          ++end;
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < size) {
      const int64_t position = first + threadIdx.x;
      keep[order.ranks == nullptr ? position : order.ranks[position]] = kept >> threadIdx.x & 1;
    }
    // With fewer later words than threads, several threads share a word, each for some boxes of the tile, so that many
    // loads are in flight.
    const int later = static_cast<int>(end - tile - 1), threads = static_cast<int>(blockDim.x);
    const int parts = later < threads ? min(kTile, threads / max(later, 1)) : 1;
    const int span = threads / parts, part = static_cast<int>(threadIdx.x) / span;
    for (int64_t w = tile + 1 + threadIdx.x % span; w < end && part < parts; w += span) {
      unsigned long long gone = 0;
#pragma unroll 8
      for (int i = part; i < size; i += parts) {
        gone |= kept >> i & 1 ? mask[(first + i) * words + w] : 0;
      }
      if (gone != 0) {
        atomicOr(removed + w, gone);
      }
    }
    __syncthreads();
  }
}

// Returns the indices of the kept boxes, in descending score order.
//
// Args:
//   scores: (N,), N > 0; checked by the caller.
//   idxs: (N,) category of each box, or nullptr.
//   boxes: N boxes, on the device of the scores.
//   removes: device function of two boxes; returns whether the first suppresses the second.
template <typename Box, typename Removes>
Tensor suppress(const Tensor& scores, const Tensor* idxs, const Box* boxes, Removes removes) {
  const int64_t num_boxes = scores.size(0), words = (num_boxes + kTile - 1) / kTile;
  DETLIB_CHECK(words <= 65535, "boxes must be at most ", 65535 * kTile, ", got ", num_boxes);
  const Tensor by_score = stable_sort(scores, true).indices;
  Tensor order = by_score;
  std::optional<Tensor> categories, ranks;
  if (idxs != nullptr) {
    DETLIB_CHECK(idxs->dim() == 1 && idxs->size(0) == num_boxes, "idxs must have shape (N,)");
    DETLIB_CHECK(
        idxs->is_cuda() && idxs->get_device_index() == scores.get_device_index(),
        "idxs must be on the device of boxes");
    categories = as_contiguous(index_select(*idxs, by_score), ScalarType::Long);
    if (num_boxes >= kGroupedBoxes) {
      const Sorted grouped = stable_sort(*categories, false);
      categories = grouped.values;
      ranks = grouped.indices;
      order = index_select(by_score, grouped.indices);
    }
  }
  const SuppressionOrder view{
      order.const_data_ptr<int64_t>(), categories ? categories->const_data_ptr<int64_t>() : nullptr,
      ranks ? ranks->const_data_ptr<int64_t>() : nullptr};
  Tensor mask = torch::stable::new_empty(scores, {num_boxes, words}, ScalarType::Long);
  Tensor removed = torch::stable::new_empty(scores, {words}, ScalarType::Long);
  torch::stable::zero_(removed);
  Tensor keep = torch::stable::new_empty(scores, {num_boxes}, ScalarType::Bool);
  auto* mask_data = reinterpret_cast<unsigned long long*>(mask.mutable_data_ptr<int64_t>());
  const cudaStream_t stream = current_stream(scores);
  const dim3 tiles(static_cast<unsigned int>(words), static_cast<unsigned int>(words));
  suppression_kernel<<<tiles, kTile, 0, stream>>>(boxes, view, num_boxes, words, removes, mask_data);
  check_launch("nms: suppression_kernel");
  settle_kernel<<<1, 1024, 0, stream>>>(
      mask_data, view, num_boxes, words, reinterpret_cast<unsigned long long*>(removed.mutable_data_ptr<int64_t>()),
      keep.mutable_data_ptr<bool>());
  check_launch("nms: settle_kernel");
  return masked_select(by_score, keep);
}

}  // namespace detlib
