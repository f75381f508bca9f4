"""Pictures of what the model is trained on."""

import glob
import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from detlib.data.image_io import convert_image_to_rgb
from detlib.engine.pictures import draw_prediction
from detlib.engine.train_loop import HookBase
from detlib.evaluation import inference_context
from detlib.structures import Instances
from detlib.utils import comm
from detlib.utils.file_io import PathManager
from detlib.visualization.visualizer import Visualizer

__all__ = ["TrainingPictures"]

logger = logging.getLogger(__name__)

_LONG_SIDE = 512
_GAP = 4


class TrainingPictures(HookBase):
    """Draws the pictures of a batch with the truth, as the model sees them, every so many steps.

    That is: after all augmentation, with boxes (rotated ones too), masks, keypoints and semantic maps. Beside
    each picture stands the same one with what the model predicts for it by now. They go to
    ``OUTPUT_DIR/train_pictures/iter_0000499.jpg`` and as "train_pictures" into the storage, for TensorBoard.
    """

    def __init__(
        self,
        period: int,
        output_dir: str,
        *,
        image_format: str = "BGR",
        metadata: Any = None,
        model: nn.Module | None = None,
        max_pictures: int = 4,
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
            max_pictures: pictures of a batch at most.
            max_files: the last so many files are kept.
            min_score, max_instances: which predictions to draw.

        Raises:
            ValueError: if one of the numbers is below 1.
        """
        for name, value in (("period", period), ("max_pictures", max_pictures), ("max_files", max_files)):
            if value < 1:
                raise ValueError(f"TrainingPictures: {name} must be at least 1, got {value}")
        self._period = period
        self._folder = os.path.join(output_dir, "train_pictures")
        self._image_format = image_format
        self._metadata = metadata
        self._model = comm.unwrap(model)
        self._max_pictures = max_pictures
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
        samples = _samples(self.trainer.batch)[: self._max_pictures]
        if not samples:
            if not self._is_told:
                logger.warning("No training pictures are drawn: the batches are not in the standard format")
                self._is_told = True
            return
        predictions = self._predict(samples)
        if not comm.is_main_process():
            return
        picture = _stack([self._draw(s, p) for s, p in zip(samples, predictions)])
        self.trainer.storage.put_image("train_pictures", picture.transpose(2, 0, 1))
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
        scale = _LONG_SIDE / max(picture.shape[:2])
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
