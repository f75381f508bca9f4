// Arguments and results of the frozen batch norm, for both devices: checked, in one layout and one dtype.
#pragma once

#include "stable.h"

namespace detlib {

// A feature map (N, C, H, W) as rows in memory: rows of C elements in channels-last layout, else N * C planes.
struct NormShape {
  bool channels_last;
  int64_t channels, rows, columns;  // `rows` of `columns` elements each

  explicit NormShape(const Tensor& map) : channels_last(is_channels_last(map)), channels(map.size(1)) {
    const int64_t pixels = map.size(2) * map.size(3);
    rows = map.size(0) * (channels_last ? pixels : channels);
    columns = channels_last ? channels : pixels;
  }
};

inline void check_norm_map(const Tensor& map, const char* name) {
  DETLIB_CHECK(map.dim() == 4, name, " must have shape (N, C, H, W)");
}

// Returns one value per channel, contiguous and in the compute type.
inline Tensor norm_constant(const Tensor& constant, const Tensor& map, const char* name) {
  DETLIB_CHECK(
      constant.dim() == 1 && constant.size(0) == map.size(1), name, " must have shape (C,), one value per channel");
  DETLIB_CHECK(
      constant.is_cuda() == map.is_cuda() && constant.get_device_index() == map.get_device_index(), name,
      " must be on the device of the feature map");
  return as_contiguous(constant, compute_type(map.scalar_type()));
}

// Returns the feature map itself if it is dense in one of the two layouts, else a contiguous copy.
inline Tensor as_dense(const Tensor& map, const char* name) {
  check_norm_map(map, name);
  return map.is_contiguous() || is_channels_last(map) ? map : torch::stable::contiguous(map);
}

inline Tensor new_like(const Tensor& map) {
  return new_map(map, {map.size(0), map.size(1), map.size(2), map.size(3)}, map.scalar_type(), is_channels_last(map));
}

// Returns `map` in the layout and dtype of `like`, which is dense and has the same shape.
inline Tensor in_layout_of(const Tensor& map, const Tensor& like, const char* name) {
  check_norm_map(map, name);
  for (int64_t i = 0; i < 4; ++i) {
    DETLIB_CHECK(map.size(i) == like.size(i), name, " must have the shape of the other feature maps");
  }
  DETLIB_CHECK(
      map.is_cuda() == like.is_cuda() && map.get_device_index() == like.get_device_index(), name,
      " must be on the device of the other feature maps");
  const bool same_layout = is_channels_last(like) ? is_channels_last(map) : map.is_contiguous();
  if (same_layout && map.scalar_type() == like.scalar_type()) {
    return map;
  }
  Tensor copy = new_like(like);
  torch::stable::copy_(copy, map);
  return copy;
}

template <typename scalar_t>
const scalar_t* data_or_null(const std::optional<Tensor>& map) {
  return map ? map->const_data_ptr<scalar_t>() : nullptr;
}

struct NormForward {
  Tensor x;
  std::optional<Tensor> residual;
  Tensor mean, var, weight, bias, output;

  NormForward(
      const Tensor& x, const std::optional<Tensor>& residual, const Tensor& mean, const Tensor& var,
      const Tensor& weight, const Tensor& bias)
      : x(as_dense(x, "x")),
        residual(residual ? std::optional(in_layout_of(*residual, this->x, "residual")) : std::nullopt),
        mean(norm_constant(mean, x, "mean")),
        var(norm_constant(var, x, "var")),
        weight(norm_constant(weight, x, "weight")),
        bias(norm_constant(bias, x, "bias")),
        output(new_like(this->x)) {}
};

struct NormBackward {
  std::optional<Tensor> output;  // blocks the gradient where it is zero; absent if there was no ReLU
  Tensor grad, var, weight, grad_x;
  std::optional<Tensor> grad_residual;

  NormBackward(
      const Tensor& grad, const std::optional<Tensor>& output, const Tensor& var, const Tensor& weight,
      bool with_residual)
      : output(output ? std::optional(as_dense(*output, "output")) : std::nullopt),
        grad(this->output ? in_layout_of(grad, *this->output, "grad") : as_dense(grad, "grad")),
        var(norm_constant(var, grad, "var")),
        weight(norm_constant(weight, grad, "weight")),
        grad_x(new_like(this->grad)),
        grad_residual(with_residual ? std::optional(new_like(this->grad)) : std::nullopt) {}

  // Returns the results of the operator. A gradient that is not needed is an empty tensor.
  std::tuple<Tensor, Tensor> results() const {
    const auto none = [&] {
      return torch::stable::new_empty(grad, std::array<int64_t, 1>{0}, grad.scalar_type());
    };
    return {grad_x, grad_residual ? *grad_residual : none()};
  }

  template <typename scalar_t>
  scalar_t* residual_data() const {
    return grad_residual ? grad_residual->mutable_data_ptr<scalar_t>() : nullptr;
  }
};

}  // namespace detlib
