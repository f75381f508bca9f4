"""Validation losses: correct means, and no change of the model or of training's random numbers."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from detlib.engine import DefaultTrainer, launch
from detlib.engine.resume_state import gather_process_state
from detlib.engine.validation import validation_losses, validation_results
from detlib.utils import comm
from detlib.utils.events import EventStorage
from tests.builders import tiny_cfg
from tests.modeling.architectures import architecture_batch, build_architecture

MODELS = ["keypoint", "cascade", "retinanet_bn", "fcos", "semantic", "panoptic", "rotated"]


def _images(name: str) -> list[dict]:
    images = architecture_batch(name, empty=(False, True, False))
    for index, sample in enumerate(images):
        sample["image_id"] = index
    return images


def _everything(model: nn.Module) -> dict:
    """Return all state that a forward pass may change."""
    numbers = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float)
    }
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"numbers": numbers, "buffers": buffers, "draw": (torch.get_rng_state(), random.getstate())}


def _assert_same(a: dict, b: dict) -> None:
    assert a["numbers"] == b["numbers"] and a["buffers"].keys() == b["buffers"].keys()
    assert all(torch.equal(value, b["buffers"][name]) for name, value in a["buffers"].items())
    assert torch.equal(a["draw"][0], b["draw"][0]) and a["draw"][1] == b["draw"][1]


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_means_over_images_for_every_model(name):
    model, images = build_architecture(name).train(), _images(name)
    next(model.children()).eval()  # training may keep parts in eval mode
    before = _everything(model)
    losses = validation_losses(model, [[p] for p in images])
    _assert_same(_everything(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert losses["total_loss"] == pytest.approx(sum(v for k, v in losses.items() if k != "total_loss"))
    assert len(losses) > 1 and all(np.isfinite(v) for v in losses.values())
    # Random numbers of training, the order of the images and the batches do not matter.
    torch.manual_seed(99)
    again = validation_losses(model, [images[:0:-1], images[:1]])
    assert again == pytest.approx(losses, rel=1e-6)


def test_batch_norm_uses_its_running_statistics():
    """Compare with a plain loop over a model without random operations."""
    model, images = build_architecture("retinanet_bn"), _images("retinanet_bn")
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.1, 0.1)
    losses = validation_losses(model.eval(), [images])
    assert not model.training
    model.train()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    sums = {}
    with torch.no_grad(), EventStorage():
        for sample in images:
            if hasattr(model, "loss_normalizer"):
                del model.loss_normalizer
            for key, value in model([sample]).items():
                sums[key] = sums.get(key, 0.0) + value.item() / 3
    assert {k: losses[k] for k in sums} == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("name", ["retinanet_bn", "fcos"])
def test_validation_does_not_change_what_training_saves(name):
    """Applies even if the validation comes before the first step."""
    model, images = build_architecture(name).train(), _images(name)
    assert gather_process_state(model) == [{"": {}}]
    validation_losses(model, [images])
    assert gather_process_state(model) == [{"": {}}]
    with EventStorage():
        model(images)
    saved = gather_process_state(model)
    assert saved[0][""].keys() == {"loss_normalizer"}
    validation_losses(model, [images])
    assert gather_process_state(model) == saved


class _Transformer(nn.Module):
    """A detection transformer in miniature: attention, dropout, losses of multiple layers, and noise."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5) for _ in range(2))
        self.drop = nn.Dropout(0.5)
        self.noisy = False

    def forward(self, samples):
        if not self.training:
            return [{"instances": None} for _ in samples]
        x = torch.stack([s["image"] for s in samples])
        losses = {}
        for i, layer in enumerate(self.layers):
            x = self.drop(layer(x))
            losses[f"loss_bbox_{i}"] = x.abs().mean()
        noise = torch.randn(1) + np.random.rand() + random.random() if self.noisy else torch.zeros(1)
        return {**losses, "loss_dn": noise.abs().mean()}


def test_transformers_run_without_dropout_and_with_repeatable_noise():
    torch.manual_seed(0)
    model = _Transformer().train()
    samples = [{"image": torch.randn(3, 8), "file_name": f"{i}.jpg"} for i in range(4)]
    losses = validation_losses(model, [samples[:3], samples[3:]])
    assert all(m.training for m in model.modules())
    x, expected = torch.stack([s["image"] for s in samples]), []
    with torch.no_grad():
        for layer in model.layers:
            layer.eval()
            # One at a time: without batch_first, the first dimension is the sequence.
            x = torch.stack([layer(part[None])[0] for part in x])
            expected.append(x.abs().mean().item())
            layer.train()
    assert [losses["loss_bbox_0"], losses["loss_bbox_1"]] == pytest.approx(expected, rel=1e-5)
    model.noisy = True
    first = validation_losses(model, [samples])
    np.random.seed(5)
    assert validation_losses(model, [samples[::-1]])["loss_dn"] == pytest.approx(first["loss_dn"])
    other = [{**s, "file_name": f"other_{s['file_name']}"} for s in samples]
    assert validation_losses(model, [other])["loss_dn"] != pytest.approx(first["loss_dn"])


def test_batches_in_another_format_and_a_scalar_loss():
    class Single(nn.Module):
        def forward(self, batch):
            return batch["x"].mean()

    losses = validation_losses(Single(), [{"x": torch.ones(2)}, {"x": torch.full((2,), 4.0)}])
    assert losses == {"total_loss": 2.5}


def test_models_without_losses_and_empty_data_raise_errors():
    model = _Transformer()
    model.forward = lambda samples: [1]
    with pytest.raises(TypeError, match="'?my_val'? needs a model that returns a dict of losses.*got list"):
        validation_losses(model, [[{}]], "my_val")
    with pytest.raises(ValueError, match="no images in my_val"):
        validation_losses(model, [], "my_val")
    assert validation_results(model, {}) == {}


def _uneven_shards(path: str) -> None:
    model, images = build_architecture("mask_rcnn"), _images("mask_rcnn")
    share = images[:1] if comm.get_rank() == 0 else images[1:]
    losses = validation_losses(model, [share])
    assert comm.all_gather(losses) == [losses, losses]
    if comm.is_main_process():
        torch.save(losses, path)


def test_shards_are_weighted_by_their_numbers_of_images(monkeypatch):
    model, images = build_architecture("fcos"), _images("fcos")
    expected = validation_losses(model, [images])
    shares = []
    monkeypatch.setattr(comm, "all_gather", lambda share: shares.append(share) or [share])
    for part in (images[:1], images[1:]):
        validation_losses(model, [part])
    monkeypatch.setattr(comm, "all_gather", lambda share: shares)
    assert validation_losses(model, [images[:1]]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_with_uneven_shards_agree(tmp_path):
    launch(_uneven_shards, 2, dist_url="auto", args=(str(tmp_path / "losses"),))
    expected = validation_losses(build_architecture("mask_rcnn"), [_images("mask_rcnn")])
    assert torch.load(tmp_path / "losses") == pytest.approx(expected, rel=1e-5)


def test_val_loss_key_computes_losses_without_changing_training(tmp_path):
    """Losses use every image without augmentation and the current weights; training is unchanged."""
    names = ("shapes:val?num=3&size=64", "shapes:val?num=2&size=64")
    common = {"DATASETS__TEST": (), "INPUT__RANDOM_FLIP": "horizontal", "SOLVER__MAX_ITER": 2}
    cfg = tiny_cfg(tmp_path / "with", TEST__VAL_LOSS=names, TEST__EVAL_PERIOD=1, **common)
    torch.manual_seed(0)
    trainer = DefaultTrainer(cfg)
    results = trainer.train()
    assert set(results) == {"val"} and set(results["val"]) == set(names)
    loader = DefaultTrainer.build_val_loss_loader(cfg, names[0])
    assert len(loader) == 3 and len(next(iter(loader))) == 1
    expected = validation_losses(trainer.model, loader)
    assert results["val"][names[0]] == pytest.approx(expected, rel=1e-6)
    latest = trainer.storage.latest()
    assert latest[f"val/{names[0]}/loss_mask"][0] == pytest.approx(expected["loss_mask"])
    assert [i for _, i in trainer.storage.history(f"val/{names[1]}/total_loss").values()] == [0, 2]
    torch.manual_seed(0)
    plain = DefaultTrainer(tiny_cfg(tmp_path / "without", **common))
    plain.train()
    for a, b in zip(trainer.model.state_dict().values(), plain.model.state_dict().values()):
        assert torch.equal(a, b)


def test_an_unknown_validation_dataset_raises_an_error_early(tmp_path):
    with pytest.raises(KeyError, match="coco_2017_val"):
        DefaultTrainer(tiny_cfg(tmp_path, TEST__VAL_LOSS=("coco_2017_vla",)))
