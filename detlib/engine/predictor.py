"""Prediction on single pictures."""

import logging
from typing import Any

import numpy as np
import torch

from detlib.config import CfgNode
from detlib.data import Metadata, MetadataCatalog
from detlib.data import transforms as T
from detlib.engine.checks import as_names
from detlib.engine.ema import load_for_inference
from detlib.evaluation.test_time_augmentation import GeneralizedRCNNWithTTA
from detlib.modeling import build_model

__all__ = ["DefaultPredictor"]

logger = logging.getLogger(__name__)


class DefaultPredictor:
    """Runs a config's model, with the config's weights, on one picture after the other.

    It loads MODEL.WEIGHTS onto MODEL.DEVICE, resizes by INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST, and converts
    to INPUT.FORMAT. With TEST.AUG.ENABLED it predicts on the views of TEST.AUG instead, and merges. For whole
    data sets, a data loader and `inference_on_dataset` are faster.

    Attributes:
        metadata: of the first data set in DATASETS.TEST, for drawing; without class names where the data set
            is named by its address and is not on this machine; missing if DATASETS.TEST is empty.
        model: the model, in eval mode.
        tta: the model with test-time augmentation, or None.
        aug: the resizing.
        input_format: "BGR" or "RGB", what the model takes.

    Example:
        >>> predictor = DefaultPredictor(cfg)
        >>> instances = predictor(cv2.imread("input.jpg"))["instances"]
    """

    def __init__(self, cfg: CfgNode):
        """
        Raises:
            ValueError: if INPUT.FORMAT is neither "RGB" nor "BGR".
        """
        self.cfg = cfg.clone()
        self.input_format = cfg.INPUT.FORMAT
        if self.input_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT must be 'RGB' or 'BGR' here, got {self.input_format!r}")
        self.model = build_model(self.cfg)
        self.model.eval()
        self.tta = GeneralizedRCNNWithTTA(self.cfg, self.model) if cfg.TEST.AUG.ENABLED else None
        names = as_names(cfg.DATASETS.TEST)
        if names:
            self.metadata = _find_metadata(names[0])
        load_for_inference(self.model, cfg.MODEL.WEIGHTS, use_average=cfg.SOLVER.EMA.ENABLED)
        self.aug = T.ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST
        )

    @torch.no_grad()
    def __call__(self, original_image: np.ndarray) -> dict[str, Any]:
        """
        Args:
            original_image: (H, W, 3) uint8 in BGR order, as ``cv2.imread`` gives it; or float in 0..255.

        Returns:
            The model's output for this picture, such as ``{"instances": Instances}``, in the picture's own
            size.

        Raises:
            TypeError: if the picture is no array.
            ValueError: if it has another shape, or no pixels, or values scaled to 0..1.
        """
        _check_picture(original_image)
        if self.input_format == "RGB":
            original_image = original_image[:, :, ::-1]
        height, width = original_image.shape[:2]
        if self.tta is not None:
            image = torch.from_numpy(np.ascontiguousarray(original_image.transpose(2, 0, 1)))
            return self.tta([{"image": image, "height": height, "width": width}])[0]
        image = self.aug.get_transform(original_image).apply_image(original_image)
        # The transpose and the reversal give strides that torch cannot take.
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))
        return self.model([{"image": image, "height": height, "width": width}])[0]


def _find_metadata(name: str) -> Metadata:
    try:
        return MetadataCatalog.get(name)
    except FileNotFoundError as e:
        # A model goes where its data do not.
        logger.warning("Class names are unknown, predictions have numbers only: %s", e)
        return Metadata(name=name)


def _check_picture(image: Any) -> None:
    if image is None:
        raise TypeError("The picture is None: cv2.imread returns that for a file it cannot read")
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"The picture must be a numpy array (H, W, 3) in BGR order, got {type(image).__name__}"
        )
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"The picture must have the shape (H, W, 3), got {image.shape}")
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise TypeError(f"The picture must be uint8, or float in 0..255, got {image.dtype}")
    if image.dtype.kind == "f" and 0.0 < image.max() <= 1.0:
        raise ValueError("The picture's values lie in 0..1; the model takes 0..255")
