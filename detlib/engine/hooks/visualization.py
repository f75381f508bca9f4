"""Drawings of what a model is trained on and of what it predicts."""

import glob
import logging
import os
from collections.abc import Mapping
from typing import Any

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
    """Draws the pictures of a batch with the truth, as the model sees them, every so many steps.

    That is: after all augmentation, with boxes (rotated ones too), masks, keypoints and semantic maps. Beside
    each picture stands the same one with what the model predicts for it by now. They go to
    ``OUTPUT_DIR/train_images/iter_0000499.jpg`` and as "train_images" into the storage, for TensorBoard.
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
            period: steps between two drawings.
            output_dir: the output folder.
            image_format: of the pictures in a batch, see `detlib.data.detection_utils.read_image`.
            metadata: names and colours of classes, see `Visualizer`; None for none.
            model: what predicts; None leaves predictions out. Every process predicts, as models whose parts
                are spread over the processes need that; the main process draws.
            max_images: pictures of a batch at most.
            max_files: the last so many files are kept.
            min_score, max_instances: which predictions to draw.

        Raises:
            ValueError: if one of the numbers is below 1.
        """
        for name, value in (("period", period), ("max_images", max_images), ("max_files", max_files)):
            if value < 1:
                raise ValueError(f"TrainingImages: {name} must be at least 1, got {value}")
        self._period = period
        self._folder = os.path.join(output_dir, "train_images")
        self._image_format = image_format
        self._metadata = metadata
        self._model = comm.unwrap(model)
        self._max_images = max_images
        self._max_files = max_files
        self._min_score = min_score
        self._max_instances = max_instances
        self._is_told = False

    def before_step(self) -> None:
        if (self.trainer.iter + 1) % self._period == 0:
            self.trainer.keep_batch = True

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self._period != 0:
            return
        samples = _samples(self.trainer.batch)[: self._max_images]
        if not samples:
            if not self._is_told:
                logger.warning("No training pictures are drawn: the batches are not in the standard format")
                self._is_told = True
            return
        predictions = self._predict(samples)
        if not comm.is_main_process():
            return
        picture = _stack([self._draw(s, p) for s, p in zip(samples, predictions)])
        self.trainer.storage.put_image("train_images", picture.transpose(2, 0, 1))
        self._save(picture)

    def _predict(self, samples: list[Mapping[str, Any]]) -> list[Mapping[str, Any] | None]:
        if self._model is None:
            return [None] * len(samples)
        inputs = []
        for sample in samples:
            height, width = sample["image"].shape[-2:]
            # Without the truth, and in the size of the picture that was trained on.
            kept = {key: sample[key] for key in ("image", "proposals") if key in sample}
            inputs.append({**kept, "height": height, "width": width})
        with inference_context(self._model), torch.no_grad():
            return list(self._model(inputs))

    def _draw(self, sample: Mapping[str, Any], prediction: Mapping[str, Any] | None) -> np.ndarray:
        """The picture with the truth, and to its right with the prediction; (H, W, 3) uint8 RGB."""
        picture = _to_rgb(sample["image"], self._image_format)
        scale = _TRAINING_LONG_SIDE / max(picture.shape[:2])
        # What a model without a semantic head is given of that kind, it does not look at.
        is_semantic = "instances" not in sample or hasattr(self._model, "sem_seg_head")
        drawn = [_draw_truth(Visualizer(picture, self._metadata, scale=scale), sample, is_semantic)]
        if prediction is not None:
            visualizer = Visualizer(picture, self._metadata, scale=scale)
            drawn.append(draw_prediction(visualizer, prediction, self._min_score, self._max_instances))
        images = [d.get_image() for d in drawn]
        gap = np.full((images[0].shape[0], _GAP, 3), 255, np.uint8)
        return np.concatenate([images[0], *(part for image in images[1:] for part in (gap, image))], axis=1)

    def _save(self, picture: np.ndarray) -> None:
        from PIL import Image

        PathManager.mkdirs(self._folder)
        path = os.path.join(self._folder, f"iter_{self.trainer.iter:07d}.jpg")
        with PathManager.open(path, "wb") as f:
            Image.fromarray(picture).save(f, format="JPEG", quality=90)
        # Those of a run before count as well; what lies at an address is not listed, and stays.
        for old in sorted(glob.glob(os.path.join(glob.escape(self._folder), "iter_*.jpg")))[
            : -self._max_files
        ]:
            os.remove(old)


def _samples(batch: Any) -> list[Mapping[str, Any]]:
    """The dicts of a batch in the standard format; [] of another."""
    if not isinstance(batch, list | tuple):
        return []
    return [d for d in batch if isinstance(d, Mapping) and isinstance(d.get("image"), torch.Tensor)]


def _to_rgb(image: torch.Tensor, image_format: str) -> np.ndarray:
    """(C, H, W) as (H, W, 3) uint8 RGB."""
    picture = convert_image_to_rgb(image.detach().cpu().permute(1, 2, 0), image_format)
    return np.ascontiguousarray(picture.clip(0, 255).astype(np.uint8))


def _draw_truth(visualizer: Visualizer, sample: Mapping[str, Any], is_semantic: bool):
    """Draws what is annotated on a picture, the semantic map if asked for. Returns the `VisImage`."""
    output = visualizer.get_output()
    if is_semantic and "sem_seg" in sample:
        output = visualizer.draw_sem_seg(sample["sem_seg"].cpu(), draw_text="instances" not in sample)
    if "instances" in sample:
        truth = sample["instances"].to("cpu")
        fields = truth.get_fields()
        # The visualizer draws predictions; annotations have the same fields by other names.
        names = ("boxes", "classes", "masks", "keypoints")
        renamed = {f"pred_{name}": fields[f"gt_{name}"] for name in names if f"gt_{name}" in fields}
        output = visualizer.draw_instance_predictions(Instances(truth.image_size, **renamed), jittering=False)
    return output


def _stack(images: list[np.ndarray]) -> np.ndarray:
    """Puts pictures below each other, on white."""
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
    """Draws a model's predictions on pictures spread evenly over the first data set to test on.

    Args:
        cfg: a config of either kind: its output folder, test data and image format are used; of a YAML
            config with TEST.AUG.ENABLED, so is TEST.AUG.
        model: the model; its mode is as before afterwards.
        max_images: how many pictures at most.
        min_score: instances that score less are not drawn; None for the model's `default_score_threshold`.

    Returns:
        Paths of the files, ``OUTPUT_DIR/predictions/*.png``; empty on processes other than the main one.
    """
    source = _test_data(cfg) if max_images > 0 and comm.is_main_process() else None
    if source is None:
        return []
    name, dataset, input_format = source
    model = comm.unwrap(model)  # the other processes take no part
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
            stem = os.path.splitext(os.path.basename(str(sample.get("file_name", "picture"))))[0]
            path = os.path.join(folder, f"{index:05d}_{stem}.png")
            _draw_prediction_image(sample, prediction, metadata, min_score, input_format).save(path)
            paths.append(path)
    logger.info("Pictures of predictions are in %s", folder)
    return paths


def _test_data(cfg: CfgNode | Mapping[str, Any]) -> tuple[str, Any, str] | None:
    """Name, mapped data set and image format of the first data set to test on; None if there is none."""
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
    """Draws one prediction on its picture, in the picture's own size or larger."""
    picture = _image_rgb(sample, fmt)
    visualizer = Visualizer(
        picture, metadata, scale=max(1.0, _MIN_PREDICTION_LONG_SIDE / max(picture.shape[:2]))
    )
    return draw_prediction(visualizer, prediction, min_score)


def draw_prediction(
    visualizer: Visualizer, prediction: Mapping[str, Any], min_score: float, max_instances: int | None = None
):
    """Draws what a model has returned for a picture.

    Args:
        visualizer: of the picture, in the size of the prediction.
        prediction: one of the dicts that models return: with "panoptic_seg", "instances", "proposals" or
            "sem_seg", of which the first counts.
        min_score: instances that score less are not drawn.
        max_instances: how many to draw at most, best first; None for all.

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
    """The picture (H, W, 3) uint8 as the file has it, or else as the model sees it."""
    if os.path.isfile(sample.get("file_name", "")):
        return read_image(sample["file_name"], "RGB")
    image = sample["image"].to(torch.float32)[None]
    size = (sample.get("height", image.shape[2]), sample.get("width", image.shape[3]))
    image = torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=False)[0]
    picture = image.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return np.ascontiguousarray(picture[:, :, ::-1] if fmt == "BGR" else picture)
