"""Multi-scale deformable attention against its definition, sample by sample."""

import math

import pytest
import torch

from detlib.ops import ms_deform_attn
from detlib.ops.ms_deform_attn import (
    _indexed_backward,
    _indexed_ms_deform_attn,
    reference_ms_deform_attn,
    reference_ms_deform_attn_backward,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
SHAPES = ((5, 7), (3, 2), (1, 1))


def inputs(channels=5, num_images=2, heads=3, queries=6, points=2, shapes=SHAPES, dtype=torch.float64):
    """Return arguments of the operator. A third of the locations are outside the levels or near a border."""
    generator = torch.Generator().manual_seed(channels)

    def random(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    spatial_shapes = torch.tensor(shapes, dtype=torch.int64).reshape(-1, 2)
    cells = spatial_shapes.prod(1)
    value = random(num_images, int(cells.sum()), heads, channels) - 0.5
    locations = random(num_images, queries, heads, len(shapes), points, 2) * 1.6 - 0.3
    weights = random(num_images, queries, heads, len(shapes), points)
    return value.to(dtype), spatial_shapes, cells.cumsum(0) - cells, locations.to(dtype), weights.to(dtype)


def slow_ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights):
    """Compute the definition in double precision, corner by corner of each sample."""
    value, locations, weights = value.double(), locations.double(), weights.double()
    num_images, queries, heads, levels, points = weights.shape
    output = torch.zeros(num_images, queries, heads, value.shape[3], dtype=torch.float64)
    for n, q, m, lev, p in torch.cartesian_prod(*map(torch.arange, weights.shape)).tolist():
        height, width = spatial_shapes[lev].tolist()
        start = int(level_start_index[lev])
        x, y = locations[n, q, m, lev, p].tolist()
        x, y = x * width - 0.5, y * height - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    weight = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[n, q, m, lev, p]
                    output[n, q, m] += weight * value[n, start + row * width + column, m]
    return output.flatten(2)


def backward(grad, *arguments):
    return torch.ops.detlib.ms_deform_attn_backward(grad, *arguments)


@pytest.mark.parametrize("channels", [1, 3, 4, 8, 16, 31, 32, 40, 64])
def test_values_match_the_definition(channels):
    """Channel counts below, at and between vector widths use different loops."""
    arguments = inputs(channels)
    expected = slow_ms_deform_attn(*arguments)
    torch.testing.assert_close(ms_deform_attn(*arguments), expected)
    torch.testing.assert_close(reference_ms_deform_attn(*arguments), expected)
    torch.testing.assert_close(_indexed_ms_deform_attn(*arguments), expected)


def test_samples_computed_by_hand():
    value = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).view(
        1, 6, 1, 1
    )  # a feature map of 2 rows and 3 columns
    locations = torch.tensor([[0.5, 0.25], [1 / 3, 0.5], [0.0, 0.0], [1.2, 0.5]])  # x, y
    output = ms_deform_attn(
        value,
        torch.tensor([[2, 3]]),
        torch.tensor([0]),
        locations.view(1, 4, 1, 1, 1, 2),
        torch.full((1, 4, 1, 1, 1), 2.0),
    )
    # Center of the upper middle cell; between four cells; a quarter of the corner cell; outside the feature
    # map.
    torch.testing.assert_close(output.flatten(), torch.tensor([4.0, 6.0, 0.5, 0.0]))


@pytest.mark.parametrize("channels", [3, 8, 32, 37])
def test_backward_matches_the_gradient_of_the_definition(channels):
    arguments = inputs(channels)
    output = slow_ms_deform_attn(*arguments)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, shapes, starts, locations, weights = arguments
    leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
    expected_value, expected_weights = torch.autograd.grad(
        slow_ms_deform_attn(leaves[0], shapes, starts, locations, leaves[2]), leaves[::2], grad
    )
    step = 1e-6
    expected_locations = torch.zeros_like(locations)
    for axis in range(2):
        for level in range(len(SHAPES)):
            for point in range(locations.shape[4]):
                moved = [locations.clone() for _ in range(2)]
                moved[0][:, :, :, level, point, axis] -= step
                moved[1][:, :, :, level, point, axis] += step
                low, high = (reference_ms_deform_attn(value, shapes, starts, m, weights) for m in moved)
                by_head = ((high - low) / (2 * step) * grad).unflatten(2, (3, -1)).sum(3)
                expected_locations[:, :, :, level, point, axis] = by_head
    for function in (backward, reference_ms_deform_attn_backward, _indexed_backward):
        got = function(grad, *arguments)
        torch.testing.assert_close(got[0], expected_value)
        torch.testing.assert_close(got[1], expected_locations, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(got[2], expected_weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_values_locations_and_gradients(dtype):
    """Reduced-precision values work with float32 locations, and each gradient has its own dtype."""
    arguments = inputs(32)
    value, shapes, starts, locations, weights = arguments
    locations = locations.to(torch.float64 if dtype == torch.float64 else torch.float32)
    value, weights = value.to(dtype), weights.to(dtype)
    tolerance = TOLERANCE[dtype]
    got = ms_deform_attn(value, shapes, starts, locations, weights)
    assert got.dtype == dtype and got.is_contiguous()
    exact = [value.double(), shapes, starts, locations.double(), weights.double()]
    torch.testing.assert_close(got.double(), slow_ms_deform_attn(*exact), atol=tolerance, rtol=tolerance)
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = reference_ms_deform_attn_backward(grad.double(), *exact)
    for function in (backward, reference_ms_deform_attn_backward):
        grads = function(grad, value, shapes, starts, locations, weights)
        assert [g.dtype for g in grads] == [dtype, locations.dtype, dtype]
        for ours, theirs in zip(grads, expected):
            torch.testing.assert_close(ours.double(), theirs, atol=4 * tolerance, rtol=4 * tolerance)


def test_reduced_precision_is_summed_in_float32():
    value, shapes, starts, locations, weights = inputs(16, points=8, dtype=torch.float32)
    value = value.bfloat16()
    got = ms_deform_attn(value, shapes, starts, locations, weights)
    wanted = ms_deform_attn(value.float(), shapes, starts, locations, weights)
    assert torch.equal(got, wanted.bfloat16())


def test_gradcheck_and_gradgradcheck():
    value, shapes, starts, locations, weights = inputs(2, 1, 2, 2, 1, ((3, 2), (1, 1)))
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]

    def attend(value, locations, weights):
        return ms_deform_attn(value, shapes, starts, locations, weights)

    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves, fast_mode=True)


def test_gradients_of_a_subset_of_inputs():
    value, shapes, starts, locations, weights = inputs()
    value.requires_grad_()
    ms_deform_attn(value, shapes, starts, locations, weights).sum().backward()
    grad = torch.ones(2, 6, 15, dtype=torch.float64)
    expected = reference_ms_deform_attn_backward(grad, value.detach(), shapes, starts, locations, weights)
    torch.testing.assert_close(value.grad, expected[0])


def test_noncontiguous_inputs_give_the_same_values():
    arguments = inputs(8)
    expected = ms_deform_attn(*arguments)
    grad = torch.randn(expected.shape, dtype=torch.float64)

    def strided(tensor):
        return torch.stack([tensor, tensor], -1)[..., 0]

    def reordered(tensor):
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    for change in (strided, reordered):
        changed = [change(tensor) for tensor in arguments]
        assert not changed[0].is_contiguous()
        assert torch.equal(ms_deform_attn(*changed), expected)
        for ours, theirs in zip(backward(change(grad), *changed), backward(grad, *arguments)):
            assert torch.equal(ours, theirs)
    shapes = [tensor.int() for tensor in arguments[1:3]]
    assert torch.equal(ms_deform_attn(arguments[0], *shapes, *arguments[3:]), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"num_images": 0}, {"heads": 0}, {"queries": 0}, {"points": 0}, {"channels": 0}, {"shapes": ()},
        {"shapes": ((0, 3), (2, 0))},
    ],
)  # fmt: skip
def test_empty_inputs_are_accepted(change):
    arguments = inputs(**change)
    value, _, _, locations, weights = arguments
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    output = ms_deform_attn(*arguments)
    expected = torch.zeros(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]).double()
    assert torch.equal(output, expected)
    output.sum().backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


def test_level_without_cells_is_zero():
    arguments = inputs(8, shapes=((5, 7), (0, 4), (3, 2)))
    expected = slow_ms_deform_attn(*arguments)
    torch.testing.assert_close(ms_deform_attn(*arguments), expected)
    torch.testing.assert_close(reference_ms_deform_attn(*arguments), expected)
    grad = torch.ones_like(expected)
    for ours, theirs in zip(
        backward(grad, *arguments), reference_ms_deform_attn_backward(grad, *arguments), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30])
@pytest.mark.parametrize("argument", [3, 4])
def test_nonfinite_and_huge_values(argument, number):
    arguments = inputs(8, dtype=torch.float32)
    expected = ms_deform_attn(*arguments)
    arguments[argument][0, 2, 1, 0, 0] = number
    arguments[3][1, 3, 2, 1, 0] = 7.0  # a sample outside its feature map
    arguments[4][1, 3, 2, 1, 0] = number if argument == 4 else 0.5
    finite = abs(number) < torch.inf
    for function in (ms_deform_attn, reference_ms_deform_attn, _indexed_ms_deform_attn):
        got = function(*arguments).unflatten(2, (3, 8))
        if not finite:
            assert got[0, 2, 1].isnan().any() or got[0, 2, 1].isinf().all()
            assert argument == 3 or got[1, 3, 2].isnan().all()
        elif argument == 3:
            assert got.isfinite().all()
        others = torch.ones(2, 6, 3, dtype=torch.bool)
        others[0, 2, 1] = others[1, 3, 2] = False
        torch.testing.assert_close(got[others], expected.unflatten(2, (3, 8))[others])
    grads = backward(torch.ones_like(expected), *arguments)
    if argument == 3:
        assert all(g.isfinite().all() for g in grads)


def test_parallel_runs_are_deterministic():
    shapes = ((20, 30), (10, 15), (5, 8), (3, 4))
    arguments = inputs(32, 2, 8, 700, 4, shapes, torch.float32)
    output = ms_deform_attn(*arguments)
    torch.testing.assert_close(output, reference_ms_deform_attn(*arguments), atol=1e-5, rtol=1e-4)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    first, second = backward(grad, *arguments), backward(grad, *arguments)
    expected = reference_ms_deform_attn_backward(grad.double(), *inputs(32, 2, 8, 700, 4, shapes))
    for one, two, exact in zip(first, second, expected):
        assert torch.equal(one, two)
        wrong_fraction = ((one - exact).abs() > 1e-3 + 1e-3 * exact.abs()).double().mean()
        assert wrong_fraction < 1e-3  # a location at the edge of a cell may round to the other side


WRONG = [
    ("value", lambda t: t[0], r"value must have shape \(N, S, M, D\), got \(42, 3, 5\)"),
    ("value", lambda t: t.long(), "value must be floating point, got torch.int64"),
    ("value", lambda t: t[:, 1:], "spatial_shapes must add up to the 41 cells of value, got"),
    ("value", lambda t: t[:1], r"sampling_locations must have shape .* with N = 1, as value"),
    ("spatial_shapes", lambda t: t.float(), "spatial_shapes must be integers, got torch.float32"),
    ("spatial_shapes", lambda t: t.flatten(), r"spatial_shapes must have shape \(L, 2\), got \(6,\)"),
    ("spatial_shapes", lambda t: -t, "spatial_shapes must add up to the 42 cells"),
    ("spatial_shapes", lambda t: t[:2], "level_start_index must have shape .* with L = 2, as spatial_shapes"),
    ("level_start_index", lambda t: t + 1, r"level_start_index must be \[0, 35, 41\].*, got \[1, 36, 42\]"),
    ("level_start_index", lambda t: t[:2], r"level_start_index must have shape \(L\) with L = 3"),
    ("sampling_locations", lambda t: t[..., :1], "sampling_locations must have shape .*, got"),
    (
        "sampling_locations",
        lambda t: t[:, :, 1:],
        "sampling_locations must have shape .* with M = 3, as value",
    ),
    ("sampling_locations", lambda t: t.to("meta"), "sampling_locations is on meta, but value is on cpu"),
    ("attention_weights", lambda t: t[:, 1:], "attention_weights must have shape .* with Q = 6, as sampling"),
    ("attention_weights", lambda t: t[..., 1:], "attention_weights must have shape .* with P = 2"),
    ("attention_weights", lambda t: t.bool(), "attention_weights must be floating point, got torch.bool"),
]


@pytest.mark.parametrize("name,change,message", WRONG)
def test_wrong_arguments_are_named(name, change, message):
    names = ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights")
    arguments = dict(zip(names, inputs()))
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(**arguments)


def test_argument_that_is_not_a_tensor_is_named():
    arguments = list(inputs())
    arguments[1] = SHAPES
    with pytest.raises(TypeError, match="spatial_shapes must be a tensor"):
        ms_deform_attn(*arguments)
