"""Visualizer: draws predictions and annotations on images.

    visualizer = Visualizer(image[:, :, ::-1], metadata, scale=1.2)
    visualizer.draw_instance_predictions(outputs["instances"]).save("result.png")

`metadata` is None or any object with some of the attributes `thing_classes`, `thing_colors`, `stuff_classes`,
`stuff_colors` (colors are RGB in [0, 255]), `keypoint_names`, `keypoint_connection_rules`.

Shapes: N objects, K keypoints, images of H x W pixels.
"""

from collections.abc import Mapping, Sequence
from enum import Enum, unique
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from detlib.structures import Boxes, BoxMode, Instances, Keypoints
from detlib.structures.panoptic import rgb_to_id
from detlib.utils.file_io import PathManager
from detlib.visualization.canvas import (
    Canvas,
    VisImage,
    change_brightness,
    default_color,
    jitter,
    rotated_corners,
)
from detlib.visualization.labels import create_text_labels
from detlib.visualization.masks import GenericMask, PanopticSegments, to_generic_masks

__all__ = ["ColorMode", "GenericMask", "VisImage", "Visualizer"]

_OFF_WHITE = (1.0, 1.0, 240.0 / 255)
_RED = (1.0, 0.0, 0.0)


@unique
class ColorMode(Enum):
    """The coloring of objects.

    Attributes:
        IMAGE: each object has its own color.
        SEGMENTATION: objects of a class have similar colors, taken from `metadata.thing_colors`.
        IMAGE_BW: like IMAGE, but the image is gray outside the object masks.
    """

    IMAGE = 0
    SEGMENTATION = 1
    IMAGE_BW = 2


class Visualizer(Canvas):
    """An image with methods to draw predictions and annotations. Every method returns the VisImage.

    Colors depend on the order of the objects only, so the same input gives the same drawing.
    """

    keypoint_threshold = 0.05

    def __init__(self, img_rgb, metadata=None, scale=1.0, instance_mode=ColorMode.IMAGE, font_size_scale=1.0):
        """Create the visualizer of an image.

        Args:
            img_rgb: (H, W, 3) RGB image in [0, 255].
            metadata: class names and colors, see the top of the module.
            scale: size of the output relative to the image.
            instance_mode: coloring of the objects.
            font_size_scale: factor on the default font size, which depends on the image size.
        """
        super().__init__(img_rgb, scale, font_size_scale)
        self.metadata = SimpleNamespace() if metadata is None else metadata
        self._instance_mode = ColorMode(instance_mode)

    def draw_instance_predictions(
        self,
        predictions: Instances,
        jittering: bool = True,
        *,
        show_labels: bool = True,
        show_scores: bool = True,
        font_size: float | None = None,
        alpha: float | None = None,
        class_colors: Mapping | Sequence | None = None,
    ):
        """Draw the instance predictions of a model.

        Args:
            predictions: Instances with some of the fields "pred_boxes", "pred_classes", "scores",
                "pred_masks", "pred_keypoints".
            jittering: whether the colors of a class vary slightly in the SEGMENTATION mode.
            show_labels: whether to draw labels.
            show_scores: whether the labels include scores.
            font_size: font size in points at scale 1; by default it depends on the image and object sizes.
            alpha: opacity of masks; by default it depends on the mode.
            class_colors: matplotlib color of each class, as a list or as a dict by class id or name. Classes
                missing in a dict keep their default color.

        Raises:
            ValueError: `class_colors` is a list and too short.
        """
        predictions = predictions.to("cpu")
        fields = predictions.get_fields()
        boxes = fields.get("pred_boxes")
        scores = fields["scores"].tolist() if "scores" in fields and show_scores else None
        classes = fields["pred_classes"].tolist() if "pred_classes" in fields else None
        masks = None
        if "pred_masks" in fields:
            masks = to_generic_masks(fields["pred_masks"], self.output.height, self.output.width)

        mode_alpha = 0.5
        if self._instance_mode == ColorMode.SEGMENTATION and self._class_rgb("thing", 0) is not None:
            mode_alpha = 0.8
        if self._instance_mode == ColorMode.IMAGE_BW:
            self._gray_outside(masks)
            mode_alpha = 0.3
        labels = None
        if show_labels:
            labels = create_text_labels(classes, scores, getattr(self.metadata, "thing_classes", None))
        return self.overlay_instances(
            boxes=boxes,
            labels=labels,
            masks=masks,
            keypoints=fields.get("pred_keypoints"),
            assigned_colors=self._colors_of_objects(len(predictions), classes, class_colors, jittering),
            alpha=mode_alpha if alpha is None else alpha,
            font_size=font_size,
        )

    def draw_dataset_dict(
        self,
        dic: dict,
        *,
        show_labels: bool = True,
        font_size: float | None = None,
        alpha: float | None = None,
        class_colors: Mapping | Sequence | None = None,
    ):
        """Draw the annotations of an image: segmentations first, then objects.

        Args:
            dic: image record in the standard dataset format, with some of "annotations", "sem_seg" or
                "sem_seg_file_name", "pan_seg_file_name" with "segments_info".
            show_labels, font_size, alpha, class_colors: as in `draw_instance_predictions`.
        """
        sem_seg = dic.get("sem_seg")
        if sem_seg is None and "sem_seg_file_name" in dic:
            sem_seg = _read_png(dic["sem_seg_file_name"])
        if sem_seg is not None:
            self.draw_sem_seg(
                sem_seg, area_threshold=0, alpha=0.5 if alpha is None else alpha, draw_text=show_labels
            )
        if "pan_seg_file_name" in dic:
            ids = rgb_to_id(_read_png(dic["pan_seg_file_name"], "RGB"))
            self.draw_panoptic_seg(
                torch.as_tensor(ids),
                dic["segments_info"],
                area_threshold=0,
                alpha=0.7 if alpha is None else alpha,
            )
        annotations = dic.get("annotations") or []
        if annotations:
            classes = [int(annotation["category_id"]) for annotation in annotations]
            crowd = [annotation.get("iscrowd", 0) for annotation in annotations]
            names = getattr(self.metadata, "thing_classes", None)
            self.overlay_instances(
                boxes=_annotated_boxes(annotations),
                labels=create_text_labels(classes, None, names, crowd) if show_labels else None,
                masks=_annotated_column(annotations, "segmentation", []),
                keypoints=_annotated_keypoints(annotations),
                assigned_colors=self._colors_of_objects(len(annotations), classes, class_colors, True),
                alpha=0.5 if alpha is None else alpha,
                font_size=font_size,
            )
        return self.output

    def draw_sem_seg(
        self, sem_seg, area_threshold=None, alpha=0.8, draw_text=True, edge_color=(1.0, 1.0, 240.0 / 255)
    ):
        """Draw a semantic segmentation.

        Args:
            sem_seg: (H, W) integer tensor or array of class ids; ids outside `metadata.stuff_classes` are not
                drawn.
            area_threshold: minimum number of pixels of a part; smaller parts are not drawn.
            alpha: opacity in [0, 1].
            draw_text: whether to draw class names.
            edge_color: color of the outlines.
        """
        sem_seg = _to_numpy(sem_seg)
        names = getattr(self.metadata, "stuff_classes", None)
        labels, areas = np.unique(sem_seg, return_counts=True)
        for label in labels[np.argsort(-areas, kind="stable")].tolist():
            if names is not None and not 0 <= label < len(names):
                continue
            self.draw_binary_mask(
                sem_seg == label,
                color=self._class_rgb("stuff", label) or default_color(label),
                edge_color=edge_color,
                text=(names[label] if names is not None else str(label)) if draw_text else None,
                alpha=alpha,
                area_threshold=area_threshold,
            )
        return self.output

    def draw_panoptic_seg(self, panoptic_seg, segments_info, area_threshold=None, alpha=0.7):
        """Draw a panoptic segmentation: stuff first, then things.

        Args:
            panoptic_seg: (H, W) integer tensor of segment ids.
            segments_info: one dict per segment with "id", "category_id", "isthing" and optionally
                "score"; None if the ids encode category and instance with `metadata.label_divisor`.
            area_threshold: minimum number of pixels of a stuff part; smaller parts are not drawn.
            alpha: opacity in [0, 1].
        """
        segments = PanopticSegments(_to_numpy(panoptic_seg), segments_info, self.metadata)
        if self._instance_mode == ColorMode.IMAGE_BW:
            self.output.reset_image(_gray_outside(self.img, segments.non_empty_mask()))
        stuff_names = getattr(self.metadata, "stuff_classes", None)
        for mask, info in segments.semantic_masks():
            category = info["category_id"]
            self.draw_binary_mask(
                mask,
                color=self._class_rgb("stuff", category) or default_color(category),
                edge_color=_OFF_WHITE,
                text=cast(list[str], create_text_labels([category], None, stuff_names))[0],
                alpha=alpha,
                area_threshold=area_threshold,
            )
        things = list(segments.instance_masks())
        if not things:
            return self.output
        masks, infos = zip(*things)
        classes = [info["category_id"] for info in infos]
        scores = [info["score"] for info in infos] if all("score" in info for info in infos) else None
        crowd = [info.get("iscrowd", 0) for info in infos]
        names = getattr(self.metadata, "thing_classes", None)
        rgbs = [self._class_rgb("thing", category) for category in classes]
        rng = np.random.default_rng(0)
        return self.overlay_instances(
            masks=list(masks),
            labels=create_text_labels(classes, scores, names, crowd),
            assigned_colors=[
                default_color(i) if rgb is None else jitter(rgb, rng) for i, rgb in enumerate(rgbs)
            ],
            alpha=alpha,
        )

    draw_panoptic_seg_predictions = draw_panoptic_seg

    def overlay_instances(
        self,
        *,
        boxes=None,
        labels=None,
        masks=None,
        keypoints=None,
        assigned_colors=None,
        alpha=0.5,
        font_size: float | None = None,
    ):
        """Draw objects in descending size, then their labels, so that no shape covers a label.

        Args:
            boxes: Boxes or (N, 4) array, x0, y0, x1, y1; RotatedBoxes or (N, 5) array, center x, center y,
                width, height, angle in degrees counter-clockwise; or None.
            labels: N texts, or None.
            masks: PolygonMasks, BitMasks, (N, H, W) array, or a list of N polygon lists, run-length encodings
                or (H, W) arrays; or None.
            keypoints: Keypoints or (N, K, 3) array of x, y and score or visibility; or None.
            assigned_colors: N colors; by default those of the colormap.
            alpha: opacity of masks.
            font_size: font size in points at scale 1; by default it depends on the image and object sizes.

        Raises:
            ValueError: the numbers of boxes, labels, masks, keypoints and colors differ.
        """
        boxes = None if boxes is None else _to_boxes(boxes)
        masks = None if masks is None else to_generic_masks(masks, self.output.height, self.output.width)
        keypoints = None if keypoints is None else _to_keypoints(keypoints)
        columns = {"boxes": boxes, "labels": labels, "masks": masks, "keypoints": keypoints}
        columns["assigned_colors"] = assigned_colors
        lengths = {name: len(column) for name, column in columns.items() if column is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"All arguments must have the same number of objects, got {lengths}")
        num_objects = next(iter(lengths.values()), 0)
        if assigned_colors is None:
            assigned_colors = [default_color(i) for i in range(num_objects)]

        extents = _object_extents(num_objects, boxes, masks, keypoints)
        areas = np.prod(extents[:, 2:] - extents[:, :2], axis=1)
        order = np.argsort(-areas, kind="stable").tolist()
        for i in order:
            if boxes is not None:
                draw = self.draw_rotated_box_with_label if boxes.shape[1] == 5 else self.draw_box
                draw(boxes[i], edge_color=assigned_colors[i])
            if masks is not None and masks[i].polygons:
                outlines = [p.reshape(-1, 2) for p in masks[i].polygons]
                self._draw_outlines(outlines, assigned_colors[i], None, alpha)
        if keypoints is not None:
            for i in order:
                self.draw_and_connect_keypoints(keypoints[i])
        if labels is not None:
            # Small objects have the fewest possible positions for a label, so they choose first.
            for i in reversed(order):
                center = _mask_center(masks[i]) if boxes is None and masks is not None else None
                if boxes is not None and boxes.shape[1] == 5:
                    center = tuple(
                        rotated_corners(boxes[i])[0]
                    )  # the corners of its extent are outside the box
                self._label_object(labels[i], extents[i], assigned_colors[i], font_size, center)
        return self.output

    def overlay_rotated_instances(self, boxes=None, labels=None, assigned_colors=None):
        """Draw rotated boxes in descending size, then their labels, like `overlay_instances`.

        Args:
            boxes: RotatedBoxes or (N, 5) array, center x, center y, width, height, angle in degrees
                counter-clockwise; or None.
            labels: N texts, or None.
            assigned_colors: N colors; by default those of the colormap.

        Raises:
            ValueError: the boxes are not rotated, or the numbers of boxes, labels and colors differ.
        """
        if boxes is not None:
            boxes = _to_boxes(boxes)
            if len(boxes) and boxes.shape[1] != 5:
                raise ValueError(f"rotated boxes must have shape (N, 5), got {boxes.shape}")
        return self.overlay_instances(boxes=boxes, labels=labels, assigned_colors=assigned_colors)

    def _label_object(self, label, extent, color, font_size, center):
        if font_size is None:
            # Between 0.6 and 1 times the default size, for objects with 2 % to 10 % of the image side.
            side = np.sqrt(self.output.height * self.output.width)
            ratio = (extent[3] - extent[1]) / side
            font_size = np.clip((ratio - 0.02) / 0.08 + 1, 1.2, 2) * 0.5 * self._default_font_size
        self._draw_label(
            label, extent, font_size=font_size, color=change_brightness(color, 0.7), center=center
        )

    def draw_and_connect_keypoints(self, keypoints):
        """Draw the keypoints of one object, and the connections defined in the metadata.

        Args:
            keypoints: (K, 3) array or tensor of x, y and score or visibility. Keypoints whose third value is
                not above `keypoint_threshold` are not drawn.
        """
        names = getattr(self.metadata, "keypoint_names", None)
        visible = {}
        for index, (x, y, confidence) in enumerate(_to_numpy(keypoints).tolist()):
            if confidence > self.keypoint_threshold:
                self.draw_circle((x, y), color=_RED)
                if names:
                    visible[names[index]] = np.array([x, y])
        for first, second, color in getattr(self.metadata, "keypoint_connection_rules", None) or ():
            if first in visible and second in visible:
                self._connect(visible[first], visible[second], tuple(value / 255 for value in color))
        # COCO persons get a neck (nose to mid-shoulder) and a spine (mid-shoulder to mid-hip).
        if "left_shoulder" in visible and "right_shoulder" in visible:
            shoulders = (visible["left_shoulder"] + visible["right_shoulder"]) / 2
            if "nose" in visible:
                self._connect(visible["nose"], shoulders, _RED)
            if "left_hip" in visible and "right_hip" in visible:
                self._connect(shoulders, (visible["left_hip"] + visible["right_hip"]) / 2, _RED)
        return self.output

    def _connect(self, start, end, color):
        self.draw_line([start[0], end[0]], [start[1], end[1]], color=color)

    def _class_rgb(self, kind: str, class_id: int):
        """Return the metadata color of a "thing" or "stuff" class, RGB in [0, 1], or None."""
        colors = getattr(self.metadata, f"{kind}_colors", None)
        if colors is None or not 0 <= class_id < len(colors):
            return None
        return tuple(value / 255 for value in colors[class_id])

    def _colors_of_objects(self, num_objects, classes, class_colors, jittering):
        colors = [default_color(i) for i in range(num_objects)]
        if classes is None:
            return colors
        rng = np.random.default_rng(0)
        names = getattr(self.metadata, "thing_classes", None) or ()
        for i, class_id in enumerate(classes):
            chosen = _chosen_color(class_colors, class_id, names)
            rgb = self._class_rgb("thing", class_id)
            if chosen is not None:
                colors[i] = chosen
            elif self._instance_mode == ColorMode.SEGMENTATION and rgb is not None:
                colors[i] = jitter(rgb, rng) if jittering else rgb
        return colors

    def _gray_outside(self, masks: list[GenericMask] | None) -> None:
        covered = np.zeros(self.img.shape[:2], dtype=bool)
        for mask in masks or ():
            covered |= mask.mask
        self.output.reset_image(_gray_outside(self.img, covered))


def _gray_outside(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Make the image gray where the mask is False."""
    gray = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    return np.where(mask[:, :, None], image, gray)


def _chosen_color(class_colors, class_id: int, names: Sequence[str]):
    if class_colors is None:
        return None
    if isinstance(class_colors, Mapping):
        name = names[class_id] if 0 <= class_id < len(names) else None
        return class_colors.get(class_id, class_colors.get(name))
    if not 0 <= class_id < len(class_colors):
        raise ValueError(f"class_colors has {len(class_colors)} colors and none for class {class_id}")
    return class_colors[class_id]


def _to_numpy(array: Any) -> np.ndarray:
    return array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def _to_boxes(boxes: Any) -> np.ndarray:
    """Convert boxes to an (N, 4) array, or (N, 5) if they are rotated."""
    boxes = _to_numpy(boxes.tensor if isinstance(boxes, Boxes) else boxes)
    if boxes.size == 0:
        return np.zeros((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] not in (4, 5):
        raise ValueError(f"boxes must have shape (N, 4), or (N, 5) for rotated boxes, got {boxes.shape}")
    return boxes


def _to_keypoints(keypoints: Any) -> np.ndarray:
    return _to_numpy(keypoints.tensor if isinstance(keypoints, Keypoints) else keypoints)


def _object_extents(num_objects, boxes, masks, keypoints) -> np.ndarray:
    """Return the (N, 4) extents x0, y0, x1, y1 of the boxes, else of the masks, else of the keypoints."""
    if boxes is not None:
        is_rotated = boxes.shape[1] == 5
        return BoxMode.convert(boxes, BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS) if is_rotated else boxes
    if masks is not None:
        return np.array([mask.bbox() for mask in masks]).reshape(-1, 4)
    if keypoints is not None:
        return np.concatenate([keypoints[:, :, :2].min(axis=1), keypoints[:, :, :2].max(axis=1)], axis=1)
    return np.zeros((num_objects, 4))


def _mask_center(mask: GenericMask) -> tuple[float, float] | None:
    """Return the median pixel (x, y) of a mask."""
    pixels = np.argwhere(mask.mask)
    return tuple(np.median(pixels, axis=0)[::-1].tolist()) if len(pixels) else None


def _annotated_column(annotations: list[dict], key: str, default: Any) -> list | None:
    """Return the value of a key in each annotation, or None if no annotation has the key."""
    if not any(key in annotation for annotation in annotations):
        return None
    return [annotation.get(key, default) for annotation in annotations]


def _annotated_boxes(annotations: list[dict]) -> np.ndarray | None:
    """Return the boxes, (N, 4), or (N, 5) if any is rotated; None if any annotation has no box."""
    if not all("bbox" in annotation for annotation in annotations):
        return None
    is_rotated = any(annotation["bbox_mode"] == BoxMode.XYWHA_ABS for annotation in annotations)
    mode = BoxMode.XYWHA_ABS if is_rotated else BoxMode.XYXY_ABS
    boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], mode) for a in annotations]
    return np.array(boxes, dtype=np.float64)


def _annotated_keypoints(annotations: list[dict]) -> np.ndarray | None:
    lists = _annotated_column(annotations, "keypoints", ())
    if lists is None:
        return None
    num_keypoints = max(len(keypoints) for keypoints in lists) // 3
    # All keypoints of objects without annotated keypoints are invisible.
    points = [np.asarray(k if len(k) else [0] * (3 * num_keypoints), dtype=np.float64) for k in lists]
    return np.stack(points).reshape(len(annotations), num_keypoints, 3)


def _read_png(path: str, mode: str | None = None) -> np.ndarray:
    from PIL import Image

    with PathManager.open(path, "rb") as file:
        image = Image.open(file)
        return np.asarray(image.convert(mode) if mode else image)
