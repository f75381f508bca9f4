// Run-length encoding of masks on the CPU.
//
// Runs go down the columns, but the mask is read along its rows, a word at a time: a run starts wherever a row differs
// from the row above. The positions are then sorted by column; inside a column they are already in order.
#include <algorithm>

#include "rle.h"

namespace detlib {
namespace {

// Calls `found(column)` for each difference of two rows of `width` bytes of 0 and 1, from left to right.
template <typename Found>
inline void for_differences(const uint8_t* row, const uint8_t* above, int64_t width, const Found& found) {
  constexpr int64_t kWord = sizeof(uint64_t), kWords = 4;
  int64_t x = 0;
  const auto find_up_to = [&](int64_t end) {
    for (; x < end; ++x) {
      if (row[x] != above[x]) {
        found(x);
      }
    }
  };
  while (x + kWords * kWord <= width) {
    uint64_t ours[kWords], theirs[kWords], differs = 0;
    std::memcpy(ours, row + x, sizeof(ours));
    std::memcpy(theirs, above + x, sizeof(theirs));
    for (int64_t i = 0; i < kWords; ++i) {
      differs |= ours[i] ^ theirs[i];
    }
    if (differs != 0) {
      find_up_to(x + kWords * kWord);
    } else {
      x += kWords * kWord;
    }
  }
  find_up_to(width);
}

// Encodes masks of one size and reuses its buffers from mask to mask.
class MaskEncoder {
 public:
  MaskEncoder(int64_t height, int64_t width)
      : height_(height), width_(width), above_(width), first_of_column_(width + 1) {}

  std::vector<uint8_t> encode(const uint8_t* mask) {
    RleWriter writer;
    if (height_ > 0 && width_ > 0) {
      find_changes(mask);
      for (const int64_t pixel : sorted_) {
        writer.toggle(pixel);
      }
    }
    return writer.finish(height_ * width_);
  }

 private:
  void find_changes(const uint8_t* mask) {
    changes_.clear();
    std::fill(first_of_column_.begin(), first_of_column_.end(), 0);
    // The pixel before the first one of a column is the last one of the previous column.
    above_[0] = 0;
    std::copy_n(mask + (height_ - 1) * width_, width_ - 1, above_.begin() + 1);
    const uint8_t* above = above_.data();
    for (int64_t y = 0; y < height_; ++y) {
      const uint8_t* row = mask + y * width_;
      if (std::memcmp(row, above, width_) != 0) {  // memcmp is fast, and most rows are equal
        for_differences(row, above, width_, [&](int64_t x) {
          changes_.push_back({x, y});
          ++first_of_column_[x + 1];
        });
      }
      above = row;
    }
    for (int64_t x = 0; x < width_; ++x) {
      first_of_column_[x + 1] += first_of_column_[x];
    }
    sorted_.resize(changes_.size());
    for (const auto& change : changes_) {
      sorted_[first_of_column_[change.x]++] = change.x * height_ + change.y;
    }
  }

  struct Pixel {
    int64_t x, y;
  };

  int64_t height_, width_;
  std::vector<uint8_t> above_;
  std::vector<int64_t> first_of_column_, sorted_;
  std::vector<Pixel> changes_;
};

std::tuple<Tensor, Tensor> encode_rle(const Tensor& masks) {
  DETLIB_CHECK(masks.dim() == 3, "masks must have shape (R, H, W)");
  DETLIB_CHECK(masks.scalar_type() == ScalarType::Bool, "masks must be bool");
  const int64_t count = masks.size(0), height = masks.size(1), width = masks.size(2);
  const Tensor bits = as_contiguous(masks, ScalarType::Bool);
  const auto* data = reinterpret_cast<const uint8_t*>(bits.const_data_ptr<bool>());
  std::vector<std::vector<uint8_t>> strings(count);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    MaskEncoder encoder(height, width);
    for (int64_t i = begin; i < end; ++i) {
      strings[i] = encoder.encode(data + i * height * width);
    }
  });
  return join_strings(strings, masks);
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CPU, m) {
  m.impl("encode_rle", TORCH_BOX(&encode_rle));
}

}  // namespace
}  // namespace detlib
