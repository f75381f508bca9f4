// The one door to LibTorch: its stable ABI, the names used from it, and calls it has no wrapper for.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

// Turns a failed call across the border into an exception; torch 2.11 knows it by its older name.
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

// The type that sums are formed in: float for everything but double.
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

// The tensor itself if it is contiguous and of this dtype, else a copy that is.
inline Tensor as_contiguous(const Tensor& tensor, ScalarType type) {
  if (tensor.scalar_type() != type) {
    return torch::stable::contiguous(torch::stable::to(tensor, type));
  }
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Indices that sort a vector by falling value; equal values keep their order.
inline Tensor argsort_descending(const Tensor& values) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{
      from(values), from(std::optional<bool>(true)), from(int64_t{0}), from(true)};
  DETLIB_CALL(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);  // the sorted values, released
  return to<Tensor>(stack[1]);
}

// The elements of `values` where `mask` is true, as a vector. Waits for the device.
inline Tensor masked_select(const Tensor& values, const Tensor& mask) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(values), from(mask)};
  DETLIB_CALL(torch_call_dispatcher("aten::masked_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace detlib
