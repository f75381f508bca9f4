// Intersection over union of two rotated boxes, for host and device. Types and conventions are in rotated_box.h.
//
// The second box is transformed to the frame of the first, where the first is |x| <= W, |y| <= H. There the area of the
// intersection is the integral over -W <= x <= W of the upper edge of the second box minus its lower edge, both clamped
// to [-H, H]. This is a sum of the same closed form over the four edges. No corner is classified and no polygon is
// built, so touching or coinciding edges, which break other algorithms, need no special case.
//
// There is no include guard: CPU files include this once per instruction set (see cpu/each_instruction_set.inc), each
// time in its own namespace and with DETLIB_TARGET set. V is double, or a vector of doubles with a pair of boxes per lane.

template <typename V>
DETLIB_TARGET DETLIB_GEOMETRY V rotated_clamp(const V& value, const V& low, const V& high) {
  const V raised = value > low ? value : low;
  return raised < high ? raised : high;
}

template <typename V>
DETLIB_TARGET DETLIB_GEOMETRY V rotated_abs(const V& value) {
  return value < 0 ? -value : value;
}

// Returns the integral of clamp(y, 0, top) dx along the part of an edge with |x| <= half. The edge starts at (x0, y0)
// and ends at x1; `slope` is dy/dx and `run` dx/dy, each 0 if it is not finite.
template <typename V>
DETLIB_TARGET DETLIB_GEOMETRY V
area_under_edge(const V& x0, const V& y0, const V& x1, const V& slope, const V& run, const V& half, const V& top) {
  const V zero = {};
  const V begin = rotated_clamp<V>(x0, -half, half), end = rotated_clamp<V>(x1, -half, half);
  const V left = begin < end ? begin : end, right = begin < end ? end : begin;
  const V y_begin = y0 + (begin - x0) * slope, y_end = y0 + (end - x0) * slope;
  // The clamped edge is linear except for two kinks, where y is 0 and where y is top.
  const V at_zero = rotated_clamp<V>(begin - y_begin * run, left, right);
  const V at_top = rotated_clamp<V>(begin + (top - y_begin) * run, left, right);
  const V first = y_end > y_begin ? at_zero : at_top, second = y_end > y_begin ? at_top : at_zero;
  const V value_begin = rotated_clamp<V>(y_begin, zero, top), value_end = rotated_clamp<V>(y_end, zero, top);
  const V value_first = rotated_clamp<V>(y0 + (first - x0) * slope, zero, top);
  const V value_second = rotated_clamp<V>(y0 + (second - x0) * slope, zero, top);
  return ((first - begin) * (value_begin + value_first) + (second - first) * (value_first + value_second) +
          (end - second) * (value_second + value_end)) *
      0.5;
}

template <typename V>
DETLIB_TARGET DETLIB_GEOMETRY V rotated_intersection(const RotatedBox<V>& a, const RotatedBox<V>& b) {
  const V zero = {};
  // The second box in the frame of the first: center (x, y), width along (cosine, -sine), height along (sine, cosine).
  const V cosine = a.cosine * b.cosine + a.sine * b.sine, sine = b.sine * a.cosine - b.cosine * a.sine;
  const V shift_x = b.x - a.x, shift_y = b.y - a.y;
  const V x = shift_x * a.cosine - shift_y * a.sine, y = shift_x * a.sine + shift_y * a.cosine;

  // Boxes are disjoint if they are disjoint along one of their four axes. Unlike the integral, this test is exact.
  const V c = rotated_abs<V>(cosine), s = rotated_abs<V>(sine);
  const V back_x = rotated_abs<V>(x * cosine - y * sine), back_y = rotated_abs<V>(x * sine + y * cosine);
  const V reach_x = a.half_width + b.half_width * c + b.half_height * s - rotated_abs<V>(x);
  const V reach_y = a.half_height + b.half_width * s + b.half_height * c - rotated_abs<V>(y);
  const V reach_back_x = b.half_width + a.half_width * c + a.half_height * s - back_x;
  const V reach_back_y = b.half_height + a.half_width * s + a.half_height * c - back_y;
  const V reach_a = reach_x < reach_y ? reach_x : reach_y;
  const V reach_b = reach_back_x < reach_back_y ? reach_back_x : reach_back_y;
  const V reach = reach_a < reach_b ? reach_a : reach_b;

  const V tangent = cosine == 0 ? zero : sine / cosine, cotangent = sine == 0 ? zero : cosine / sine;
  const V width_x = b.half_width * cosine, width_y = -b.half_width * sine;
  const V height_x = b.half_height * sine, height_y = b.half_height * cosine;
  const V x0 = x - width_x - height_x, y0 = y - width_y - height_y + a.half_height;
  const V x1 = x + width_x - height_x, y1 = y + width_y - height_y + a.half_height;
  const V x2 = x + width_x + height_x, y2 = y + width_y + height_y + a.half_height;
  const V x3 = x - width_x + height_x, y3 = y - width_y + height_y + a.half_height;
  const V top = a.half_height * 2;
  const V sum = area_under_edge<V>(x0, y0, x1, -tangent, -cotangent, a.half_width, top) +
      area_under_edge<V>(x1, y1, x2, cotangent, tangent, a.half_width, top) +
      area_under_edge<V>(x2, y2, x3, -tangent, -cotangent, a.half_width, top) +
      area_under_edge<V>(x3, y3, x0, cotangent, tangent, a.half_width, top);

  const V area_a = a.half_width * a.half_height * 4, area_b = b.half_width * b.half_height * 4;
  const V smaller = area_a < area_b ? area_a : area_b;
  return reach > 0 ? rotated_clamp<V>(-sum, zero, smaller) : zero;
}

// Both boxes must have a radius that is not nan.
template <typename V>
DETLIB_TARGET DETLIB_GEOMETRY V rotated_iou(const RotatedBox<V>& a, const RotatedBox<V>& b) {
  const V intersection = rotated_intersection<V>(a, b);
  const V areas = (a.half_width * a.half_height + b.half_width * b.half_height) * 4;
  return intersection / (areas - intersection);
}

// Returns whether the circles around two boxes meet, a cheap test that most pairs fail; false if a radius is nan.
DETLIB_TARGET DETLIB_GEOMETRY bool circles_meet(
    double x, double y, double radius, double other_x, double other_y, double other_radius) {
  const double dx = other_x - x, dy = other_y - y, reach = radius + other_radius;
  return dx * dx + dy * dy < reach * reach;
}
