// The only header that includes LibTorch: the names used from its stable ABI, and calls that have no wrapper there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

// Converts a failed call of the C interface to an exception. torch 2.11 has the macro under an older name.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define DETLIB_CALL(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define DETLIB_CALL(call) TORCH_ERROR_CODE_CHECK(call)
#endif
#define DETLIB_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace detlib {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The compute type: double for double, else float.
template <typename scalar_t>
using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

inline ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename scalar_t>
struct Type {
  using type = scalar_t;
};

// Calls `body(Type<scalar_t>{})` for the C++ type behind a floating point dtype.
template <typename Body>
void dispatch_floating(ScalarType type, const char* argument, const Body& body) {
  switch (type) {
    case ScalarType::Double:
      return body(Type<double>{});
    case ScalarType::Float:
      return body(Type<float>{});
    case ScalarType::Half:
      return body(Type<Half>{});
    case ScalarType::BFloat16:
      return body(Type<BFloat16>{});
    default:
      DETLIB_CHECK(false, argument, " must be float64, float32, float16 or bfloat16");
  }
}

// Returns the tensor itself if it has this dtype, else a converted copy of the same layout.
inline Tensor as_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// Returns the tensor itself if it is contiguous and has this dtype, else a converted copy.
inline Tensor as_contiguous(const Tensor& tensor, ScalarType type) {
  const Tensor typed = as_type(tensor, type);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

// Returns whether a feature map (N, C, H, W) is stored as (N, H, W, C); false if it can be read as contiguous too.
inline bool is_channels_last(const Tensor& map) {
  int64_t stride = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (map.size(dim) != 1 && map.stride(dim) != stride) {
      return false;
    }
    stride *= map.size(dim);
  }
  return !map.is_contiguous();
}

// Returns an empty feature map (N, C, H, W) in a layout. It is not a view: autograd forbids in-place changes of views.
inline Tensor new_map(const Tensor& like, std::array<int64_t, 4> size, ScalarType type, bool channels_last) {
  const auto [images, channels, height, width] = size;
  const int64_t cells = std::max<int64_t>(height, 1) * std::max<int64_t>(width, 1), columns = std::max<int64_t>(width, 1);
  const int64_t depth = std::max<int64_t>(channels, 1);
  const std::array<int64_t, 4> strides = channels_last
      ? std::array<int64_t, 4>{cells * depth, 1, columns * depth, depth}
      : std::array<int64_t, 4>{cells * depth, cells, columns, 1};
  int32_t device_type = 0;
  DETLIB_CALL(aoti_torch_get_device_type(like.get(), &device_type));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle map = nullptr;
  DETLIB_CALL(aoti_torch_empty_strided(
      4, size.data(), strides.data(), dtype, device_type, like.get_device_index(), &map));
  return Tensor(map);
}

struct Sorted {
  Tensor values, indices;
};

// Sorts a vector stably; returns the values and their former indices.
inline Sorted stable_sort(const Tensor& values, bool descending) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{
      from(values), from(std::optional<bool>(true)), from(int64_t{0}), from(descending)};
  DETLIB_CALL(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// Returns the elements of a vector at the given indices.
inline Tensor index_select(const Tensor& values, const Tensor& indices) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(values), from(int64_t{0}), from(indices)};
  DETLIB_CALL(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Returns the elements of `values` where `mask` is true, as a vector. Synchronizes with the device.
inline Tensor masked_select(const Tensor& values, const Tensor& mask) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(values), from(mask)};
  DETLIB_CALL(torch_call_dispatcher("aten::masked_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace detlib
