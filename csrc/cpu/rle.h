// COCO's compressed run lengths: lengths of alternating runs of zeros and ones, column by column.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "../common/stable.h"

namespace detlib {

// Writes the run lengths of one mask. From the fourth on, a length is written as the difference to the length two
// before. A number is written in groups of five bits, lowest first, as characters from '0' on. A sixth bit marks that
// more groups follow; the highest bit of the last group is the sign.
class RleWriter {
 public:
  // Sets the mask to `value` from this pixel on. Pixels are counted column by column and must not decrease.
  void set(bool value, int64_t pixel) {
    if (value != value_) {
      write_run(pixel - begin_);
      begin_ = pixel;
      value_ = value;
    }
  }

  void toggle(int64_t pixel) {
    set(!value_, pixel);
  }

  // Returns the string of a mask with `num_pixels` pixels.
  std::vector<uint8_t> finish(int64_t num_pixels) {
    write_run(num_pixels - begin_);
    return std::move(text_);
  }

 private:
  void write_run(int64_t length) {
    int64_t rest = num_runs_ > 2 ? length - before_last_ : length;
    before_last_ = last_;
    last_ = length;
    ++num_runs_;
    bool more = true;
    while (more) {
      const int64_t group = rest & 31;
      rest >>= 5;
      more = rest != (group & 16 ? -1 : 0);
      text_.push_back(static_cast<uint8_t>('0' + group + (more ? 32 : 0)));
    }
  }

  std::vector<uint8_t> text_;
  int64_t begin_ = 0, last_ = 0, before_last_ = 0, num_runs_ = 0;
  bool value_ = false;
};

// Returns the concatenated strings, uint8, and their lengths, int64, on the CPU.
inline std::tuple<Tensor, Tensor> join_strings(const std::vector<std::vector<uint8_t>>& strings, const Tensor& like) {
  const int64_t count = static_cast<int64_t>(strings.size());
  Tensor lengths = torch::stable::new_empty(like, {count}, ScalarType::Long);
  int64_t* length = lengths.mutable_data_ptr<int64_t>();
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    length[i] = static_cast<int64_t>(strings[i].size());
    total += length[i];
  }
  Tensor bytes = torch::stable::new_empty(like, {total}, ScalarType::Byte);
  uint8_t* target = bytes.mutable_data_ptr<uint8_t>();
  for (const auto& string : strings) {
    target = std::copy(string.begin(), string.end(), target);
  }
  return {bytes, lengths};
}

}  // namespace detlib
