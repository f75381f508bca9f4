"""Visualization of training images and of predictions."""

import glob
import logging
import os
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from detlib.config import CfgNode, instantiate
from detlib.data import MetadataCatalog, build_detection_test_loader
from detlib.data.detection_utils import as_names, read_image
from detlib.data.image_io import convert_image_to_rgb
from detlib.engine.options import RunSettings
from detlib.engine.train_loop import HookBase
from detlib.evaluation import inference_context
from detlib.evaluation.test_time_augmentation import GeneralizedRCNNWithTTA
from detlib.modeling import facts_of
from detlib.structures import Instances
from detlib.utils import comm
from detlib.utils.file_io import PathManager
from detlib.visualization.visualizer import Visualizer

__all__ = ["TrainingImages", "draw_prediction", "write_prediction_images"]

logger = logging.getLogger(__name__)

_TRAINING_LONG_SIDE = 512
_GAP = 4
# Labels are hard to read on smaller images.
_MIN_PREDICTION_LONG_SIDE = 640


class TrainingImages(HookBase):
    """A hook that draws the images of a batch with their ground truth every `period` steps.

    Images are drawn after all augmentations, with boxes, rotated boxes, masks, keypoints and semantic
    segmentation, next to the current predictions of the model. The drawings are written to
    ``OUTPUT_DIR/train_images/iter_0000499.jpg`` and stored as "train_images" for TensorBoard.
    """

    def __init__(
        self,
        period: int,
        output_dir: str,
        *,
        image_format: str = "BGR",
        metadata: Any = None,
        model: nn.Module | None = None,
        max_images: int = 4,
        max_files: int = 100,
        min_score: float = 0.3,
        max_instances: int = 20,
    ):
        """
        Args:
            period: number of steps between two drawings.
            output_dir: the output folder.
            image_format: format of the images in a batch, see `detlib.data.detection_utils.read_image`.
            metadata: class names and colors, see `Visualizer`; or None.
            model: the model for predictions; None draws no predictions. All processes run it, because a
                sharded model needs all of them; the main process draws.
            max_images: maximum number of images of a batch.
            max_files: number of files to keep, the newest ones.
            min_score: instances with a lower score are not drawn.
            max_instances: maximum number of instances of an image, in descending score order.

        Raises:
            ValueError: if `period`, `max_images` or `max_files` is below 1.
        """
        for name, value in (("period", period), ("max_images", max_images), ("max_files", max_files)):
            if value < 1:
                raise ValueError(f"TrainingImages: {name} must be at least 1, got {value}")
        self._period = period
        self._folder = os.path.join(output_dir, "train_images")
        self._image_format = image_format
        self._metadata = metadata
        self._model = comm.unwrap(cast(nn.Module, model))
        self._max_images = max_images
        self._max_files = max_files
        self._min_score = min_score
        self._max_instances = max_instances
        self._has_warned = False

    def before_step(self) -> None:
        if (self.trainer.iter + 1) % self._period == 0:
            self.trainer.keep_batch = True

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self._period != 0:
            return
        samples = _samples(self.trainer.batch)[: self._max_images]
        if not samples:
            if not self._has_warned:
                logger.warning("Cannot draw training images: the batches are not in the standard format")
                self._has_warned = True
            return
        predictions = self._predict(samples)
        if not comm.is_main_process():
            return
        drawing = _stack([self._draw(s, p) for s, p in zip(samples, predictions)])
        self.trainer.storage.put_image("train_images", drawing.transpose(2, 0, 1))
        self._save(drawing)

    def _predict(self, samples: list[Mapping[str, Any]]) -> list[Mapping[str, Any] | None]:
        if self._model is None:
            return [None] * len(samples)
        inputs = []
        for sample in samples:
            height, width = sample["image"].shape[-2:]
            # Without ground truth, and at the size of the training image.
            kept = {key: sample[key] for key in ("image", "proposals") if key in sample}
            inputs.append({**kept, "height": height, "width": width})
        with inference_context(self._model), torch.no_grad():
            return list(self._model(inputs))

    def _draw(self, sample: Mapping[str, Any], prediction: Mapping[str, Any] | None) -> np.ndarray:
        """Return the ground truth and, to its right, the prediction; (H, W, 3) uint8 RGB."""
        image = _to_rgb(sample["image"], self._image_format)
        scale = _TRAINING_LONG_SIDE / max(image.shape[:2])
        # Models without a semantic head ignore `sem_seg`; do not draw it.
        is_semantic = "instances" not in sample or hasattr(self._model, "sem_seg_head")
        drawn = [_draw_ground_truth(Visualizer(image, self._metadata, scale=scale), sample, is_semantic)]
        if prediction is not None:
            visualizer = Visualizer(image, self._metadata, scale=scale)
            drawn.append(draw_prediction(visualizer, prediction, self._min_score, self._max_instances))
        images = [d.get_image() for d in drawn]
        gap = np.full((images[0].shape[0], _GAP, 3), 255, np.uint8)
        return np.concatenate([images[0], *(part for image in images[1:] for part in (gap, image))], axis=1)

    def _save(self, drawing: np.ndarray) -> None:
        from PIL import Image

        PathManager.mkdirs(self._folder)
        path = os.path.join(self._folder, f"iter_{self.trainer.iter:07d}.jpg")
        with PathManager.open(path, "wb") as f:
            Image.fromarray(drawing).save(f, format="JPEG", quality=90)
        # Files of an earlier run count too. Remote files are neither listed nor removed.
        for old in sorted(glob.glob(os.path.join(glob.escape(self._folder), "iter_*.jpg")))[
            : -self._max_files
        ]:
            os.remove(old)


def _samples(batch: Any) -> list[Mapping[str, Any]]:
    """Return the dicts of a batch in the standard format; [] for other batches."""
    if not isinstance(batch, list | tuple):
        return []
    return [d for d in batch if isinstance(d, Mapping) and isinstance(d.get("image"), torch.Tensor)]


def _to_rgb(image: torch.Tensor, image_format: str) -> np.ndarray:
    """Convert an image (C, H, W) to (H, W, 3) uint8 RGB."""
    rgb = convert_image_to_rgb(image.detach().cpu().permute(1, 2, 0), image_format)
    return np.ascontiguousarray(rgb.clip(0, 255).astype(np.uint8))


def _draw_ground_truth(visualizer: Visualizer, sample: Mapping[str, Any], is_semantic: bool):
    """Draw the annotations of an image, with `sem_seg` if `is_semantic`. Return the `VisImage`."""
    output = visualizer.get_output()
    if is_semantic and "sem_seg" in sample:
        output = visualizer.draw_sem_seg(sample["sem_seg"].cpu(), draw_text="instances" not in sample)
    if "instances" in sample:
        annotated = sample["instances"].to("cpu")
        fields = annotated.get_fields()
        # The visualizer draws predictions; annotations have the same fields with another prefix.
        names = ("boxes", "classes", "masks", "keypoints")
        renamed = {f"pred_{name}": fields[f"gt_{name}"] for name in names if f"gt_{name}" in fields}
        output = visualizer.draw_instance_predictions(
            Instances(annotated.image_size, **renamed), jittering=False
        )
    return output


def _stack(images: list[np.ndarray]) -> np.ndarray:
    """Stack images vertically on a white background."""
    width = max(image.shape[1] for image in images)
    rows = []
    for image in images:
        rows.append(np.pad(image, ((0, _GAP), (0, width - image.shape[1]), (0, 0)), constant_values=255))
    return np.concatenate(rows)[:-_GAP]


def write_prediction_images(
    cfg: CfgNode | Mapping[str, Any],
    model: nn.Module,
    max_images: int = 8,
    min_score: float | None = None,
) -> list[str]:
    """Draw a model's predictions on images spread evenly over the first test dataset.

    Args:
        cfg: a CfgNode or lazy config. Its output folder, test data and image format are used, and TEST.AUG of
            a YAML config.
        model: the model; its mode does not change.
        max_images: maximum number of images.
        min_score: instances with a lower score are not drawn; None for the model's `default_score_threshold`.

    Returns:
        Paths of the files, ``OUTPUT_DIR/predictions/*.png``; empty on processes other than the main one.
    """
    source = _test_data(cfg) if max_images > 0 and comm.is_main_process() else None
    if source is None:
        return []
    name, dataset, input_format = source
    model = comm.unwrap(model)  # the other processes do not run it
    min_score = facts_of(model).default_score_threshold if min_score is None else min_score
    metadata = MetadataCatalog.get(name)
    folder = os.path.join(RunSettings.from_config(cfg).output_dir, "predictions")
    PathManager.mkdirs(folder)

    count = min(max_images, len(dataset))
    paths = []
    if isinstance(cfg, CfgNode) and cfg.TEST.AUG.ENABLED:
        model = GeneralizedRCNNWithTTA(cfg, model)
    with inference_context(model):
        for k in range(count):
            index = k * len(dataset) // count
            sample = dataset[index]
            with torch.no_grad():
                prediction = model([sample])[0]
            stem = os.path.splitext(os.path.basename(str(sample.get("file_name", "image"))))[0]
            path = os.path.join(folder, f"{index:05d}_{stem}.png")
            _draw_prediction_image(sample, prediction, metadata, min_score, input_format).save(path)
            paths.append(path)
    logger.info("Saved prediction images to %s", folder)
    return paths


def _test_data(cfg: CfgNode | Mapping[str, Any]) -> tuple[str, Any, str] | None:
    """Return name, mapped dataset and image format of the first test dataset; None if there is none."""
    if isinstance(cfg, CfgNode):
        names = as_names(cfg.DATASETS.TEST)
        if not names:
            return None
        return names[0], build_detection_test_loader(cfg, names[0], num_workers=0).dataset, cfg.INPUT.FORMAT
    test = cfg.get("dataloader", {}).get("test", {})
    if "names" not in test.get("dataset", {}):
        return None
    image_format = test.get("mapper", {}).get("image_format", "BGR")
    return as_names(test.dataset.names)[0], instantiate(test).dataset, image_format


def _draw_prediction_image(
    sample: Mapping[str, Any], prediction: Mapping[str, Any], metadata: Any, min_score: float, fmt: str
):
    """Draw one prediction on its image, at the original size or larger."""
    image = _image_rgb(sample, fmt)
    scale = max(1.0, _MIN_PREDICTION_LONG_SIDE / max(image.shape[:2]))
    visualizer = Visualizer(image, metadata, scale=scale)
    return draw_prediction(visualizer, prediction, min_score)


def draw_prediction(
    visualizer: Visualizer, prediction: Mapping[str, Any], min_score: float, max_instances: int | None = None
):
    """Draw a model's output for an image.

    Args:
        visualizer: the visualizer of the image, in the size of the prediction.
        prediction: a dict that a model returned. The first of "panoptic_seg", "instances", "proposals" and
            "sem_seg" that it has is drawn.
        min_score: instances with a lower score are not drawn.
        max_instances: maximum number of instances, in descending score order; None for all.

    Returns:
        The `VisImage`.
    """
    if "panoptic_seg" in prediction:
        ids, segments = prediction["panoptic_seg"]
        return visualizer.draw_panoptic_seg(ids.cpu(), segments)
    if "instances" in prediction:
        instances = prediction["instances"].to("cpu")
        best = instances.scores.argsort(descending=True)[:max_instances]
        return visualizer.draw_instance_predictions(instances[best[instances.scores[best] >= min_score]])
    if "proposals" in prediction:
        boxes = prediction["proposals"].proposal_boxes.tensor.cpu()[:20]
        return visualizer.overlay_instances(boxes=boxes)
    if "sem_seg" in prediction:
        return visualizer.draw_sem_seg(prediction["sem_seg"].argmax(dim=0).cpu())
    return visualizer.get_output()


def _image_rgb(sample: Mapping[str, Any], fmt: str) -> np.ndarray:
    """Return the image of the file, or else the model's input, as (H, W, 3) uint8 RGB."""
    if os.path.isfile(sample.get("file_name", "")):
        return read_image(sample["file_name"], "RGB")
    image = sample["image"].to(torch.float32)[None]
    size = (sample.get("height", image.shape[2]), sample.get("width", image.shape[3]))
    image = torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=False)[0]
    array = image.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return np.ascontiguousarray(array[:, :, ::-1] if fmt == "BGR" else array)
