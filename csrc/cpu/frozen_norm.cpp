// Batch normalisation by constants on the CPU, with what follows it in a residual network: a sum and a ReLU.
//
// One pass over memory. In channels-last layout a row has one element a channel, else one channel's plane is a row.
#include <cmath>
#include <vector>

#include "../common/frozen_norm.h"
#include "vector.h"

namespace detlib {
namespace {

namespace baseline {
#define DETLIB_TARGET
#include "frozen_norm_kernels.inc"
#undef DETLIB_TARGET
}  // namespace baseline

#if DETLIB_HAS_AVX2
namespace avx2 {
#define DETLIB_TARGET __attribute__((target("avx2,fma")))
#include "frozen_norm_kernels.inc"
#undef DETLIB_TARGET
}  // namespace avx2
#else
namespace avx2 = baseline;
#endif

constexpr int64_t kGrain = 32768;  // elements that are worth a thread

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

template <typename scalar_t>
const scalar_t* data_or_null(const std::optional<Tensor>& map) {
  return map ? map->const_data_ptr<scalar_t>() : nullptr;
}

Tensor frozen_batch_norm(
    const Tensor& input, const std::optional<Tensor>& residual, const Tensor& mean, const Tensor& var,
    const Tensor& weight, const Tensor& bias, double eps, bool relu) {
  check_norm_map(input, "x");
  const ScalarType type = input.scalar_type(), constants = compute_type(type);
  check_norm_constant(mean, input, "mean");
  check_norm_constant(var, input, "var");
  check_norm_constant(weight, input, "weight");
  check_norm_constant(bias, input, "bias");
  const Tensor x = as_dense(input);
  const std::optional<Tensor> added = residual ? std::optional(as_lies(*residual, x, "residual")) : std::nullopt;
  Tensor output = new_like(x);
  const NormShape shape(x);
  dispatch_floating(type, "x", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using T = compute_t<scalar_t>;
    const auto scale = scales<T>(as_contiguous(var, constants), as_contiguous(weight, constants), eps);
    const auto shift = shifts<T>(scale, as_contiguous(mean, constants), as_contiguous(bias, constants));
    const scalar_t *from = x.const_data_ptr<scalar_t>(), *extra = data_or_null<scalar_t>(added);
    scalar_t* to = output.mutable_data_ptr<scalar_t>();
    const auto pixels = use_avx2() ? &avx2::norm_row<true, scalar_t, T> : &baseline::norm_row<true, scalar_t, T>;
    const auto plane = use_avx2() ? &avx2::norm_row<false, scalar_t, T> : &baseline::norm_row<false, scalar_t, T>;
    const auto row = shape.channels_last ? pixels : plane;
    for_rows(shape, [&](int64_t start, int64_t channel) {
      row(from + start, extra ? extra + start : nullptr, scale.data() + channel, shift.data() + channel,
          shape.columns, relu, to + start);
    });
  });
  return output;
}

std::tuple<Tensor, Tensor> frozen_batch_norm_backward(
    const Tensor& grad, const std::optional<Tensor>& output, const Tensor& var, const Tensor& weight, double eps,
    bool with_residual) {
  check_norm_map(grad, "grad");
  const Tensor values = output ? as_dense(*output) : as_dense(grad);
  check_norm_constant(var, values, "var");
  check_norm_constant(weight, values, "weight");
  const Tensor gradient = as_lies(grad, values, "grad");
  const ScalarType type = values.scalar_type(), constants = compute_type(type);
  Tensor grad_x = new_like(values);
  Tensor grad_residual =
      with_residual ? new_like(values) : torch::stable::new_empty(values, std::array<int64_t, 1>{0}, type);
  const NormShape shape(values);
  dispatch_floating(type, "grad", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using T = compute_t<scalar_t>;
    const auto scale = scales<T>(as_contiguous(var, constants), as_contiguous(weight, constants), eps);
    const scalar_t* from = gradient.const_data_ptr<scalar_t>();
    const scalar_t* mask = output ? values.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* to = grad_x.mutable_data_ptr<scalar_t>();
    scalar_t* rest = with_residual ? grad_residual.mutable_data_ptr<scalar_t>() : nullptr;
    const auto pixels =
        use_avx2() ? &avx2::norm_row_backward<true, scalar_t, T> : &baseline::norm_row_backward<true, scalar_t, T>;
    const auto plane =
        use_avx2() ? &avx2::norm_row_backward<false, scalar_t, T> : &baseline::norm_row_backward<false, scalar_t, T>;
    const auto row = shape.channels_last ? pixels : plane;
    for_rows(shape, [&](int64_t start, int64_t channel) {
      row(from + start, mask ? mask + start : nullptr, scale.data() + channel, shape.columns, to + start,
          rest ? rest + start : nullptr);
    });
  });
  return {grad_x, grad_residual};
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CPU, m) {
  m.impl("frozen_batch_norm", TORCH_BOX(&frozen_batch_norm));
  m.impl("frozen_batch_norm_backward", TORCH_BOX(&frozen_batch_norm_backward));
}

}  // namespace
}  // namespace detlib
