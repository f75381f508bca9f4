// RoIAlign's kernels on the CPU, one pair for each layout; align.cpp has the preconditions.
#pragma once

#include "../../common/stable.h"
#include "taps.h"

namespace detlib {

void roi_align_planes(const Tensor& input, const Tensor& boxes, const RoiAlignShape& shape, Tensor& output);
void roi_align_planes_backward(const Tensor& grad, const Tensor& boxes, const RoiAlignShape& shape, Tensor& output);

// float32 and float64 only.
void roi_align_channels_last(const Tensor& input, const Tensor& boxes, const RoiAlignShape& shape, Tensor& output);
void roi_align_channels_last_backward(
    const Tensor& grad, const Tensor& boxes, const RoiAlignShape& shape, Tensor& output);

}  // namespace detlib
