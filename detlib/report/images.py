"""The images on which a model does best and worst, drawn with ground truth next to predictions."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.data.detection_utils import read_image
from detlib.report.detections import Detections
from detlib.report.matching import Matches
from detlib.report.style import COLORS
from detlib.structures import BoxMode
from detlib.visualization.visualizer import Visualizer

__all__ = ["draw_comparison", "encode_image", "image_files", "rank_images"]

_SIDE = 560  # longest side of either half, in pixels
_CORRECT, _WRONG, _NEITHER = COLORS[2], COLORS[1], "#999999"
_GAP, _HEADER = 12, 26


def rank_images(scores: Mapping[str, np.ndarray], count: int) -> tuple[list[int], list[int]]:
    """Return the indices of the best images, best first, and of the worst images, worst first.

    Ties are broken by the number of objects (more is better) and of mistakes (more is worse). Images with
    neither objects nor detections are left out. No image is in both lists.

    Args:
        scores: result of `image_scores`.
        count: maximum length of each list.
    """
    known = np.flatnonzero(~np.isnan(scores["score"]))
    score, objects = scores["score"][known], scores["objects"][known]
    mistakes = objects + scores["detections"][known] - 2 * scores["correct"][known]
    best = known[np.lexsort((-objects, -score))]
    worst = known[np.lexsort((-mistakes, score))]
    num_best = min(count, (len(known) + 1) // 2)
    chosen = best[:num_best].tolist()
    return chosen, [i for i in worst.tolist() if i not in chosen][: min(count, len(known) - num_best)]


def image_files(found: Detections) -> dict[int, str]:
    """Return the image files by image id.

    Raises:
        KeyError, FileNotFoundError: the dataset is not registered, or its files do not exist.
    """
    numbers = found.ground_truth.image_numbers
    records = DatasetCatalog.get(found.dataset)
    return {numbers[r["image_id"]]: r["file_name"] for r in records if r["image_id"] in numbers}


def _boxes(rows: Sequence[dict], rotated: bool) -> np.ndarray:
    if rotated:
        from detlib.evaluation.coco_metrics import to_rotated

        return to_rotated([row["bbox"] for row in rows])
    boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
    return BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)


def _draw_half(
    image: np.ndarray, rows: Sequence[dict], labels: list[str], colors: list, found: Detections
) -> np.ndarray:
    """Draw objects on an image, (H, W, 3) uint8."""
    metadata = MetadataCatalog.get(found.dataset)
    visualizer = Visualizer(image, metadata, scale=_SIDE / max(image.shape[:2]))
    masks = keypoints = None
    # Ground-truth masks and keypoints are drawn only if the model predicts them.
    if rows and "segm" in found.tasks and all(row.get("segmentation") for row in rows):
        masks = [row["segmentation"] for row in rows]
    if rows and "keypoints" in found.tasks and all(row.get("keypoints") for row in rows):
        keypoints = np.array([row["keypoints"] for row in rows], dtype=np.float64).reshape(len(rows), -1, 3)
        keypoints[:, :, :2] += 0.5  # COCO's keypoints are pixel indices
    visualizer.overlay_instances(
        boxes=_boxes(rows, found.is_rotated),
        labels=labels,
        masks=masks,
        keypoints=keypoints,
        assigned_colors=colors,
        alpha=0.35,
    )
    return visualizer.get_output().get_image()


def draw_comparison(
    found: Detections, matches: Matches, threshold: float, image: int, file_name: str
) -> np.ndarray:
    """Draw an image twice, with its ground truth on the left and the predictions on the right.

    Matched objects are green, missed objects and false positives orange-red, crowds and detections in them
    gray.

    Args:
        found: the detections and the ground truth.
        matches: result of `match_classes`.
        threshold: minimum confidence of the drawn detections.
        image: index of the image in `found.image_ids`.
        file_name: path of the image.

    Returns:
        (H, W, 3) uint8.

    Raises:
        OSError: the image cannot be read.
    """
    pixels = read_image(file_name, "RGB")
    dts = np.flatnonzero((found.dt_image == image) & (found.dt_score >= threshold))
    gts = np.flatnonzero(found.gt_image == image)
    matched = set(matches.dt_match[dts].tolist())
    gt_labels, gt_colors = [], []
    for i in gts.tolist():
        state = "" if i in matched else " missed"
        state = " crowd" if found.gt_crowd[i] else state
        gt_labels.append(found.class_names[found.gt_class[i]] + state)
        gt_colors.append(_NEITHER if found.gt_crowd[i] else _CORRECT if i in matched else _WRONG)
    dt_labels, dt_colors = [], []
    for i in dts.tolist():
        is_correct = matches.dt_match[i] >= 0
        state = "" if is_correct or matches.dt_ignored[i] else " wrong"
        dt_labels.append(f"{found.class_names[found.dt_class[i]]} {found.dt_score[i]:.2f}{state}")
        dt_colors.append(_CORRECT if is_correct else _NEITHER if matches.dt_ignored[i] else _WRONG)
    annotations = found.ground_truth.coco["annotations"]
    left = _draw_half(pixels, [annotations[i] for i in gts.tolist()], gt_labels, gt_colors, found)
    right = _draw_half(pixels, [found.dt_results[i] for i in dts.tolist()], dt_labels, dt_colors, found)
    return _side_by_side(left, right, "ground truth", f"predictions, confidence >= {threshold:.3f}")


def _side_by_side(left: np.ndarray, right: np.ndarray, left_title: str, right_title: str) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    height, width = left.shape[:2]
    sheet = Image.new("RGB", (2 * width + _GAP, height + _HEADER), "white")
    draw = ImageDraw.Draw(sheet)
    for x, half, title in ((0, left, left_title), (width + _GAP, right, right_title)):
        draw.text((x + 2, 4), title, fill="#333333", font=ImageFont.load_default(15))
        sheet.paste(Image.fromarray(half), (x, _HEADER))
    return np.asarray(sheet)


def encode_image(image: np.ndarray, file_format: str, **kwargs: Any) -> bytes:
    """Encode an image, (H, W, 3) uint8, as "PNG" or "JPEG"."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, file_format, **kwargs)
    return buffer.getvalue()
