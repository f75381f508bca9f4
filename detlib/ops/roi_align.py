"""RoIAlign (He et al., Mask R-CNN, 2017): average of bilinear samples in the bins of each box.

Shape legend: N images, C channels, H and W of the feature map, K boxes, P and Q bins of a box (height,
width).

The average over the regular sampling grid of a bin is separable. Let `rows` (P, H) and `columns` (Q, W) be
the weights that the bins of a box give to rows and columns of the feature map. Then
`output = rows @ map @ columns.T` for every channel, and the gradient of the feature map is
`rows.T @ gradient @ columns`. The reference below and the compiled CPU kernel both use this.
"""

from collections.abc import Sequence

import torch

from detlib.ops._library import (
    check_positive,
    check_same_device,
    check_tensor,
    define,
    in_layout_of,
    memory_format_of,
    new_map,
    torchvision_ops,
)


def roi_align(
    input: torch.Tensor,
    boxes: torch.Tensor | Sequence[torch.Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> torch.Tensor:
    """Pool every box of a feature map to a fixed size by RoIAlign.

    A box is divided into P x Q bins. The value of a bin is the mean of bilinear samples on a regular grid
    inside it. Samples more than one cell outside the feature map are zero. `input` is differentiable, also
    twice, since the operator is linear in it; `boxes` are not.

    Args:
        input: (N, C, H, W) floating point. float16 and bfloat16 are summed in float32.
        boxes: (K, 5) floating point, `batch_index, x1, y1, x2, y2`, with `0 <= batch_index < N`; or one
            (K_i, 4) tensor of `x1, y1, x2, y2` for each image. A cell of the feature map has side
            `1 / spatial_scale` in the units of the boxes, usually pixels. The dtype may differ from `input`:
            keep float32 boxes for float16 feature maps, since float16 is too coarse for coordinates. A box
            that is not finite gives nan.
        output_size: P and Q, or one int for both.
        spatial_scale: factor from box coordinates to cells of the feature map, e.g. 1/16.
        sampling_ratio: samples per bin along each axis; with 0 or less, `ceil(box side in cells / bins)` for
            each box and axis.
        aligned: True puts cell centers at half-integers (detectron2's "ROIAlignV2"), so boxes are shifted by
            half a cell. False is Detectron's convention, where a box also covers at least one cell.

    Returns:
        (K, C, P, Q) of the dtype of `input`, in channels-last layout if `input` is, else contiguous. The
        gradient of `input` has the layout of `input` too.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    check_tensor("input", input, "(N, C, H, W)")
    if not isinstance(boxes, torch.Tensor):
        boxes = _with_batch_index(boxes, input)
    check_tensor("boxes", boxes, "(K, 5)")
    check_same_device("boxes", boxes, "input", input)
    if isinstance(output_size, Sequence) and len(output_size) != 2:
        raise ValueError(f"output_size must be an int or a pair of ints, got {output_size!r}")
    height, width = output_size if isinstance(output_size, Sequence) else (output_size, output_size)
    check_positive("output_size", height)
    check_positive("output_size", width)
    return _apply(input, boxes, spatial_scale, height, width, max(int(sampling_ratio), 0), aligned)


def _with_batch_index(boxes: Sequence[torch.Tensor], input: torch.Tensor) -> torch.Tensor:
    if len(boxes) != input.shape[0]:
        raise ValueError(f"boxes must have one tensor per image, got {len(boxes)} for {len(input)} images")
    for index, image_boxes in enumerate(boxes):
        check_tensor(f"boxes[{index}]", image_boxes, "(K, 4)")
    numbered = [torch.nn.functional.pad(b, (1, 0), value=float(index)) for index, b in enumerate(boxes)]
    return torch.cat(numbered) if numbered else input.new_empty((0, 5))


def _compute_dtype(input: torch.Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _axis_weights(
    start: torch.Tensor, extent: torch.Tensor, num_bins: int, size: int, sampling_ratio: int
) -> torch.Tensor:
    """Return the weights of the cells in each bin along one axis, (K, num_bins, size).

    Args:
        start, extent: (K,) start and length of the boxes in cells, finite.
        num_bins: number of bins along the axis.
        size: number of cells along the axis.
        sampling_ratio: samples per bin; 0 for `ceil(extent / num_bins)`.
    """
    bin_size = extent / num_bins
    count = torch.full_like(bin_size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil()
    count = count.clamp(min=0)
    step = bin_size / count.clamp(min=1)
    bins = torch.arange(num_bins, dtype=start.dtype, device=start.device)
    bin_start = start[:, None] + bins * bin_size[:, None]
    # Only samples in [-1, size] matter. A huge box has many others, which are skipped.
    forward = step.clamp(min=1e-12)
    first = ((-1 - bin_start) / forward[:, None]).floor().sub(1).clamp(min=0)
    in_range = torch.minimum(((size + 2) / forward).ceil() + 3, count)
    # An inverted box with a fixed number of samples: keep all samples.
    backward = step < 0
    first, in_range = first.masked_fill(backward[:, None], 0), torch.where(backward, count, in_range)
    max_count = int(in_range.max()) if count.numel() else 0
    sample = first[..., None] + torch.arange(max_count, dtype=start.dtype, device=start.device)
    position = bin_start[..., None] + (sample + 0.5) * step[:, None, None]
    valid = (position >= -1) & (position <= size) & (sample < count[:, None, None])
    position = position.clamp(min=0, max=size - 1)
    low = position.floor()
    fraction = position - low
    low = low.long()
    sample_weight = valid.to(start.dtype) / count.clamp(min=1)[:, None, None]
    weights = start.new_zeros((len(start), num_bins, size))
    weights.scatter_add_(2, low, (1 - fraction) * sample_weight)
    weights.scatter_add_(2, (low + 1).clamp(max=size - 1), fraction * sample_weight)
    return weights


def _span(weights: torch.Tensor) -> list[tuple[int, int]]:
    """Return the first and one-past-last cell that any bin of each box uses along the axis."""
    used = (weights != 0).any(dim=1).long()
    size = used.shape[1]
    begin = torch.where(used.any(dim=1), used.argmax(dim=1), 0)
    end = torch.where(used.any(dim=1), size - used.flip(1).argmax(dim=1), 0)
    return list(zip(begin.tolist(), end.tolist()))


def _box_weights(boxes, dtype, spatial_scale, pooled, size, sampling_ratio, aligned):
    """Yield index, image, feature map rows and columns, and weights (P, rows), (Q, columns) of each box.

    The weights are None for a box that is not finite.
    """
    boxes = boxes.to(dtype)
    finite = boxes.isfinite().all(dim=1)
    corners = boxes[:, 1:].where(finite[:, None], 0) * spatial_scale - (0.5 if aligned else 0.0)
    extent = corners[:, 2:] - corners[:, :2]
    if not aligned:
        extent = extent.clamp(min=1)
    rows = _axis_weights(corners[:, 1], extent[:, 1], pooled[0], size[0], sampling_ratio)
    columns = _axis_weights(corners[:, 0], extent[:, 0], pooled[1], size[1], sampling_ratio)
    images = boxes[:, 0].nan_to_num(0).long().tolist()
    spans = zip(images, finite.tolist(), _span(rows), _span(columns))
    for index, (image, is_finite, (top, bottom), (left, right)) in enumerate(spans):
        weights = (rows[index, :, top:bottom], columns[index, :, left:right]) if is_finite else None
        yield index, image, slice(top, bottom), slice(left, right), weights


def reference_roi_align(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    """Compute `roi_align` in plain PyTorch, by two small matrix products per box."""
    dtype = _compute_dtype(input)
    output = input.new_zeros((len(boxes), input.shape[1], pooled_height, pooled_width), dtype=dtype)
    if output.numel() and input.numel():
        _check_images(boxes, input.shape[0])
        pooled, size = (pooled_height, pooled_width), input.shape[2:]
        for index, image, rows, columns, weights in _box_weights(
            boxes, dtype, spatial_scale, pooled, size, sampling_ratio, aligned
        ):
            if weights is None:
                output[index] = torch.nan
            else:
                window = input[image, :, rows, columns].to(dtype)
                output[index] = weights[0] @ window @ weights[1].T
    return in_layout_of(input, output.to(input.dtype))


def reference_roi_align_backward(
    grad, boxes, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width,
    sampling_ratio, aligned, deterministic=False,
):  # fmt: skip
    """Compute the gradient of the feature map, (N, C, H, W), box by box, which is deterministic."""
    dtype = _compute_dtype(grad)
    grad_input = grad.new_zeros((batch_size, channels, height, width), dtype=dtype)
    if grad.numel() and grad_input.numel():
        _check_images(boxes, batch_size)
        pooled, size = (pooled_height, pooled_width), (height, width)
        for index, image, rows, columns, weights in _box_weights(
            boxes, dtype, spatial_scale, pooled, size, sampling_ratio, aligned
        ):
            if weights is not None:
                grad_input[image, :, rows, columns] += weights[0].T @ grad[index].to(dtype) @ weights[1]
    return in_layout_of(grad, grad_input.to(grad.dtype))


def _check_images(boxes: torch.Tensor, num_images: int) -> None:
    images = boxes[:, 0].nan_to_num(0)
    if int(images.min()) < 0 or int(images.max()) >= num_images:
        raise RuntimeError(
            f"boxes[:, 0] must be image indices in [0, {num_images}),"
            f" got {int(images.min())} to {int(images.max())}"
        )


def _fallback_is_reference(boxes: torch.Tensor, deterministic: bool = False) -> bool:
    """Return whether torchvision cannot be used.

    Its kernels fail on boxes that are inverted or not finite, and on CUDA they add in no fixed order.
    """
    if torchvision_ops()[0] is None or (deterministic and boxes.device.type == "cuda"):
        return True
    return not bool((boxes.isfinite().all(dim=1) & (boxes[:, 3:] >= boxes[:, 1:3]).all(dim=1)).all())


def _fallback_roi_align(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    if input.numel() == 0 or _fallback_is_reference(boxes):
        return reference_roi_align(
            input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned
        )
    if len(boxes):
        _check_images(boxes, input.shape[0])
    dtype = _compute_dtype(input)
    output = torch.ops.torchvision.roi_align(
        input.to(dtype), boxes.to(dtype), spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned
    )
    return in_layout_of(input, output.to(input.dtype))


def _fallback_roi_align_backward(
    grad, boxes, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width,
    sampling_ratio, aligned, deterministic=False,
):  # fmt: skip
    sizes = (pooled_height, pooled_width, batch_size, channels, height, width)
    if _fallback_is_reference(boxes, deterministic):
        return reference_roi_align_backward(grad, boxes, spatial_scale, *sizes, sampling_ratio, aligned)
    dtype = _compute_dtype(grad)
    grad_input = torch.ops.torchvision._roi_align_backward(
        grad.to(dtype), boxes.to(dtype), spatial_scale, *sizes, sampling_ratio, aligned
    )
    return in_layout_of(grad, grad_input.to(grad.dtype))


def _fake_roi_align(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    return new_map(input, boxes.shape[0], input.shape[1], pooled_height, pooled_width)


def _fake_roi_align_backward(
    grad, boxes, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width,
    sampling_ratio, aligned, deterministic=False,
):  # fmt: skip
    return new_map(grad, batch_size, channels, height, width)


def _save_forward(ctx, inputs, output):
    input, boxes, *scalars = inputs
    ctx.save_for_backward(boxes)
    ctx.input_size = input.shape
    ctx.layout = memory_format_of(input)
    ctx.scalars = scalars


def _backward(ctx, grad):
    (boxes,) = ctx.saved_tensors
    scale, height, width, *sampling = ctx.scalars
    # The kernels return the layout of `grad`, but the gradient must have the layout of `input`.
    grad = grad.contiguous(memory_format=ctx.layout)
    grad_input = _apply_backward(
        grad, boxes, scale, height, width, *ctx.input_size, *sampling,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return grad_input, None, None, None, None, None, None


def _save_backward(ctx, inputs, output):
    _, boxes, scale, height, width, _, _, _, _, *sampling, _ = inputs
    ctx.save_for_backward(boxes)
    ctx.scalars = (scale, height, width, *sampling)


def _double_backward(ctx, grad_grad_input):
    # The backward is linear in `grad`; its transpose is the forward.
    (boxes,) = ctx.saved_tensors
    return (torch.ops.detlib.roi_align(grad_grad_input, boxes, *ctx.scalars), *[None] * 11)


_apply = define(
    "roi_align",
    "(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width,"
    " int sampling_ratio, bool aligned) -> Tensor",
    fallback=_fallback_roi_align,
    fake=_fake_roi_align,
    backward=_backward,
    save=_save_forward,
    in_torchvision=True,
)
_apply_backward = define(
    "roi_align_backward",
    "(Tensor grad, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width,"
    " SymInt batch_size, SymInt channels, SymInt height, SymInt width, int sampling_ratio, bool aligned,"
    " bool deterministic=False) -> Tensor",
    fallback=_fallback_roi_align_backward,
    fake=_fake_roi_align_backward,
    backward=_double_backward,
    save=_save_backward,
    in_torchvision=True,
)
