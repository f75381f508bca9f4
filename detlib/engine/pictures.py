"""Pictures of predictions, to see what numbers do not say."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from detlib.config import CfgNode, instantiate
from detlib.data import MetadataCatalog, build_detection_test_loader
from detlib.data.detection_utils import read_image
from detlib.engine.checks import as_names
from detlib.engine.setup import run_setting
from detlib.evaluation import inference_context
from detlib.evaluation.test_time_augmentation import GeneralizedRCNNWithTTA
from detlib.modeling import facts_of
from detlib.utils import comm
from detlib.utils.file_io import PathManager
from detlib.visualization.visualizer import Visualizer

__all__ = ["draw_prediction", "write_prediction_pictures"]

logger = logging.getLogger(__name__)

# Labels are hard to read on smaller pictures.
_MIN_LONG_SIDE = 640


def write_prediction_pictures(
    cfg: CfgNode | Mapping[str, Any],
    model: nn.Module,
    max_pictures: int = 8,
    min_score: float | None = None,
) -> list[str]:
    """Draws a model's predictions on pictures spread evenly over the first data set to test on.

    Args:
        cfg: a config of either kind: its output folder, test data and image format are used; of a YAML
            config with TEST.AUG.ENABLED, so is TEST.AUG.
        model: the model; its mode is as before afterwards.
        max_pictures: how many pictures at most.
        min_score: instances that score less are not drawn; None for the model's `default_score_threshold`.

    Returns:
        Paths of the files, ``OUTPUT_DIR/predictions/*.png``; empty on processes other than the main one.
    """
    source = _test_data(cfg) if max_pictures > 0 and comm.is_main_process() else None
    if source is None:
        return []
    name, dataset, input_format = source
    model = comm.unwrap(model)  # the other processes take no part
    min_score = facts_of(model).default_score_threshold if min_score is None else min_score
    metadata = MetadataCatalog.get(name)
    folder = os.path.join(run_setting(cfg, "output_dir"), "predictions")
    PathManager.mkdirs(folder)

    count = min(max_pictures, len(dataset))
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
            _draw(sample, prediction, metadata, min_score, input_format).save(path)
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


def _draw(
    sample: Mapping[str, Any], prediction: Mapping[str, Any], metadata: Any, min_score: float, fmt: str
):
    """Draws one prediction on its picture, in the picture's own size or larger."""
    picture = _picture_rgb(sample, fmt)
    visualizer = Visualizer(picture, metadata, scale=max(1.0, _MIN_LONG_SIDE / max(picture.shape[:2])))
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


def _picture_rgb(sample: Mapping[str, Any], fmt: str) -> np.ndarray:
    """The picture (H, W, 3) uint8 as the file has it, or else as the model sees it."""
    if os.path.isfile(sample.get("file_name", "")):
        return read_image(sample["file_name"], "RGB")
    image = sample["image"].to(torch.float32)[None]
    size = (sample.get("height", image.shape[2]), sample.get("width", image.shape[3]))
    image = torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=False)[0]
    picture = image.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return np.ascontiguousarray(picture[:, :, ::-1] if fmt == "BGR" else picture)
