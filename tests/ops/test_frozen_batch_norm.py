"""Frozen batch norm with sum and ReLU, against the formula."""

import itertools

import pytest
import torch

from detlib.ops import _library, frozen_batch_norm
from detlib.ops.frozen_batch_norm import reference_frozen_batch_norm, reference_frozen_batch_norm_backward

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
OPTIONS = list(itertools.product((False, True), (False, True)))  # with a residual, with ReLU


def constants(channels, dtype=torch.float64):
    generator = torch.Generator().manual_seed(channels)
    mean, weight, bias = torch.randn(3, channels, generator=generator, dtype=torch.float64)
    var = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.1
    return [value.to(dtype) for value in (mean, var, weight, bias)]


def maps(size, dtype=torch.float64, layout="contiguous"):
    generator = torch.Generator().manual_seed(1)
    x, residual, grad = torch.randn(3, *size, generator=generator, dtype=torch.float64).to(dtype)
    return [value.contiguous(memory_format=LAYOUTS[layout]) for value in (x, residual, grad)]


def formula(x, mean, var, weight, bias, eps, residual, relu):
    """Compute the formula channel by channel, in float64."""
    planes = []
    for c in range(x.shape[1]):
        y = (x[:, c].double() - mean[c]) / (var[c] + eps) ** 0.5 * weight[c] + bias[c]
        y = y if residual is None else y + residual[:, c].double()
        planes.append(torch.where(y < 0, 0.0, y) if relu else y)
    return torch.stack(planes, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(2, 5, 4, 3), (3, 64, 6, 5), (1, 1, 7, 9), (2, 8, 1, 1), (1, 33, 40, 2)])
@pytest.mark.parametrize("with_residual,relu", OPTIONS)
def test_values_and_gradients_match_the_formula(size, layout, with_residual, relu):
    x, residual, grad = maps(size, layout=layout)
    parts = constants(size[1])
    inputs = [t.detach().requires_grad_() for t in ([x, residual] if with_residual else [x])]
    extra = inputs[1] if with_residual else None
    y = frozen_batch_norm(inputs[0], *parts, eps=1e-2, residual=extra, relu=relu)
    expected = formula(inputs[0], *parts, 1e-2, extra, relu)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.stride() == x.stride()
    found = torch.autograd.grad(y, inputs, grad)
    for one, two in zip(found, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
        assert one.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("constants_dtype", [torch.float32, None])
def test_reduced_precision_is_rounded_once(dtype, constants_dtype):
    x, residual, grad = maps((2, 19, 5, 6), dtype, "channels_last")
    parts = constants(19, constants_dtype or dtype)
    x.requires_grad_()
    y = frozen_batch_norm(x, *parts, residual=residual, relu=True)
    assert y.dtype == dtype
    expected = formula(x, *(p.double() for p in parts), 1e-5, residual, True)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=epsilon, atol=4e-6)
    (found,) = torch.autograd.grad(y, x, grad)
    (wanted,) = torch.autograd.grad(expected, x, grad.double())
    torch.testing.assert_close(found.double(), wanted.double(), rtol=epsilon, atol=4e-6)


def test_float32_is_bit_equal_to_pytorch():
    """On CPUs with fused multiply-add, which PyTorch uses too, stored features must not change."""
    has_fma = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if not has_fma or not _library.has_native_kernel("frozen_batch_norm", "cpu"):
        pytest.skip("needs compiled kernels on x86 with AVX2")
    for layout in LAYOUTS:
        x, residual, grad = maps((2, 37, 20, 30), torch.float32, layout)
        args = (x, residual, *constants(37, torch.float32), 1e-5, True)
        assert torch.equal(torch.ops.detlib.frozen_batch_norm(*args), reference_frozen_batch_norm(*args))


@pytest.mark.parametrize("with_residual,relu", OPTIONS)
def test_gradgradcheck(with_residual, relu):
    x, residual, _ = maps((1, 3, 2, 2))
    parts = constants(3)

    def function(x, residual):
        return frozen_batch_norm(x, *parts, residual=residual if with_residual else None, relu=relu)

    inputs = (x.requires_grad_(), residual.requires_grad_(with_residual))
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


def test_other_layouts_and_empty_feature_maps_are_accepted():
    x, residual, _ = maps((2, 6, 4, 5))
    parts = constants(6)
    expected = formula(x, *parts, 1e-5, residual, True)
    for a, b in (
        (x.mT.contiguous().mT, residual),
        (x, residual.contiguous(memory_format=torch.channels_last)),
    ):
        torch.testing.assert_close(frozen_batch_norm(a, *parts, residual=b, relu=True), expected)
    for size in ((0, 6, 4, 5), (2, 6, 0, 5)):
        empty = torch.empty(size, dtype=torch.float64, requires_grad=True)
        y = frozen_batch_norm(empty, *parts, relu=True)
        y.sum().backward()
        assert y.shape == empty.grad.shape == size


@pytest.mark.parametrize("with_residual,relu", OPTIONS)
def test_gradients_keep_the_layout_of_the_feature_map(with_residual, relu):
    x, residual, grad = maps((2, 6, 4, 5), layout="channels_last")
    inputs = [t.requires_grad_() for t in ([x, residual] if with_residual else [x])]
    y = frozen_batch_norm(x, *constants(6), residual=residual if with_residual else None, relu=relu)
    expected = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    found = torch.autograd.grad(y, inputs, grad.contiguous(), retain_graph=True)
    assert all(torch.equal(a, b) and a.stride() == x.stride() for a, b in zip(found, expected, strict=True))
    expanded = torch.autograd.grad(y, inputs, torch.ones(()).double().expand(y.shape), retain_graph=True)
    ones = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert all(torch.equal(a, b) and a.stride() == x.stride() for a, b in zip(expanded, ones, strict=True))


def test_nan_is_propagated():
    x = torch.full((1, 2, 2, 3), float("nan"))
    assert frozen_batch_norm(x, *constants(2, torch.float32), relu=True).isnan().all()


@pytest.mark.parametrize("with_residual,relu", OPTIONS)
def test_backward_operator_matches_its_reference(with_residual, relu):
    output, _, grad = maps((2, 5, 4, 3), layout="channels_last")
    _, var, weight, _ = constants(5)
    args = (grad, output if relu else None, var, weight, 1e-2, with_residual)
    found = torch.ops.detlib.frozen_batch_norm_backward(*args)
    torch.testing.assert_close(found, reference_frozen_batch_norm_backward(*args))
    assert found[1].shape == (grad.shape if with_residual else (0,))


def test_wrong_arguments_are_named():
    x, residual, _ = maps((2, 5, 4, 3))
    mean, var, weight, bias = constants(5)
    with pytest.raises(ValueError, match=r"x must have shape \(N, C, H, W\), got \(5, 4, 3\)"):
        frozen_batch_norm(x[0], mean, var, weight, bias)
    with pytest.raises(ValueError, match=r"weight must have shape \(5,\), got \(4,\)"):
        frozen_batch_norm(x, mean, var, weight[:4], bias)
    with pytest.raises(ValueError, match=r"residual must have the shape and dtype of x.*float32"):
        frozen_batch_norm(x, mean, var, weight, bias, residual=residual.float())
    with pytest.raises(TypeError, match="mean must be a tensor"):
        frozen_batch_norm(x, None, var, weight, bias)
    with pytest.raises(RuntimeError):
        torch.ops.detlib.frozen_batch_norm(x, None, mean[:4], var, weight, bias, 1e-5, False)
