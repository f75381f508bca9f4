// Frozen batch norm on the CPU, fused with the residual sum and the ReLU that follow it in a residual network.
//
// One pass over memory. In channels-last layout, a row has one element per channel; else, a row is the plane of one
// channel.
#include <cmath>
#include <vector>

#include "../common/frozen_batch_norm.h"
#include "vector.h"

namespace detlib {
namespace {

#define DETLIB_KERNELS "frozen_batch_norm_kernels.inc"
#include "each_instruction_set.inc"

constexpr int64_t kGrain = 32768;  // elements per thread; with fewer, starting threads takes longer than it saves

template <typename T>
std::vector<T> scales(const Tensor& var, const Tensor& weight, double eps) {
  const T *v = var.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
  std::vector<T> result(var.size(0));
  for (size_t c = 0; c < result.size(); ++c) {
    result[c] = T(1) / std::sqrt(v[c] + static_cast<T>(eps)) * w[c];
  }
  return result;
}

template <typename T>
std::vector<T> shifts(const std::vector<T>& scale, const Tensor& mean, const Tensor& bias) {
  const T *m = mean.const_data_ptr<T>(), *b = bias.const_data_ptr<T>();
  std::vector<T> result(scale.size());
  for (size_t c = 0; c < result.size(); ++c) {
    result[c] = std::fma(-m[c], scale[c], b[c]);
  }
  return result;
}

template <typename Body>
void for_rows(const NormShape& shape, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, shape.columns));
  torch::stable::parallel_for(0, shape.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      body(row * shape.columns, shape.channels_last ? 0 : row % shape.channels);
    }
  });
}

Tensor frozen_batch_norm(
    const Tensor& x, const std::optional<Tensor>& residual, const Tensor& mean, const Tensor& var, const Tensor& weight,
    const Tensor& bias, double eps, bool relu) {
  const NormForward a(x, residual, mean, var, weight, bias);
  const NormShape shape(a.x);
  dispatch_floating(a.x.scalar_type(), "x", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using T = compute_t<scalar_t>;
    const auto scale = scales<T>(a.var, a.weight, eps);
    const auto shift = shifts<T>(scale, a.mean, a.bias);
    const scalar_t *from = a.x.const_data_ptr<scalar_t>(), *extra = data_or_null<scalar_t>(a.residual);
    scalar_t* to = a.output.mutable_data_ptr<scalar_t>();
    const auto pixels = DETLIB_FASTEST(norm_row<true, scalar_t, T>);
    const auto plane = DETLIB_FASTEST(norm_row<false, scalar_t, T>);
    const auto row = shape.channels_last ? pixels : plane;
    for_rows(shape, [&](int64_t start, int64_t channel) {
      row(from + start, extra ? extra + start : nullptr, scale.data() + channel, shift.data() + channel,
          shape.columns, relu, to + start);
    });
  });
  return a.output;
}

std::tuple<Tensor, Tensor> frozen_batch_norm_backward(
    const Tensor& grad, const std::optional<Tensor>& output, const Tensor& var, const Tensor& weight, double eps,
    bool with_residual) {
  const NormBackward a(grad, output, var, weight, with_residual);
  const NormShape shape(a.grad);
  dispatch_floating(a.grad.scalar_type(), "grad", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using T = compute_t<scalar_t>;
    const auto scale = scales<T>(a.var, a.weight, eps);
    const scalar_t *from = a.grad.const_data_ptr<scalar_t>(), *mask = data_or_null<scalar_t>(a.output);
    scalar_t *to = a.grad_x.mutable_data_ptr<scalar_t>(), *rest = a.residual_data<scalar_t>();
    const auto pixels =
        DETLIB_FASTEST(norm_row_backward<true, scalar_t, T>);
    const auto plane =
        DETLIB_FASTEST(norm_row_backward<false, scalar_t, T>);
    const auto row = shape.channels_last ? pixels : plane;
    for_rows(shape, [&](int64_t start, int64_t channel) {
      row(from + start, mask ? mask + start : nullptr, scale.data() + channel, shape.columns, to + start,
          rest ? rest + start : nullptr);
    });
  });
  return a.results();
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CPU, m) {
  m.impl("frozen_batch_norm", TORCH_BOX(&frozen_batch_norm));
  m.impl("frozen_batch_norm_backward", TORCH_BOX(&frozen_batch_norm_backward));
}

}  // namespace
}  // namespace detlib
