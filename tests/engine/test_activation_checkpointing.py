"""Activation checkpointing and torch.compile change neither results nor parameter names."""

import pytest
import torch
from torch import nn

from detlib.engine.distributed.activation_checkpointing import (
    add_activation_checkpoints,
    find_backbone_blocks,
)
from detlib.engine.distributed.ddp import compile_parts
from detlib.modeling import build_model
from detlib.utils.events import EventStorage
from tests.builders import tiny_cfg


def _build(**overrides) -> nn.Module:
    torch.manual_seed(0)
    return build_model(tiny_cfg("unused", MODEL__RESNETS__NORM="BN", MODEL__FPN__NORM="BN", **overrides))


def _step(model: nn.Module) -> tuple[dict, dict, dict]:
    """Return the output of the backbone in training mode, the gradients, and all buffers after the step."""
    model.train()
    torch.manual_seed(1)
    images = torch.rand(2, 3, 64, 64)
    with EventStorage():
        out = model.backbone(images)
    # Random weights, because the mean of a normalized feature map does not depend on the parameters.
    sum((x * torch.rand_like(x)).mean() for x in out.values()).backward()
    return (
        out,
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        dict(model.named_buffers()),
    )


def _assert_same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys() and one
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_checkpointed_blocks_give_the_same_results():
    plain, checkpointed = _build(), _build()
    assert add_activation_checkpoints(checkpointed) == 8  # R-18 has eight residual blocks
    assert plain.state_dict().keys() == checkpointed.state_dict().keys()
    calls = []
    checkpointed.backbone.bottom_up.res3[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    for one, two in zip(_step(plain), _step(checkpointed)):
        _assert_same(one, two)
    assert len(calls) == 2
    checkpointed.eval()
    with torch.no_grad():
        checkpointed.backbone(torch.rand(1, 3, 64, 64))
    assert len(calls) == 3


def test_checkpointed_blocks_save_fewer_activations():
    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model.backbone(torch.rand(1, 3, 64, 64))
        return sum(sizes)

    plain, checkpointed = _build().train(), _build().train()
    add_activation_checkpoints(checkpointed)
    assert kept(checkpointed) < 0.6 * kept(plain)


def test_model_without_blocks_raises():
    with pytest.raises(
        ValueError, match="TRAIN.ACTIVATION_CHECKPOINT needs a model whose backbone consists of blocks"
    ):
        add_activation_checkpoints(nn.Linear(2, 2))
    assert find_backbone_blocks(nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(b, marks=pytest.mark.slow) for b in ("aot_eager", "inductor"))]
)
def test_compiled_modules_give_the_same_results(backend):
    plain, compiled = _build(), _build()
    names = compile_parts(compiled, backend=backend)
    assert names == ["backbone", "proposal_generator.rpn_head", "roi_heads.box_head"]
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for one, two in zip(_step(plain), _step(compiled)):
        assert one.keys() == two.keys()
        for name in one:
            spread = one[name].abs().max().item()
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-4 * spread)


def test_compiling_an_unknown_module_raises():
    with pytest.raises(
        ValueError, match="TRAIN.COMPILE.MODULES: the model has no submodule 'backbon'; similar: backbone"
    ):
        compile_parts(_build(), ["backbon"])
