// A rotated box in the form that rotated_iou.h needs, for host and device.
//
// Boxes are center x and y, width, height and an angle in degrees. In image coordinates, with y pointing down, the
// width is along (cos, -sin) and the height along (sin, cos) of the angle: positive angles are counter-clockwise.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DETLIB_GEOMETRY __host__ __device__ __forceinline__
#else
#define DETLIB_GEOMETRY inline __attribute__((always_inline))
#endif

namespace detlib {

// One box, or one box per lane if V is a vector. Always in double precision: float32 loses thin boxes.
template <typename V>
struct RotatedBox {
  V x, y, half_width, half_height, cosine, sine;
  V radius;  // of the circumscribed circle; nan if the box overlaps nothing and its other fields are unused
};

template <typename T>
DETLIB_GEOMETRY RotatedBox<double> rotated_box(const T* numbers) {
  const double width = static_cast<double>(numbers[2]), height = static_cast<double>(numbers[3]);
  const double degrees = static_cast<double>(numbers[4]);
  const double radians = fmod(degrees, 360.0) * (3.14159265358979323846 / 180);
  RotatedBox<double> box;
  box.x = static_cast<double>(numbers[0]);
  box.y = static_cast<double>(numbers[1]);
  box.half_width = width / 2;
  box.half_height = height / 2;
  box.cosine = cos(radians);
  box.sine = sin(radians);
  // x - x is 0 only for finite x.
  const double area = width * height, finite = (box.x - box.x) + (box.y - box.y) + (area - area) + (degrees - degrees);
  const bool valid = width > 0 && height > 0 && area > 0 && finite == 0;
  box.radius = valid ? sqrt(box.half_width * box.half_width + box.half_height * box.half_height) : NAN;
  return box;
}

}  // namespace detlib
