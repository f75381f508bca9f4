// What both devices' kernels of a frozen norm share: the arguments, checked and brought into one layout.
#pragma once

#include "stable.h"

namespace detlib {

// A map (N, C, H, W) as its memory has it: channels-last as rows of C elements, contiguous as N * C planes.
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

inline void check_norm_constant(const Tensor& constant, const Tensor& map, const char* name) {
  DETLIB_CHECK(
      constant.dim() == 1 && constant.size(0) == map.size(1), name, " must have shape (C,), one value a channel");
  DETLIB_CHECK(
      constant.is_cuda() == map.is_cuda() && constant.get_device_index() == map.get_device_index(), name,
      " must be on the device of the map");
}

// The map itself if it is dense in one of the two layouts, else a contiguous copy.
inline Tensor as_dense(const Tensor& map) {
  return map.is_contiguous() || is_channels_last(map) ? map : torch::stable::contiguous(map);
}

// `map` in the layout and dtype of `like`, which is dense; the same sizes.
inline Tensor as_lies(const Tensor& map, const Tensor& like, const char* name) {
  check_norm_map(map, name);
  const std::array<int64_t, 4> size{like.size(0), like.size(1), like.size(2), like.size(3)};
  for (int64_t i = 0; i < 4; ++i) {
    DETLIB_CHECK(map.size(i) == size[i], name, " must have the shape of the other maps");
  }
  DETLIB_CHECK(
      map.is_cuda() == like.is_cuda() && map.get_device_index() == like.get_device_index(), name,
      " must be on the device of the other maps");
  const bool channels_last = is_channels_last(like);
  if (map.scalar_type() == like.scalar_type() && (channels_last ? is_channels_last(map) : map.is_contiguous())) {
    return map;
  }
  Tensor copy = new_map(like, size, like.scalar_type(), channels_last);
  torch::stable::copy_(copy, map);
  return copy;
}

inline Tensor new_like(const Tensor& map) {
  return new_map(map, {map.size(0), map.size(1), map.size(2), map.size(3)}, map.scalar_type(), is_channels_last(map));
}

}  // namespace detlib
