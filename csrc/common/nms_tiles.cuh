// The second half of non-maximum suppression on CUDA, for every kind of box.
//
// Boxes are in order of score and cut into tiles of kTile. Bit j of mask[i * words + w] says that box i, if it is kept,
// removes box w * kTile + j.
#pragma once

#include <cstdint>

namespace detlib {

constexpr int kTile = 64;

// To be run by one whole block: goes through the tiles in order, which boxes of a tile stay, and what they remove from
// later tiles. `removed` holds `words` words, all zero and visible to the block, in shared or global memory.
__device__ inline void settle_tiles(
    const unsigned long long* mask, int64_t num_boxes, int64_t words, unsigned long long* removed, bool* keep) {
  __shared__ unsigned long long diagonal[kTile];
  __shared__ unsigned long long kept;
  for (int64_t tile = 0; tile < words; ++tile) {
    const int64_t first = tile * kTile;
    const int size = static_cast<int>(min(static_cast<int64_t>(kTile), num_boxes - first));
    if (threadIdx.x < size) {
      diagonal[threadIdx.x] = mask[(first + threadIdx.x) * words + tile];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned long long gone = removed[tile], bits = 0;
      for (int i = 0; i < size; ++i) {
        if (!(gone >> i & 1)) {
          bits |= 1ULL << i;
          gone |= diagonal[i];
        }
      }
      kept = bits;
    }
    __syncthreads();
    if (threadIdx.x < size) {
      keep[first + threadIdx.x] = kept >> threadIdx.x & 1;
    }
    for (int64_t w = tile + 1 + threadIdx.x; w < words; w += blockDim.x) {
      unsigned long long gone = removed[w];
      for (unsigned long long bits = kept; bits != 0; bits &= bits - 1) {
        gone |= mask[(first + __ffsll(bits) - 1) * words + w];
      }
      removed[w] = gone;
    }
    __syncthreads();
  }
}

}  // namespace detlib
