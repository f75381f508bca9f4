// Batch normalisation by constants on CUDA, with what follows it in a residual network: a sum and a ReLU.
//
// One pass over memory, in packs of 16 bytes where rows divide into them. A thread stays with its channels, so it works
// their factors out once and needs no kernel before it.
#include <numeric>

#include "../common/cuda.cuh"
#include "../common/frozen_norm.h"

namespace detlib {
namespace {

constexpr int kPacksAThread = 4;

template <typename scalar_t, int size>
struct alignas(sizeof(scalar_t) * size) Pack {
  scalar_t values[size];
};

template <typename T>
struct Constants {
  const T *var, *weight, *mean, *bias;  // without `mean` and `bias` there is no shift
  T eps;

  __device__ __forceinline__ void load(int64_t channel, T& scale, T& shift) const {
    scale = T(1) / sqrt(var[channel] + eps) * weight[channel];
    shift = mean == nullptr ? T(0) : fma(-mean[channel], scale, bias[channel]);
  }
};

template <typename scalar_t, int size>
struct Forward {
  const scalar_t *x, *residual;
  scalar_t* output;
  bool relu;

  template <typename T>
  __device__ __forceinline__ void operator()(int64_t pack, const T* scale, const T* shift, int step) const {
    using Packed = Pack<scalar_t, size>;
    Packed values = reinterpret_cast<const Packed*>(x)[pack], added{};
    if (residual != nullptr) {
      added = reinterpret_cast<const Packed*>(residual)[pack];
    }
#pragma unroll
    for (int i = 0; i < size; ++i) {
      T value = fma(static_cast<T>(values.values[i]), scale[i * step], shift[i * step]);
      if (residual != nullptr) {
        value += static_cast<T>(added.values[i]);
      }
      values.values[i] = static_cast<scalar_t>(relu && value < T(0) ? T(0) : value);  // keeps NaN
    }
    reinterpret_cast<Packed*>(output)[pack] = values;
  }
};

template <typename scalar_t, int size>
struct Backward {
  const scalar_t *grad, *output;
  scalar_t *grad_x, *grad_residual;

  template <typename T>
  __device__ __forceinline__ void operator()(int64_t pack, const T* scale, const T*, int step) const {
    using Packed = Pack<scalar_t, size>;
    Packed values = reinterpret_cast<const Packed*>(grad)[pack], scaled;
    if (output != nullptr) {
      const Packed outputs = reinterpret_cast<const Packed*>(output)[pack];
#pragma unroll
      for (int i = 0; i < size; ++i) {
        values.values[i] = static_cast<T>(outputs.values[i]) <= T(0) ? scalar_t(0) : values.values[i];
      }
    }
#pragma unroll
    for (int i = 0; i < size; ++i) {
      scaled.values[i] = static_cast<scalar_t>(static_cast<T>(values.values[i]) * scale[i * step]);
    }
    reinterpret_cast<Packed*>(grad_x)[pack] = scaled;
    if (grad_residual != nullptr) {
      reinterpret_cast<Packed*>(grad_residual)[pack] = values;
    }
  }
};

// Rows of C elements. The number of threads is a multiple of the packs in a row.
template <int size, typename T, typename Work>
__global__ void __launch_bounds__(kThreads)
    pixels_kernel(int64_t total, int64_t packs_a_row, Constants<T> constants, Work work) {
  const int64_t first = thread_index();
  if (first >= total) {
    return;
  }
  T scale[size], shift[size];
#pragma unroll
  for (int i = 0; i < size; ++i) {
    constants.load(first % packs_a_row * size + i, scale[i], shift[i]);
  }
  for (int64_t pack = first; pack < total; pack += grid_size()) {
    work(pack, scale, shift, 1);
  }
}

// Rows that are planes of one channel, `blocks_a_row` blocks each.
template <typename T, typename Work>
__global__ void __launch_bounds__(kThreads) planes_kernel(
    int64_t packs_a_row, int64_t blocks_a_row, int64_t channels, Constants<T> constants, Work work) {
  const int64_t row = blockIdx.x / blocks_a_row, part = blockIdx.x % blocks_a_row;
  T scale, shift;
  constants.load(row % channels, scale, shift);
  for (int64_t i = part * kThreads + threadIdx.x; i < packs_a_row; i += blocks_a_row * kThreads) {
    work(row * packs_a_row + i, &scale, &shift, 0);
  }
}

template <int size, typename T, typename Work>
void launch(const Tensor& map, const NormShape& shape, const Constants<T>& constants, const Work& work) {
  const int64_t packs = shape.columns / size, total = packs * shape.rows;
  const cudaStream_t stream = current_stream(map);
  constexpr int64_t block = kThreads * kPacksAThread;
  if (shape.channels_last) {
    const int64_t unit = packs / std::gcd<int64_t>(packs, kThreads);
    const int64_t wanted = std::min<int64_t>((total + block - 1) / block, 1 << 20);
    const auto grid = static_cast<unsigned int>((wanted + unit - 1) / unit * unit);
    pixels_kernel<size, T><<<grid, kThreads, 0, stream>>>(total, packs, constants, work);
  } else {
    const int64_t blocks = (packs + block - 1) / block;
    DETLIB_CHECK(blocks * shape.rows < (int64_t{1} << 31), "frozen_batch_norm: the map has too many planes");
    const auto grid = static_cast<unsigned int>(blocks * shape.rows);
    planes_kernel<T><<<grid, kThreads, 0, stream>>>(packs, blocks, shape.channels, constants, work);
  }
  check_launch("frozen_batch_norm");
}

template <typename... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <typename scalar_t>
const scalar_t* data_or_null(const std::optional<Tensor>& map) {
  return map ? map->const_data_ptr<scalar_t>() : nullptr;
}

Tensor frozen_batch_norm(
    const Tensor& input, const std::optional<Tensor>& residual, const Tensor& mean, const Tensor& var,
    const Tensor& weight, const Tensor& bias, double eps, bool relu) {
  check_norm_map(input, "x");
  const ScalarType type = input.scalar_type(), constants_type = compute_type(type);
  for (const auto& [constant, name] : {std::pair{&mean, "mean"}, {&var, "var"}, {&weight, "weight"}, {&bias, "bias"}}) {
    check_norm_constant(*constant, input, name);
  }
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = as_dense(input);
  const std::optional<Tensor> added = residual ? std::optional(as_lies(*residual, x, "residual")) : std::nullopt;
  Tensor output = new_like(x);
  if (output.numel() == 0) {
    return output;
  }
  const Tensor m = as_contiguous(mean, constants_type), v = as_contiguous(var, constants_type);
  const Tensor w = as_contiguous(weight, constants_type), b = as_contiguous(bias, constants_type);
  const NormShape shape(x);
  dispatch_floating(type, "x", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using T = compute_t<scalar_t>;
    constexpr int size = 16 / sizeof(scalar_t);
    const Constants<T> constants{
        v.const_data_ptr<T>(), w.const_data_ptr<T>(), m.const_data_ptr<T>(), b.const_data_ptr<T>(),
        static_cast<T>(eps)};
    const scalar_t *from = x.const_data_ptr<scalar_t>(), *extra = data_or_null<scalar_t>(added);
    scalar_t* to = output.mutable_data_ptr<scalar_t>();
    if (shape.columns % size == 0 && aligned(from, extra, to)) {
      launch<size>(x, shape, constants, Forward<scalar_t, size>{from, extra, to, relu});
    } else {
      launch<1>(x, shape, constants, Forward<scalar_t, 1>{from, extra, to, relu});
    }
  });
  return output;
}

std::tuple<Tensor, Tensor> frozen_batch_norm_backward(
    const Tensor& grad, const std::optional<Tensor>& output, const Tensor& var, const Tensor& weight, double eps,
    bool with_residual) {
  check_norm_map(grad, "grad");
  const DeviceGuard guard(grad.get_device_index());
  const Tensor values = as_dense(output ? *output : grad);
  check_norm_constant(var, values, "var");
  check_norm_constant(weight, values, "weight");
  const Tensor gradient = as_lies(grad, values, "grad");
  const ScalarType type = values.scalar_type(), constants_type = compute_type(type);
  Tensor grad_x = new_like(values);
  Tensor grad_residual =
      with_residual ? new_like(values) : torch::stable::new_empty(values, std::array<int64_t, 1>{0}, type);
  if (values.numel() == 0) {
    return {grad_x, grad_residual};
  }
  const Tensor v = as_contiguous(var, constants_type), w = as_contiguous(weight, constants_type);
  const NormShape shape(values);
  dispatch_floating(type, "grad", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using T = compute_t<scalar_t>;
    constexpr int size = 16 / sizeof(scalar_t);
    const Constants<T> constants{
        v.const_data_ptr<T>(), w.const_data_ptr<T>(), nullptr, nullptr, static_cast<T>(eps)};
    const scalar_t* from = gradient.const_data_ptr<scalar_t>();
    const scalar_t* mask = output ? values.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* to = grad_x.mutable_data_ptr<scalar_t>();
    scalar_t* rest = with_residual ? grad_residual.mutable_data_ptr<scalar_t>() : nullptr;
    if (shape.columns % size == 0 && aligned(from, mask, to, rest)) {
      launch<size>(values, shape, constants, Backward<scalar_t, size>{from, mask, to, rest});
    } else {
      launch<1>(values, shape, constants, Backward<scalar_t, 1>{from, mask, to, rest});
    }
  });
  return {grad_x, grad_residual};
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CUDA, m) {
  m.impl("frozen_batch_norm", TORCH_BOX(&frozen_batch_norm));
  m.impl("frozen_batch_norm_backward", TORCH_BOX(&frozen_batch_norm_backward));
}

}  // namespace
}  // namespace detlib
