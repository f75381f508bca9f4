// Multi-scale deformable attention on the CPU, forward and backward.
//
// A sample reads up to four cells of its level, and a cell is `channels` adjacent values, so the loops run along them.
// Work is split by image and head first, since the cells of one head fit into the cache. In the backward pass, a task
// is one level of one head of one image. Its cells belong to one thread, so no atomics are needed and the sums are the
// same on every run. float16 and bfloat16 are computed in float32 and rounded once.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../common/stable.h"
#include "vector.h"

namespace detlib {
namespace {

struct Level {
  int64_t height, width, start;
};

// value (images, cells, heads, channels), locations (images, queries, heads, levels, points, 2) as x and y in [0, 1],
// weights likewise without the last dimension; all contiguous.
template <typename T>
struct Attention {
  const T* value;
  const T* locations;
  const T* weights;
  const Level* levels;
  int64_t images, cells, heads, channels, queries, num_levels, points;

  int64_t row() const {
    return heads * channels;
  }
  // Returns the index of a query's first sample in `weights`.
  int64_t first_sample(int64_t image, int64_t query, int64_t head) const {
    return ((image * queries + query) * heads + head) * num_levels * points;
  }
};

// The offset of a cell in the values of its image, and its weight.
template <typename T>
struct Tap {
  int64_t offset;
  T weight;
};

#define DETLIB_KERNELS "ms_deform_attn_kernels.inc"
#include "each_instruction_set.inc"

template <typename T>
void forward_impl(const Attention<T>& a, T* output) {
  const auto run = DETLIB_FASTEST(forward_queries<T>);
  constexpr int64_t block = 64;
  const int64_t blocks = (a.queries + block - 1) / block;
  torch::stable::parallel_for(0, a.images * a.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Tap<T>> taps(4 * a.num_levels * a.points);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * block;
      run(a, i / (a.heads * blocks), i / blocks % a.heads, first, std::min(a.queries, first + block), taps.data(),
          output);
    }
  });
}

template <typename T>
void backward_impl(const Attention<T>& a, const T* grad, T* grad_value, T* grad_locations, T* grad_weights) {
  const auto run = DETLIB_FASTEST(backward_level<T>);
  torch::stable::parallel_for(0, a.images * a.heads * a.num_levels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t level = i % a.num_levels, head = i / a.num_levels % a.heads, image = i / a.num_levels / a.heads;
      run(a, image, head, level, grad, grad_value, grad_locations, grad_weights);
    }
  });
}

void check_shapes(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  DETLIB_CHECK(value.dim() == 4, "value must have shape (N, S, M, D)");
  DETLIB_CHECK(spatial_shapes.dim() == 2 && spatial_shapes.size(1) == 2, "spatial_shapes must have shape (L, 2)");
  const int64_t levels = spatial_shapes.size(0);
  DETLIB_CHECK(
      level_start_index.dim() == 1 && level_start_index.size(0) == levels, "level_start_index must have shape (L,)");
  DETLIB_CHECK(
      sampling_locations.dim() == 6 && sampling_locations.size(0) == value.size(0) &&
          sampling_locations.size(2) == value.size(2) && sampling_locations.size(3) == levels &&
          sampling_locations.size(5) == 2,
      "sampling_locations must have shape (N, Q, M, L, P, 2)");
  bool fits = attention_weights.dim() == 5;
  for (int64_t i = 0; fits && i < 5; ++i) {
    fits = attention_weights.size(i) == sampling_locations.size(i);
  }
  DETLIB_CHECK(fits, "attention_weights must have shape (N, Q, M, L, P)");
}

std::vector<Level> read_levels(const Tensor& spatial_shapes, const Tensor& level_start_index, int64_t cells) {
  const Tensor sizes = as_contiguous(spatial_shapes, ScalarType::Long);
  const Tensor starts = as_contiguous(level_start_index, ScalarType::Long);
  const int64_t* size = sizes.const_data_ptr<int64_t>();
  const int64_t* start = starts.const_data_ptr<int64_t>();
  std::vector<Level> levels(sizes.size(0));
  int64_t total = 0;
  for (size_t l = 0; l < levels.size(); ++l) {
    levels[l] = {size[2 * l], size[2 * l + 1], start[l]};
    DETLIB_CHECK(
        levels[l].height >= 0 && levels[l].width >= 0, "spatial_shapes must not be negative, level ", l, " is (",
        levels[l].height, ", ", levels[l].width, ")");
    DETLIB_CHECK(
        start[l] == total, "level_start_index must be ", total, " at level ", l, " for these spatial_shapes, got ",
        start[l]);
    total += levels[l].height * levels[l].width;
  }
  DETLIB_CHECK(total == cells, "spatial_shapes must add up to the ", cells, " cells of value, got ", total);
  return levels;
}

// Calls `body(Type<T>{}, attention)` with contiguous tensors in the compute type.
template <typename Body>
void with_attention(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights, const Body& body) {
  const std::vector<Level> levels = read_levels(spatial_shapes, level_start_index, value.size(1));
  dispatch_floating(value.scalar_type(), "value", [&](auto tag) {
    using T = compute_t<typename decltype(tag)::type>;
    const ScalarType type = compute_type(value.scalar_type());
    const Tensor v = as_contiguous(value, type);
    const Tensor l = as_contiguous(sampling_locations, type), w = as_contiguous(attention_weights, type);
    const Attention<T> attention{
        v.const_data_ptr<T>(), l.const_data_ptr<T>(), w.const_data_ptr<T>(), levels.data(), value.size(0),
        value.size(1),         value.size(2),         value.size(3),         l.size(1),     l.size(3),
        l.size(4)};
    body(Type<T>{}, attention);
  });
}

Tensor ms_deform_attn(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  check_shapes(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  const ScalarType type = value.scalar_type();
  Tensor output = torch::stable::new_empty(
      value, {value.size(0), sampling_locations.size(1), value.size(2) * value.size(3)}, compute_type(type));
  const auto run = [&](auto tag, const auto& attention) {
    if (output.numel() > 0) {
      forward_impl(attention, output.mutable_data_ptr<typename decltype(tag)::type>());
    }
  };
  with_attention(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, run);
  return as_type(output, type);
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad, const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  check_shapes(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  DETLIB_CHECK(
      grad.dim() == 3 && grad.size(0) == value.size(0) && grad.size(1) == sampling_locations.size(1) &&
          grad.size(2) == value.size(2) * value.size(3),
      "grad must have shape (N, Q, M * D)");
  const ScalarType type = compute_type(value.scalar_type());
  const auto zeros_like = [&](const Tensor& tensor) {
    Tensor result = torch::stable::new_empty(value, tensor.sizes(), type);
    return torch::stable::zero_(result);
  };
  Tensor grad_value = zeros_like(value);
  Tensor grad_locations = zeros_like(sampling_locations), grad_weights = zeros_like(attention_weights);
  const auto run = [&](auto tag, const auto& attention) {
    using T = typename decltype(tag)::type;
    if (grad.numel() > 0) {
      const Tensor gradient = as_contiguous(grad, type);
      backward_impl(
          attention, gradient.const_data_ptr<T>(), grad_value.mutable_data_ptr<T>(),
          grad_locations.mutable_data_ptr<T>(), grad_weights.mutable_data_ptr<T>());
    }
  };
  with_attention(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, run);
  return {
      as_type(grad_value, value.scalar_type()), as_type(grad_locations, sampling_locations.scalar_type()),
      as_type(grad_weights, attention_weights.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
}

}  // namespace
}  // namespace detlib
