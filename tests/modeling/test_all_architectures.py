"""All architectures train and predict in every dtype, and train on images without objects."""

import pytest
import torch

from detlib.structures import Instances
from detlib.utils.events import EventStorage
from tests.modeling.architectures import (
    ALL_SAMPLED,
    ARCHITECTURES,
    architecture_batch,
    build_architecture,
)


def tensors_of(output: dict):
    """Yield every floating point tensor in the output of one image."""
    for value in output.values():
        if isinstance(value, Instances):
            fields = [getattr(x, "tensor", x) for x in value.get_fields().values()]
            yield from (x for x in fields if x.is_floating_point())
        elif isinstance(value, torch.Tensor):
            yield value


def train_and_predict(
    name: str, dtype: torch.dtype = torch.float32, autocast: bool = False
) -> dict[str, torch.Tensor]:
    """Run one training step and one prediction, check that both are finite, and return the losses."""
    model = build_architecture(name).to(dtype)
    torch.manual_seed(1)  # for the sampling
    with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model.train()(architecture_batch(name))
        assert losses and all(x.dim() == 0 and x.isfinite() for x in losses.values()), losses
        sum(losses.values()).backward()
        with torch.no_grad():
            outputs = model.eval()(architecture_batch(name))
    for p in model.parameters():
        assert p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all())
    assert len(outputs) == 2
    for output in outputs:
        assert output and all(len(x) and x.isfinite().all() for x in tensors_of(output))
    return losses


# Slow in bfloat16 on most CPUs, for seconds each. Other architectures cover the code of these variants.
_VARIANTS = {
    "giou", "class_agnostic", "dc5", "modulated", "syncbn", "gn", "frozen", "sigmoid", "rpn_c4", "c4",
    "retinanet_bn", "panoptic_cascade", "regnetx", "fast_rcnn", "semantic",
}  # fmt: skip
other_precision = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in _VARIANTS else n for n in ARCHITECTURES]
)


@other_precision
def test_float64_models_train_and_predict(name):
    losses = train_and_predict(name, torch.float64)
    expected = train_and_predict(name)
    for key, value in expected.items():
        torch.testing.assert_close(
            losses[key].float(), value, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: k + m
        )


@other_precision
def test_bfloat16_models_train_and_predict(name):
    train_and_predict(name, torch.bfloat16)


@other_precision
def test_models_train_and_predict_under_autocast(name):
    train_and_predict(name, autocast=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gpu_agrees_with_cpu(name, exact_float32):
    """Compare losses and the gradient norm; then run a float16 step and a prediction."""
    results = []
    for device in ("cpu", "cuda"):
        model = build_architecture(name, **ALL_SAMPLED).to(device)
        with EventStorage():
            losses = model.train()(architecture_batch(name))
        sum(losses.values()).backward()
        grads = [p.grad.norm().cpu() for p in model.parameters() if p.grad is not None]
        results.append(
            {**{k: v.detach().cpu() for k, v in losses.items()}, "gradient": torch.stack(grads).norm()}
        )
    assert model.device.type == "cuda" and results[0].keys() == results[1].keys()
    for key, expected in results[0].items():
        torch.testing.assert_close(
            results[1][key], expected, rtol=1e-2, atol=1e-3, msg=lambda m, k=key: f"{k}: {m}"
        )
    with EventStorage(), torch.autocast("cuda", torch.float16):
        losses = model(architecture_batch(name))
    assert all(x.isfinite() for x in losses.values()), losses
    sum(losses.values()).backward()
    with torch.no_grad():
        outputs = model.eval()(architecture_batch(name))
    for output in outputs:
        assert output and all(x.is_cuda and x.isfinite().all() for x in tensors_of(output))


def trained_parameters(model: torch.nn.Module, items: list[dict]) -> set[str]:
    """Return the names of the parameters that get a gradient in one step."""
    model.train().zero_grad(set_to_none=True)
    losses = model(items)
    assert all(x.isfinite() for x in losses.values()), losses
    sum(losses.values()).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_images_without_objects_train_the_same_parameters(name):
    model = build_architecture(name)
    usual = trained_parameters(model, architecture_batch(name))
    assert usual == {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained_parameters(model, architecture_batch(name, empty=(True, True))) == usual
    assert trained_parameters(model, architecture_batch(name, empty=(True, False))) == usual


def test_deformable_convolutions_train_on_cpu():
    model = build_architecture("deformable")
    offsets = [m for name, m in model.named_modules() if name.endswith("conv2_offset")]
    assert len(offsets) == 13 and all(not m.weight.any() for m in offsets)  # res3 to res5 of ResNet-50
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    history = []
    for _ in range(20):  # the sampled regions change, so the loss of a single step may rise
        torch.manual_seed(1)
        losses = model(architecture_batch("deformable"))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append(sum(losses.values()).item())
    assert min(history[-5:]) < 0.7 * history[0], history
    assert all(m.weight.any() for m in offsets)
