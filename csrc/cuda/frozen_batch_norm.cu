// Frozen batch norm on CUDA, fused with the residual sum and the ReLU that follow it in a residual network.
//
// One pass over memory, in packs of 16 bytes if rows can be divided into them. A thread keeps its channels, so it
// computes their scale and shift once, and no other kernel has to run before.
#include <numeric>

#include "../common/cuda.cuh"
#include "../common/frozen_batch_norm.h"

namespace detlib {
namespace {

constexpr int kPacksAThread = 4;

template <typename scalar_t, int size>
struct alignas(sizeof(scalar_t) * size) Pack {
  scalar_t values[size];
};

template <typename T>
struct Constants {
  const T *var, *weight, *mean, *bias;  // without `mean` and `bias`, there is no shift
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

// Channels-last: rows of C elements. The number of threads is a multiple of the packs in a row.
template <int size, typename T, typename Work>
__global__ void __launch_bounds__(kThreads)
    pixels_kernel(int64_t total, int64_t packs_per_row, Constants<T> constants, Work work) {
  const int64_t first = thread_index();
  if (first >= total) {
    return;
  }
  T scale[size], shift[size];
#pragma unroll
  for (int i = 0; i < size; ++i) {
    constants.load(first % packs_per_row * size + i, scale[i], shift[i]);
  }
  for (int64_t pack = first; pack < total; pack += grid_size()) {
    work(pack, scale, shift, 1);
  }
}

// Contiguous: rows are planes of one channel, with `blocks_per_row` blocks each.
template <typename T, typename Work>
__global__ void __launch_bounds__(kThreads) planes_kernel(
    int64_t packs_per_row, int64_t blocks_per_row, int64_t channels, Constants<T> constants, Work work) {
  const int64_t row = blockIdx.x / blocks_per_row, part = blockIdx.x % blocks_per_row;
  T scale, shift;
  constants.load(row % channels, scale, shift);
  for (int64_t i = part * kThreads + threadIdx.x; i < packs_per_row; i += blocks_per_row * kThreads) {
    work(row * packs_per_row + i, &scale, &shift, 0);
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
    DETLIB_CHECK(blocks * shape.rows < (int64_t{1} << 31), "frozen_batch_norm: the feature map has too many planes");
    const auto grid = static_cast<unsigned int>(blocks * shape.rows);
    planes_kernel<T><<<grid, kThreads, 0, stream>>>(packs, blocks, shape.channels, constants, work);
  }
  check_launch("frozen_batch_norm");
}

// Uses packs of 16 bytes if rows can be divided into them and all feature maps begin at a multiple of 16 bytes.
template <template <typename, int> typename Work, typename scalar_t, typename T, typename... Arguments>
void launch_in_packs(const Tensor& map, const Constants<T>& constants, bool aligned, Arguments... arguments) {
  constexpr int size = 16 / sizeof(scalar_t);
  const NormShape shape(map);
  if (aligned && shape.columns % size == 0) {
    launch<size>(map, shape, constants, Work<scalar_t, size>{arguments...});
  } else {
    launch<1>(map, shape, constants, Work<scalar_t, 1>{arguments...});
  }
}

template <typename... Pointers>
bool are_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

Tensor frozen_batch_norm(
    const Tensor& x, const std::optional<Tensor>& residual, const Tensor& mean, const Tensor& var, const Tensor& weight,
    const Tensor& bias, double eps, bool relu) {
  const DeviceGuard guard(x.get_device_index());
  const NormForward a(x, residual, mean, var, weight, bias);
  if (a.output.numel() == 0) {
    return a.output;
  }
  dispatch_floating(a.x.scalar_type(), "x", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using T = compute_t<scalar_t>;
    const Constants<T> constants{
        a.var.const_data_ptr<T>(), a.weight.const_data_ptr<T>(), a.mean.const_data_ptr<T>(),
        a.bias.const_data_ptr<T>(), static_cast<T>(eps)};
    const scalar_t *from = a.x.const_data_ptr<scalar_t>(), *extra = data_or_null<scalar_t>(a.residual);
    scalar_t* to = a.output.mutable_data_ptr<scalar_t>();
    launch_in_packs<Forward, scalar_t>(a.x, constants, are_aligned(from, extra, to), from, extra, to, relu);
  });
  return a.output;
}

std::tuple<Tensor, Tensor> frozen_batch_norm_backward(
    const Tensor& grad, const std::optional<Tensor>& output, const Tensor& var, const Tensor& weight, double eps,
    bool with_residual) {
  const DeviceGuard guard(grad.get_device_index());
  const NormBackward a(grad, output, var, weight, with_residual);
  if (a.grad.numel() == 0) {
    return a.results();
  }
  dispatch_floating(a.grad.scalar_type(), "grad", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using T = compute_t<scalar_t>;
    const Constants<T> constants{
        a.var.const_data_ptr<T>(), a.weight.const_data_ptr<T>(), nullptr, nullptr, static_cast<T>(eps)};
    const scalar_t *from = a.grad.const_data_ptr<scalar_t>(), *mask = data_or_null<scalar_t>(a.output);
    scalar_t *to = a.grad_x.mutable_data_ptr<scalar_t>(), *rest = a.residual_data<scalar_t>();
    launch_in_packs<Backward, scalar_t>(a.grad, constants, are_aligned(from, mask, to, rest), from, mask, to, rest);
  });
  return a.results();
}

STABLE_TORCH_LIBRARY_IMPL(detlib, CUDA, m) {
  m.impl("frozen_batch_norm", TORCH_BOX(&frozen_batch_norm));
  m.impl("frozen_batch_norm_backward", TORCH_BOX(&frozen_batch_norm_backward));
}

}  // namespace
}  // namespace detlib
