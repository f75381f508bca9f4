// Pasting of masks on the CPU: into images, and directly into COCO's run lengths.
//
// A pixel's value is blended along x first and then along y. For images, the rows of a mask are stretched to the width
// of the box once, and each row of pixels blends two of them. Run lengths are computed one column of pixels at a time.
// Between two cells the value is monotonic, so comparing the first and last pixel shows whether it crosses the
// threshold, and bisection finds where. The cost is mask cells times columns, for any height of the box.
#include <algorithm>
#include <cmath>

#include "../common/paste_masks.h"
#include "rle.h"
#include "vector.h"

namespace detlib {
namespace {

// Values are compared with a threshold, so every x86 processor must round them the same.
#define DETLIB_WITHOUT_FMA
#define DETLIB_KERNELS "paste_masks_kernels.inc"
#include "each_instruction_set.inc"

// The pixels that a mask covers along one axis, from `begin` on. For each: the cell before it, as an index into a mask
// with a border of one zero cell, and its distance from the center of that cell.
template <typename T>
struct PasteAxis {
  int64_t begin = 0;
  std::vector<int64_t> cells;
  std::vector<T> fractions;

  PasteAxis(T low, T high, int64_t num_cells, int64_t num_pixels) {
    const PasteSide<T> side(low, high, num_cells);
    if (!side.valid) {
      return;
    }
    begin = first_pixel(0, num_pixels, [&](int64_t pixel) { return side.after_start(side.position(pixel)); });
    const int64_t end =
        first_pixel(begin, num_pixels, [&](int64_t pixel) { return !side.before_end(side.position(pixel)); });
    cells.reserve(end - begin);
    fractions.reserve(end - begin);
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const T position = side.position(pixel), cell = std::floor(position);
      cells.push_back(static_cast<int64_t>(cell) + 1);
      fractions.push_back(position - cell);
    }
  }

  int64_t size() const {
    return static_cast<int64_t>(cells.size());
  }

  // Returns the first of [begin, end) for which `predicate` returns true, or `end`. It must be true for all later ones
  // too.
  template <typename Predicate>
  static int64_t first_pixel(int64_t begin, int64_t end, const Predicate& predicate) {
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (predicate(middle)) {
        end = middle;
      } else {
        begin = middle + 1;
      }
    }
    return begin;
  }
};

// Masks (R, Hm, Wm) and boxes (R, 4), contiguous, and the size of the image.
template <typename T>
struct PasteJob {
  const T *masks, *boxes;
  int64_t count, mask_height, mask_width, height, width;

  PasteAxis<T> rows(int64_t index) const {
    return PasteAxis<T>(boxes[4 * index + 1], boxes[4 * index + 3], mask_height, height);
  }

  PasteAxis<T> columns(int64_t index) const {
    return PasteAxis<T>(boxes[4 * index], boxes[4 * index + 2], mask_width, width);
  }

  // Returns a mask with its border, (Hm + 2, Wm + 2), or its transpose.
  std::vector<T> bordered(int64_t index, bool transposed) const {
    std::vector<T> cells((mask_height + 2) * (mask_width + 2), T(0));
    const T* mask = masks + index * mask_height * mask_width;
    const int64_t row_step = transposed ? 1 : mask_width + 2, column_step = transposed ? mask_height + 2 : 1;
    for (int64_t y = 0; y < mask_height; ++y) {
      for (int64_t x = 0; x < mask_width; ++x) {
        cells[(y + 1) * row_step + (x + 1) * column_step] = mask[y * mask_width + x];
      }
    }
    return cells;
  }
};

// Pastes the rows [row_begin, row_end) of one image.
template <typename T>
void paste_rows(
    const PasteJob<T>& job, int64_t index, int64_t row_begin, int64_t row_end, T threshold, uint8_t* image) {
  const PasteAxis<T> rows = job.rows(index), columns = job.columns(index);
  const int64_t count = columns.size();
  const int64_t first = std::clamp(rows.begin, row_begin, row_end);
  const int64_t last = count == 0 ? first : std::clamp(rows.begin + rows.size(), first, row_end);
  std::fill(image + row_begin * job.width, image + first * job.width, uint8_t{0});
  std::fill(image + last * job.width, image + row_end * job.width, uint8_t{0});
  if (first == last) {
    return;
  }
  const auto stretch = DETLIB_FASTEST(blend_gathered<T>);
  const auto paste = DETLIB_FASTEST(paste_row<T>);
  const int64_t first_cell = rows.cells[first - rows.begin], last_cell = rows.cells[last - 1 - rows.begin] + 1;
  const std::vector<T> cells = job.bordered(index, false);
  std::vector<T> stretched((last_cell - first_cell + 1) * count);
  for (int64_t i = first_cell; i <= last_cell; ++i) {
    stretch(
        cells.data() + i * (job.mask_width + 2), columns.cells.data(), columns.fractions.data(), count,
        stretched.data() + (i - first_cell) * count);
  }
  for (int64_t y = first; y < last; ++y) {
    uint8_t* target = image + y * job.width;
    std::fill(target, target + columns.begin, uint8_t{0});
    const T* above = stretched.data() + (rows.cells[y - rows.begin] - first_cell) * count;
    paste(above, above + count, rows.fractions[y - rows.begin], threshold, count, target + columns.begin);
    std::fill(target + columns.begin + count, target + job.width, uint8_t{0});
  }
}

// The pixels of a column that are between the same two cells.
struct CellSpan {
  int64_t cell, begin, end;
};

template <typename T>
std::vector<CellSpan> cell_spans(const PasteAxis<T>& rows) {
  std::vector<CellSpan> spans;
  for (int64_t i = 0; i < rows.size(); ++i) {
    if (spans.empty() || spans.back().cell != rows.cells[i]) {
      spans.push_back({rows.cells[i], i, i});
    }
    spans.back().end = i + 1;
  }
  return spans;
}

// Writes the runs of a span that begins at pixel `start` of the image.
template <typename T>
void write_span(const PasteAxis<T>& rows, const CellSpan& span, const T* cells, T threshold, int64_t start,
                RleWriter& writer) {
  const T low = cells[span.cell], high = cells[span.cell + 1];
  const auto is_set = [&](int64_t i) { return blend(low, high, rows.fractions[i]) >= threshold; };
  const bool first = is_set(span.begin);
  writer.set(first, start);
  if (!std::isfinite(high - low)) {  // not monotonic
    for (int64_t i = span.begin + 1; i < span.end; ++i) {
      writer.set(is_set(i), start + i - span.begin);
    }
  } else if (is_set(span.end - 1) != first) {
    const int64_t change = PasteAxis<T>::first_pixel(
        span.begin + 1, span.end - 1, [&](int64_t i) { return is_set(i) != first; });
    writer.toggle(start + change - span.begin);
  }
}

template <typename T>
std::vector<uint8_t> paste_to_rle(const PasteJob<T>& job, int64_t index, T threshold) {
  RleWriter writer;
  const PasteAxis<T> rows = job.rows(index), columns = job.columns(index);
  if (rows.size() > 0 && columns.size() > 0) {
    const auto blend_columns = DETLIB_FASTEST(blend_rows<T>);
    const int64_t column_cells = job.mask_height + 2;
    const std::vector<T> cells = job.bordered(index, true);
    const std::vector<CellSpan> spans = cell_spans(rows);
    std::vector<T> column(column_cells);
    for (int64_t i = 0; i < columns.size(); ++i) {
      const T* left = cells.data() + columns.cells[i] * column_cells;
      blend_columns(left, left + column_cells, columns.fractions[i], column_cells, column.data());
      const int64_t top = (columns.begin + i) * job.height + rows.begin;
      if (rows.begin > 0) {
        writer.set(false, top - rows.begin);
      }
      for (const CellSpan& span : spans) {
        write_span(rows, span, column.data(), threshold, top + span.begin, writer);
      }
      if (rows.begin + rows.size() < job.height) {
        writer.set(false, top + rows.size());
      }
    }
    const int64_t end = columns.begin + columns.size();
    if (end < job.width) {
      writer.set(false, end * job.height);
    }
  }
  return writer.finish(job.height * job.width);
}

// Calls `body(job)` with the tensors in the compute type.
template <typename Body>
void with_job(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, const Body& body) {
  DETLIB_CHECK(masks.dim() == 3, "masks must have shape (R, Hm, Wm)");
  DETLIB_CHECK(
      boxes.dim() == 2 && boxes.size(0) == masks.size(0) && boxes.size(1) == 4,
      "boxes must have shape (R, 4) with one box for each mask");
  DETLIB_CHECK(height >= 0 && width >= 0, "height and width must not be negative");
  const bool is_double = masks.scalar_type() == ScalarType::Double || boxes.scalar_type() == ScalarType::Double;
  const ScalarType type = is_double ? ScalarType::Double : ScalarType::Float;
  const Tensor values = as_contiguous(masks, type), corners = as_contiguous(boxes, type);
  dispatch_floating(type, "masks", [&](auto tag) {
    using T = compute_t<typename decltype(tag)::type>;
    body(PasteJob<T>{
        values.const_data_ptr<T>(), corners.const_data_ptr<T>(), masks.size(0), masks.size(1), masks.size(2), height,
        width});
  });
}

Tensor paste_masks(const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, double threshold) {
  const ScalarType type = threshold >= 0 ? ScalarType::Bool : ScalarType::Byte;
  std::optional<Tensor> output;
  with_job(masks, boxes, height, width, [&](const auto& job) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(job.masks)>>;
    output = torch::stable::new_empty(masks, {job.count, height, width}, type);
    if (output->numel() == 0) {
      return;
    }
    auto* images = threshold >= 0 ? reinterpret_cast<uint8_t*>(output->mutable_data_ptr<bool>())
                                  : output->mutable_data_ptr<uint8_t>();
    constexpr int64_t kRows = 256;
    const int64_t blocks = (height + kRows - 1) / kRows;
    torch::stable::parallel_for(0, job.count * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t index = i / blocks, row = i % blocks * kRows;
        paste_rows<T>(
            job, index, row, std::min(row + kRows, height), static_cast<T>(threshold),
            images + index * height * width);
      }
    });
  });
  return *output;
}

std::tuple<Tensor, Tensor> paste_masks_to_rle(
    const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width, double threshold) {
  std::vector<std::vector<uint8_t>> strings;
  with_job(masks, boxes, height, width, [&](const auto& job) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(job.masks)>>;
    strings.resize(job.count);
    torch::stable::parallel_for(0, job.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        strings[i] = paste_to_rle<T>(job, i, static_cast<T>(threshold));
      }
    });
  });
  return join_strings(strings, masks);
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CPU, m) {
  m.impl("paste_masks", TORCH_BOX(&paste_masks));
  m.impl("paste_masks_to_rle", TORCH_BOX(&paste_masks_to_rle));
}

}  // namespace
}  // namespace detlib
