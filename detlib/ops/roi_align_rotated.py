"""RoIAlign of rotated boxes (He et al., Mask R-CNN, 2017; rotated as in Ma et al., RRPN, 2018).

Shape legend: N images, C channels, H and W of the feature map, K boxes, P and Q bins of a box (height,
width), S samples of a bin.
"""

import math
from collections.abc import Callable, Sequence

import torch

from detlib.ops._library import check_positive, check_same_device, check_tensor, define


def roi_align_rotated(
    input: torch.Tensor,
    boxes: torch.Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> torch.Tensor:
    """Pool every rotated box of a feature map to a fixed size.

    A box is divided into P x Q bins along its own axes. The value of a bin is the mean of bilinear samples on
    a regular grid inside it. Samples more than one cell outside the feature map are zero. Cell centers are at
    half-integers, so boxes are shifted by half a cell, as in `roi_align(aligned=True)`. `input` is
    differentiable, also twice, since the operator is linear in it; `boxes` are not.

    Args:
        input: (N, C, H, W) floating point. float16 and bfloat16 are summed in float32.
        boxes: (K, 6) floating point, `batch_index, center x, center y, width, height, angle`, with
            `0 <= batch_index < N` and the angle in degrees, counter-clockwise. A cell of the feature map has
            side `1 / spatial_scale` in the units of the boxes, usually pixels. The dtype may differ from
            `input`: keep float32 boxes for float16 feature maps. A box that is not finite gives nan.
        output_size: P and Q, or one int for both.
        spatial_scale: factor from box coordinates to cells of the feature map, e.g. 1/16.
        sampling_ratio: samples per bin along each axis; with 0 or less, `ceil(box side in cells / bins)` for
            each box and axis, so that a box of zero or negative size gives 0.

    Returns:
        (K, C, P, Q), contiguous, of the dtype of `input`.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    check_tensor("input", input, "(N, C, H, W)")
    check_tensor("boxes", boxes, "(K, 6)")
    check_same_device("boxes", boxes, "input", input)
    if isinstance(output_size, Sequence) and len(output_size) != 2:
        raise ValueError(f"output_size must be an int or a pair of ints, got {output_size!r}")
    height, width = output_size if isinstance(output_size, Sequence) else (output_size, output_size)
    check_positive("output_size", height)
    check_positive("output_size", width)
    return _apply(input, boxes.detach(), spatial_scale, height, width, max(int(sampling_ratio), 0))


def _compute_dtype(input: torch.Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _positions(extent: torch.Tensor, num_bins: int, sampling_ratio: int, middle: float, radius: float):
    """Return the samples of a box along one axis that are at most `radius` from the feature map's center.

    Args:
        extent: () side of the box in cells.
        num_bins: number of bins along the axis.
        sampling_ratio: samples per bin; 0 for `ceil(extent / num_bins)`.
        middle: position of the feature map's center along the axis, from the center of the box.
        radius: radius of a circle around the entire feature map, in cells.

    Returns:
        positions (S',) from the center of the box, their bins (S',), and the number of samples per bin.
    """
    bin_size = extent / num_bins
    count = sampling_ratio if sampling_ratio > 0 else max(math.ceil(float(bin_size)), 0)
    step = float(bin_size) / max(count, 1)
    bins, samples = [], []
    for index in range(num_bins):
        first, last = 0, count
        if step > 0 and count > 4:
            start = float(-extent / 2 + index * bin_size)
            first = min(max(math.floor((middle - radius - start) / step) - 1, 0), count)
            last = min(max(math.ceil((middle + radius - start) / step) + 1, first), count)
        samples.append(torch.arange(first, last, dtype=extent.dtype, device=extent.device))
        bins.append(torch.full_like(samples[-1], index))
    index, sample = torch.cat(bins), torch.cat(samples)
    positions = -extent / 2 + index * bin_size + (sample + 0.5) * bin_size / max(count, 1)
    return positions, index.long(), count


def _taps(box: torch.Tensor, spatial_scale: float, pooled: tuple[int, int], size, sampling_ratio: int):
    """Return the cells that one box reads: bins, cells of the flattened feature map, and weights, (T,) each.

    Args:
        box: (5,) finite, center, sides and angle.
        size: H and W.
    """
    height, width = size
    x, y, box_width, box_height = (box[:4] * spatial_scale).unbind()
    x, y, radians = x - 0.5, y - 0.5, box[4] * (math.pi / 180)
    cosine, sine = radians.cos(), radians.sin()
    to_x, to_y = width / 2 - float(x), height / 2 - float(y)
    radius = math.hypot(height, width) / 2 + 2
    along = to_x * float(cosine) - to_y * float(sine), to_x * float(sine) + to_y * float(cosine)
    columns, column_bins, num_columns = _positions(box_width, pooled[1], sampling_ratio, along[0], radius)
    rows, row_bins, num_rows = _positions(box_height, pooled[0], sampling_ratio, along[1], radius)
    xs = (rows[:, None] * sine + columns * cosine + x).flatten()
    ys = (rows[:, None] * cosine - columns * sine + y).flatten()
    bins = (row_bins[:, None] * pooled[1] + column_bins).flatten()
    inside = (xs >= -1) & (xs <= width) & (ys >= -1) & (ys <= height)
    xs, ys, bins = xs[inside].clamp(0, width - 1), ys[inside].clamp(0, height - 1), bins[inside]
    left, top = xs.floor(), ys.floor()
    x_weight, y_weight = xs - left, ys - top
    left, top = left.long(), top.long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    cells = [top * width + left, top * width + right, bottom * width + left, bottom * width + right]
    weights = [
        (1 - y_weight) * (1 - x_weight), (1 - y_weight) * x_weight,
        y_weight * (1 - x_weight), y_weight * x_weight,
    ]  # fmt: skip
    return bins.repeat(4), torch.cat(cells), torch.cat(weights) / max(num_rows * num_columns, 1)


def _taps_of_boxes(boxes, dtype, spatial_scale, pooled, size, sampling_ratio):
    """Yield index, image and taps of each box; the taps are None for a box that is not finite."""
    boxes = boxes.to(dtype)
    finite = boxes.isfinite().all(dim=1).tolist()
    images = boxes[:, 0].nan_to_num(0).long().tolist()
    for index, (image, is_finite) in enumerate(zip(images, finite)):
        box = boxes[index, 1:]
        yield index, image, _taps(box, spatial_scale, pooled, size, sampling_ratio) if is_finite else None


def reference_roi_align_rotated(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio):
    """Compute `roi_align_rotated` in plain PyTorch, box by box."""
    dtype, pooled = _compute_dtype(input), (pooled_height, pooled_width)
    output = input.new_zeros((len(boxes), input.shape[1], pooled_height * pooled_width), dtype=dtype)
    if output.numel() and input.numel():
        _check_images(boxes, input.shape[0])
        for index, image, taps in _taps_of_boxes(
            boxes, dtype, spatial_scale, pooled, input.shape[2:], sampling_ratio
        ):
            if taps is None:
                output[index] = torch.nan
                continue
            bins, cells, weights = taps
            output[index].index_add_(1, bins, input[image].flatten(1)[:, cells].to(dtype) * weights)
    return output.to(input.dtype).unflatten(2, pooled)


def reference_roi_align_rotated_backward(
    grad,
    boxes,
    spatial_scale,
    pooled_height,
    pooled_width,
    batch_size,
    channels,
    height,
    width,
    sampling_ratio,
):
    """Compute the gradient of the feature map, (N, C, H, W), box by box, which is deterministic."""
    dtype, pooled, size = _compute_dtype(grad), (pooled_height, pooled_width), (height, width)
    grad_input = grad.new_zeros((batch_size, channels, height * width), dtype=dtype)
    if grad.numel() and grad_input.numel():
        _check_images(boxes, batch_size)
        for index, image, taps in _taps_of_boxes(boxes, dtype, spatial_scale, pooled, size, sampling_ratio):
            if taps is not None:
                bins, cells, weights = taps
                grad_input[image].index_add_(1, cells, grad[index].flatten(1)[:, bins].to(dtype) * weights)
    return grad_input.to(grad.dtype).unflatten(2, size)


def _check_images(boxes: torch.Tensor, num_images: int) -> None:
    images = boxes[:, 0].nan_to_num(0)
    if int(images.min()) < 0 or int(images.max()) >= num_images:
        raise RuntimeError(
            f"boxes[:, 0] must be image indices in [0, {num_images}),"
            f" got {int(images.min())} to {int(images.max())}"
        )


def _fake_roi_align(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio):
    return input.new_empty((boxes.shape[0], input.shape[1], pooled_height, pooled_width))


def _fake_roi_align_backward(
    grad,
    boxes,
    spatial_scale,
    pooled_height,
    pooled_width,
    batch_size,
    channels,
    height,
    width,
    sampling_ratio,
):
    return grad.new_empty((batch_size, channels, height, width))


def _save_forward(ctx, inputs, output):
    input, boxes, *scalars = inputs
    ctx.save_for_backward(boxes)
    ctx.input_size = input.shape
    ctx.scalars = scalars


def _backward(ctx, grad):
    (boxes,) = ctx.saved_tensors
    scale, height, width, sampling_ratio = ctx.scalars
    operator: Callable = _apply_backward
    if grad.is_cuda and torch.are_deterministic_algorithms_enabled():
        operator = reference_roi_align_rotated_backward  # the CUDA kernel adds in no fixed order
    grad_input = operator(grad, boxes, scale, height, width, *ctx.input_size, sampling_ratio)
    return grad_input, None, None, None, None, None


def _save_backward(ctx, inputs, output):
    _, boxes, scale, height, width, *_, sampling_ratio = inputs
    ctx.save_for_backward(boxes)
    ctx.scalars = (scale, height, width, sampling_ratio)


def _double_backward(ctx, grad_grad_input):
    # The backward is linear in `grad`; its transpose is the forward.
    (boxes,) = ctx.saved_tensors
    return (torch.ops.detlib.roi_align_rotated(grad_grad_input, boxes, *ctx.scalars), *[None] * 9)


_apply = define(
    "roi_align_rotated",
    "(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width,"
    " int sampling_ratio) -> Tensor",
    fallback=reference_roi_align_rotated,
    fake=_fake_roi_align,
    backward=_backward,
    save=_save_forward,
)
_apply_backward = define(
    "roi_align_rotated_backward",
    "(Tensor grad, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width,"
    " SymInt batch_size, SymInt channels, SymInt height, SymInt width, int sampling_ratio) -> Tensor",
    fallback=reference_roi_align_rotated_backward,
    fake=_fake_roi_align_backward,
    backward=_double_backward,
    save=_save_backward,
)
