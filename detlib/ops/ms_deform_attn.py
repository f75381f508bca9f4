"""Multi-scale deformable attention (Zhu et al., Deformable DETR, 2020, arXiv:2010.04159, equation 3).

Shape legend: N images, S cells of all levels together, M heads, D channels of a head, L levels, Q queries, P
points that a query samples on each level.
"""

import torch
from torch.nn import functional as F

from detlib.ops._bilinear import sample_bilinear
from detlib.ops._library import check_same_device, check_tensor, define

_SHAPES = {
    "value": "(N, S, M, D)",
    "spatial_shapes": "(L, 2)",
    "level_start_index": "(L)",
    "sampling_locations": "(N, Q, M, L, P, 2)",
    "attention_weights": "(N, Q, M, L, P)",
}
# Dimensions that must be equal, by letter, as (tensor, dimension). The first one defines the size.
_EQUAL_SIZES = {
    "N": (("value", 0), ("sampling_locations", 0), ("attention_weights", 0)),
    "M": (("value", 2), ("sampling_locations", 2), ("attention_weights", 2)),
    "L": (
        ("spatial_shapes", 0),
        ("level_start_index", 0),
        ("sampling_locations", 3),
        ("attention_weights", 3),
    ),
    "Q": (("sampling_locations", 1), ("attention_weights", 1)),
    "P": (("sampling_locations", 4), ("attention_weights", 4)),
}


def ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """Sum weighted samples of multiple feature maps, the core of multi-scale deformable attention.

    The result of head m of query q is the sum over levels l and points p of
    `attention_weights[n, q, m, l, p]` times the bilinear sample of head m of level l at
    `sampling_locations[n, q, m, l, p]`. Cells outside a feature map are zero. `value`, `sampling_locations`
    and `attention_weights` are differentiable, twice.

    Args:
        value: (N, S, M, D) floating point, the cells of all levels in order, each level in row-major order.
            float16 and bfloat16 are summed in float32.
        spatial_shapes: (L, 2) integers, height and width of each level, with S cells in total.
        level_start_index: (L,) integers, index of the first cell of each level among the S cells.
        sampling_locations: (N, Q, M, L, P, 2) floating point, x and y as fractions of the level's width and
            height: (0, 0) is the top left corner of the feature map, (1, 1) its bottom right corner, and
            (0.5 / width, 0.5 / height) the center of the first cell. The dtype may differ from `value`: keep
            float32 locations for float16 values. A location or weight that is not finite gives nan.
        attention_weights: (N, Q, M, L, P) floating point of any dtype, usually the softmax over L x P.

    Returns:
        (N, Q, M * D), contiguous, of the dtype of `value`.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype or device does not fit; the message names the argument. On CUDA the values
            of `spatial_shapes` and `level_start_index` are not compared with S, which would synchronize; a
            level that is not inside the S cells gives nan there.
    """
    arguments = {
        "value": value,
        "spatial_shapes": spatial_shapes,
        "level_start_index": level_start_index,
        "sampling_locations": sampling_locations,
        "attention_weights": attention_weights,
    }
    _check(arguments)
    return _apply(*arguments.values())


def _check(arguments: dict[str, torch.Tensor]) -> None:
    for name, tensor in arguments.items():
        integers = name in ("spatial_shapes", "level_start_index")
        check_tensor(name, tensor, _SHAPES[name], floating=not integers)
        if integers and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise ValueError(f"{name} must be integers, got {tensor.dtype}")
        check_same_device(name, tensor, "value", arguments["value"])
    if torch.compiler.is_compiling():
        return  # sizes and values may be unknown
    for letter, dimensions in _EQUAL_SIZES.items():
        first, *others = dimensions
        expected = arguments[first[0]].shape[first[1]]
        for name, dimension in others:
            if arguments[name].shape[dimension] != expected:
                raise ValueError(
                    f"{name} must have shape {_SHAPES[name]} with {letter} = {expected}, as {first[0]},"
                    f" got {tuple(arguments[name].shape)}"
                )
    if arguments["value"].device.type == "cpu":
        _check_levels(arguments)


def _check_levels(arguments: dict[str, torch.Tensor]) -> None:
    shapes = arguments["spatial_shapes"].tolist()
    total, starts = 0, []
    for height, width in shapes:
        starts.append(total)
        total += height * width
    if min((min(shape) for shape in shapes), default=0) < 0 or total != arguments["value"].shape[1]:
        raise ValueError(
            f"spatial_shapes must add up to the {arguments['value'].shape[1]} cells of value, got {shapes}"
        )
    if arguments["level_start_index"].tolist() != starts:
        raise ValueError(
            f"level_start_index must be {starts} for these spatial_shapes,"
            f" got {arguments['level_start_index'].tolist()}"
        )


def _compute_dtype(value: torch.Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _levels(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    """Yield index, first cell, height, width, locations and weights of each level that has cells.

    Locations (N * M, Q, P, 2) and weights (N * M, Q, P) have the dtype of the sums.
    """
    dtype = _compute_dtype(value)
    locations = sampling_locations.to(dtype).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    weights = attention_weights.to(dtype).permute(3, 0, 2, 1, 4).flatten(1, 2)
    starts = level_start_index.tolist()
    for index, (height, width) in enumerate(spatial_shapes.tolist()):
        if height * width > 0:
            yield index, starts[index], height, width, locations[index], weights[index]


def _map_and_grid(value, start, height, width, locations):
    """Return a level as feature maps (N * M, D, height, width), and the grid for `grid_sample`."""
    cells = value[:, start : start + height * width].to(locations.dtype)
    maps = cells.permute(0, 2, 3, 1).reshape(-1, value.shape[3], height, width)
    # Below -1 and above 2, samples do not reach the feature map; larger numbers would overflow an index.
    return maps, 2 * locations.nan_to_num(-1, 2, -1).clamp(-1, 2) - 1


def _is_empty(value, attention_weights):
    return value.numel() == 0 or attention_weights.numel() == 0


def reference_ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    """Compute the operator in plain PyTorch, with `grid_sample`."""
    dtype = _compute_dtype(value)
    num_images, num_queries, num_heads = attention_weights.shape[:3]
    # Zero, or nan if a location or weight is not finite.
    output = (sampling_locations.to(dtype) * 0).sum((3, 4, 5)) + (attention_weights.to(dtype) * 0).sum((3, 4))
    output = output.permute(0, 2, 1)[:, :, None].expand(-1, -1, value.shape[3], -1)
    if not _is_empty(value, attention_weights):
        arguments = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
        for _, start, height, width, locations, weights in _levels(*arguments):
            maps, grid = _map_and_grid(value, start, height, width, locations)
            samples = F.grid_sample(maps, grid, "bilinear", "zeros", align_corners=False)
            samples = (samples * weights[:, None]).sum(3)
            output = output + samples.view(num_images, num_heads, -1, num_queries)
    return output.permute(0, 3, 1, 2).flatten(2).to(value.dtype).contiguous()


def reference_ms_deform_attn_backward(
    grad, value, spatial_shapes, level_start_index, sampling_locations, attention_weights
):
    """Compute the gradients of values, locations and weights in plain PyTorch, with `grid_sample`."""
    dtype = _compute_dtype(value)
    grad_value = value.new_zeros(value.shape, dtype=dtype)
    grad_locations = sampling_locations.new_zeros(sampling_locations.shape, dtype=dtype)
    grad_weights = attention_weights.new_zeros(attention_weights.shape, dtype=dtype)
    if not _is_empty(value, attention_weights):
        num_images, num_queries, num_heads, _, num_points = attention_weights.shape
        by_head = (num_images, num_heads, num_queries, num_points)
        grad = grad.to(dtype).unflatten(2, (num_heads, -1)).permute(0, 2, 3, 1).flatten(0, 1)[..., None]
        arguments = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
        for level, start, height, width, locations, weights in _levels(*arguments):
            maps, grid = _map_and_grid(value, start, height, width, locations)
            samples = F.grid_sample(maps, grid, "bilinear", "zeros", align_corners=False)
            grad_weights[:, :, :, level] = (samples * grad).sum(1).view(by_head).transpose(1, 2)
            grad_maps, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
                grad * weights[:, None], maps, grid, 0, 0, False, [True, True]
            )
            grad_maps = grad_maps.view(num_images, num_heads, -1, height * width)
            grad_value[:, start : start + height * width] = grad_maps.permute(0, 3, 1, 2)
            grad_locations[:, :, :, level] = 2 * grad_grid.view(*by_head, 2).transpose(1, 2)
    return (
        grad_value.to(value.dtype),
        grad_locations.to(sampling_locations.dtype),
        grad_weights.to(attention_weights.dtype),
    )


def _indexed_ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    """Compute the operator by indexing, for second derivatives and for deterministic sums on CUDA."""
    dtype = _compute_dtype(value)
    rows = value.to(dtype).transpose(1, 2).flatten(0, 1)
    heights, widths = spatial_shapes[:, 0, None, None], spatial_shapes[:, 1, None, None]
    x, y = sampling_locations.to(dtype).permute(0, 2, 3, 1, 4, 5).flatten(0, 1).unbind(-1)
    weights = attention_weights.to(dtype).permute(0, 2, 3, 1, 4).flatten(0, 1)
    starts = level_start_index[:, None, None]
    samples = sample_bilinear(rows, heights, widths, y * heights - 0.5, x * widths - 0.5, starts)
    output = (samples * weights[..., None]).sum((1, 3))  # over levels and points: (N * M, Q, D)
    return output.unflatten(0, (value.shape[0], value.shape[2])).transpose(1, 2).flatten(2).to(value.dtype)


def _indexed_backward(grad, value, spatial_shapes, level_start_index, locations, weights, create_graph=False):
    """Return the gradients of values, locations and weights, by autograd of `_indexed_ms_deform_attn`."""
    with torch.enable_grad():
        inputs = [value, locations, weights]
        if not create_graph:
            inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        output = _indexed_ms_deform_attn(inputs[0], spatial_shapes, level_start_index, *inputs[1:])
        return torch.autograd.grad(
            output, inputs, grad, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )


def _fake_ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    return value.new_empty((value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3]))


def _fake_ms_deform_attn_backward(
    grad, value, spatial_shapes, level_start_index, sampling_locations, attention_weights
):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, sampling_locations, attention_weights))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    operator = _apply_backward
    if grad.is_cuda and torch.are_deterministic_algorithms_enabled():
        operator = _indexed_backward  # the CUDA kernels add in no fixed order
    grad_value, grad_locations, grad_weights = operator(grad, *ctx.saved_tensors)
    return grad_value, None, None, grad_locations, grad_weights


def _double_backward(ctx, *grad_grads):
    grad, value, spatial_shapes, level_start_index, locations, weights = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (grad, value, locations, weights)]
        grad, value, locations, weights = inputs
        grads = _indexed_backward(
            grad, value, spatial_shapes, level_start_index, locations, weights, create_graph=True
        )
        pairs = [(g, gg) for g, gg in zip(grads, grad_grads) if gg is not None and g.requires_grad]
        outputs, seeds = zip(*pairs) if pairs else ((), ())
        results = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True) if pairs else [None] * 4
    return results[0], results[1], None, None, results[2], results[3]


_apply = define(
    "ms_deform_attn",
    "(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations,"
    " Tensor attention_weights) -> Tensor",
    fallback=reference_ms_deform_attn,
    fake=_fake_ms_deform_attn,
    backward=_backward,
    save=_save,
)
_apply_backward = define(
    "ms_deform_attn_backward",
    "(Tensor grad, Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations,"
    " Tensor attention_weights) -> (Tensor, Tensor, Tensor)",
    fallback=reference_ms_deform_attn_backward,
    fake=_fake_ms_deform_attn_backward,
    backward=_double_backward,
    save=_save,
)
