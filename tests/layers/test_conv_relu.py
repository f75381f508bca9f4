"""Fusion of a frozen norm, sum and ReLU after a convolution, and conditions that prevent it."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from detlib.layers import Conv2d, FrozenBatchNorm2d, wrappers
from detlib.layers.wrappers import conv_relu


def make_conv(norm=FrozenBatchNorm2d, **kwargs):
    torch.manual_seed(0)
    conv = Conv2d(3, 8, 3, padding=1, bias=False, norm=norm(8), **kwargs)
    for buffer in ("weight", "bias", "running_mean"):
        nn.init.normal_(getattr(conv.norm, buffer))
    nn.init.uniform_(conv.norm.running_var, 0.5, 2)
    return conv


@pytest.fixture
def fused_calls(monkeypatch):
    """Return a list that gets an entry for each fusion of norm, sum and ReLU."""
    calls = []
    apply = wrappers.apply_frozen_batch_norm
    monkeypatch.setattr(wrappers, "apply_frozen_batch_norm", lambda *args: calls.append(1) or apply(*args))
    monkeypatch.setattr(
        wrappers, "is_fast", lambda y: y.dtype != torch.bfloat16
    )  # with or without compiled kernels
    return calls


def plain(conv, x, residual=None):
    y = F.conv2d(x, conv.weight, padding=1)
    n = conv.norm
    y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)
    return F.relu(y if residual is None else y + residual)


@pytest.mark.parametrize("with_residual", [False, True])
def test_fused_equals_separate_operators(fused_calls, with_residual):
    conv, x = make_conv(), torch.randn(2, 3, 6, 5, requires_grad=True)
    residual = torch.randn(2, 8, 6, 5, requires_grad=True) if with_residual else None
    inputs = [t for t in (x, conv.weight, residual) if t is not None]
    before = residual.clone() if with_residual else None
    results = []
    for function in (conv_relu, plain):
        y = function(conv, x, residual)
        results.append((y, *torch.autograd.grad((y * y).sum(), inputs)))
    assert fused_calls == [1]
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert residual is None or torch.equal(residual, before)


def _hook(*args):
    return None


@pytest.mark.parametrize(
    "watch",
    [
        lambda conv: conv.register_forward_hook(_hook),
        lambda conv: conv.register_forward_pre_hook(_hook),
        lambda conv: conv.norm.register_forward_hook(_hook),
        lambda conv: nn.modules.module.register_module_forward_hook(_hook),
    ],
)
def test_hooks_prevent_fusion(fused_calls, watch):
    conv, x = make_conv(), torch.randn(1, 3, 4, 4, requires_grad=True)
    handle = watch(conv)
    try:
        torch.testing.assert_close(conv_relu(conv, x), plain(conv, x))
        assert fused_calls == []
    finally:
        handle.remove()
    conv_relu(conv, x)
    assert fused_calls == [1]


def test_forward_hook_sees_the_output_of_the_convolution(fused_calls):
    conv, x, residual, seen = make_conv(), torch.randn(1, 3, 4, 4), torch.randn(1, 8, 4, 4), []
    conv.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    y = conv_relu(conv, x, residual)
    torch.testing.assert_close(y, F.relu(seen[0] + residual))
    assert (seen[0] < 0).any()


def test_patched_modules_are_called(fused_calls):
    class Doubled(FrozenBatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(1, 3, 4, 4)
    conv = make_conv(Doubled)
    y = conv_relu(conv, x)
    torch.testing.assert_close(y, 2 * plain(conv, x))
    conv = make_conv()
    conv.forward = lambda x: torch.ones(1)
    assert conv_relu(conv, x) == 1
    conv = make_conv(activation=torch.neg)
    torch.testing.assert_close(conv_relu(conv, x), F.relu(conv(x)))
    conv = make_conv(nn.BatchNorm2d)
    torch.testing.assert_close(conv_relu(copy.deepcopy(conv), x), F.relu(conv(x)))
    assert conv_relu(nn.Identity(), x).equal(F.relu(x)) and fused_calls == []


def test_autocast_returns_reduced_precision(fused_calls):
    conv, x, residual = make_conv(), torch.randn(1, 3, 4, 4), torch.randn(1, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_relu(conv, x, residual)
    assert y.dtype == torch.bfloat16 and fused_calls == []
    torch.testing.assert_close(y.float(), plain(conv, x, residual), rtol=0.05, atol=0.05)


def test_compilers_and_tracers_see_torch_operators():
    conv, x = make_conv(), torch.randn(1, 3, 4, 4)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return conv_relu(self.conv, x)

    exported = torch.export.export(Model(), (x,))
    assert not any("detlib" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), plain(conv, x))
    with torch.no_grad(), warnings.catch_warnings(action="ignore", category=FutureWarning):
        traced = torch.jit.trace(Model(), x)  # fvcore counts operations with it
    assert "detlib::" not in str(traced.inlined_graph)
    tangent = torch.randn_like(x)
    with torch.no_grad(), forward_ad.dual_level():
        moved = forward_ad.unpack_dual(conv_relu(conv, forward_ad.make_dual(x, tangent))).tangent
        step = 1e-3 * tangent
        torch.testing.assert_close(
            moved, (plain(conv, x + step) - plain(conv, x)) / 1e-3, rtol=0.02, atol=0.02
        )
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(Model())(x[None])[0], plain(conv, x))
