"""TrainingImages and StepsProfiler."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detlib.engine import TrainerBase, hooks
from detlib.structures import Boxes, Instances, Keypoints, RotatedBoxes
from tests.builders import ground_truth
from tests.modeling.architectures import architecture_batch, build_architecture


class _BatchTrainer(TrainerBase):
    """A trainer whose steps have the given batches."""

    def __init__(self, batches, hook):
        super().__init__()
        self.batches = batches
        self.register_hooks([hook])

    def run_step(self):
        if self.keep_batch:
            self.batch = self.batches[self.iter % len(self.batches)]


def _blank(color=(0, 0, 0), height=64, width=96, **annotations):
    """Return a sample whose image has one color, in RGB."""
    image = torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, height, width)
    return {"image": image, **annotations}


def _drawn(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_images_are_drawn_every_period_with_correct_colors_and_sizes(tmp_path, image_format):
    color = (200, 100, 20)
    pixel = color if image_format == "RGB" else color[::-1]
    samples = [_blank(pixel), _blank(pixel, height=96, width=48)]
    hook = hooks.TrainingImages(3, str(tmp_path), image_format=image_format)
    trainer = _BatchTrainer([samples], hook)
    trainer.train(0, 7)
    files = sorted(p.name for p in (tmp_path / "train_images").iterdir())
    assert files == ["iter_0000002.jpg", "iter_0000005.jpg"]
    drawing = _drawn(tmp_path / "train_images" / files[0])
    assert abs(drawing[100, 100] - color).max() <= 4 and abs(drawing[600, 100] - color).max() <= 4
    assert drawing[600, 400].min() > 250  # white next to the narrow one
    (name, image, iteration), second = trainer.storage._images
    assert (name, iteration, second[2]) == ("train_images", 2, 5)
    assert image.shape == (3, *drawing.shape[:2]) and image.dtype == np.uint8
    assert trainer.batch is None


@pytest.mark.parametrize("kind", ["boxes", "rotated", "masks", "keypoints", "sem_seg", "nothing"])
def test_annotations_are_drawn_at_their_positions(tmp_path, kind):
    instances = ground_truth(boxes=((48, 16, 80, 48),))
    sample = _blank(instances=instances)
    if kind == "boxes":
        instances.remove("gt_masks")
    elif kind == "rotated":
        boxes = RotatedBoxes(torch.tensor([[64.0, 32, 32, 32, 30]]))
        sample["instances"] = Instances((64, 96), gt_boxes=boxes, gt_classes=torch.tensor([0]))
    elif kind == "keypoints":
        instances.remove("gt_masks")
        instances.gt_keypoints = Keypoints(torch.tensor([[[64.0, 32, 2], [8, 8, 0]]]))
    elif kind == "sem_seg":
        sample = _blank(sem_seg=torch.zeros(64, 96, dtype=torch.int64))
    elif kind == "nothing":
        sample = _blank(instances=Instances((64, 96), gt_boxes=Boxes(torch.zeros(0, 4))))
    _BatchTrainer([[sample]], hooks.TrainingImages(1, str(tmp_path), image_format="RGB")).train(0, 1)
    drawing = _drawn(tmp_path / "train_images" / "iter_0000000.jpg").sum(axis=2) / 3
    scale = 512 / 96
    outline = drawing[int(32 * scale), int(48 * scale) - 8 : int(48 * scale) + 9].max()
    inside = drawing[
        int(32 * scale) - 3 : int(32 * scale) + 4, int(64 * scale) - 3 : int(64 * scale) + 4
    ].max()
    outside = drawing[:, : int(30 * scale)].max()
    assert (outline > 40) == (kind in ("boxes", "masks", "keypoints", "sem_seg"))
    assert (inside > 40) == (kind in ("masks", "keypoints", "sem_seg"))
    assert (outside > 40) == (kind == "sem_seg")
    assert (drawing.max() > 40) == (kind != "nothing")


@pytest.mark.parametrize("name", ["mask_rcnn", "retinanet", "rotated", "panoptic", "semantic", "rpn"])
def test_predictions_are_drawn_next_to_the_ground_truth(tmp_path, name):
    model = build_architecture(name).train()
    modes = [m.training for m in model.modules()]
    # All predictions: an untrained model has low scores.
    hook = hooks.TrainingImages(1, str(tmp_path), model=model, min_score=0.0)
    _BatchTrainer([architecture_batch(name)], hook).train(0, 1)
    drawing = _drawn(tmp_path / "train_images" / "iter_0000000.jpg")
    assert drawing.shape == (2 * 341 + 4, 2 * 512 + 4, 3)
    left, right = drawing[:341, :512], drawing[:341, 516:]
    assert (abs(left - right).max(axis=2) > 40).mean() > 0.005
    assert [m.training for m in model.modules()] == modes


def test_numbers_of_images_and_files_are_limited(tmp_path):
    hook = hooks.TrainingImages(1, str(tmp_path), image_format="RGB", max_images=2, max_files=3)
    _BatchTrainer([[_blank()] * 5], hook).train(0, 5)
    files = sorted((tmp_path / "train_images").iterdir())
    assert [p.name for p in files] == [f"iter_000000{k}.jpg" for k in (2, 3, 4)]
    assert _drawn(files[0]).shape[0] == 2 * 341 + 4
    for name in ("period", "max_images", "max_files"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            hooks.TrainingImages(**{"period": 1, "output_dir": "", name: 0})


def test_batches_in_another_format_warn_once(tmp_path, caplog):
    hook = hooks.TrainingImages(1, str(tmp_path), model=nn.Linear(1, 1))
    with caplog.at_level(logging.WARNING, logger="detlib"):
        _BatchTrainer([torch.zeros(2)], hook).train(0, 3)
    assert caplog.text.count("not in the standard format") == 1 and not list(tmp_path.iterdir())


class _MatmulTrainer(TrainerBase):
    def run_step(self):
        torch.ones(4, 4) @ torch.full((4, 4), float(self.iter))


@pytest.mark.parametrize(("end", "last"), [(9, 5), (5, 4)])
def test_consecutive_steps_are_profiled_in_one_trace(tmp_path, end, last):
    trainer = _MatmulTrainer()
    trainer.register_hooks([hooks.StepsProfiler(1, 3, str(tmp_path))])
    trainer.train(2, end)
    name = f"iter3-{last}"
    assert {p.name for p in tmp_path.iterdir()} == {f"trace_{name}.json", f"operators_{name}.txt"}
    events = json.loads((tmp_path / f"trace_{name}.json").read_text())["traceEvents"]
    assert sum(e.get("name") == "aten::mm" for e in events) == last - 2
    assert "aten::mm" in (tmp_path / f"operators_{name}.txt").read_text()
    with pytest.raises(ValueError, match="start >= 0 and steps >= 1, got -1 and 3"):
        hooks.StepsProfiler(-1, 3, str(tmp_path))
