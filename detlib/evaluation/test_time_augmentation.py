"""Test-time augmentation: a model predicts on several views of an image, and the results are merged.

A view is the image in another size, flipped or not. The boxes of all views are transformed back to the image
and merged by NMS. Each box that is kept becomes the average of those that overlap it (box voting, section 4
of arXiv:1505.01749). Masks, keypoints and semantic maps are averaged.

Shape legend: R detections, K classes or keypoints, C channels, H and W the size of the output, M and S the
sides of predicted masks and heatmaps.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn

from detlib.config import CfgNode, configurable
from detlib.data import transforms as T  # noqa: N812 (the name that mappers use)
from detlib.data.detection_utils import create_keypoint_hflip_indices, read_image
from detlib.modeling.meta_arch import META_ARCH_REGISTRY, facts_of
from detlib.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detlib.modeling.roi_heads.keypoint_head import keypoint_rcnn_inference
from detlib.structures import Boxes, Instances, RotatedBoxes
from detlib.utils import comm
from detlib.utils.file_io import PathManager

__all__ = ["DatasetMapperTTA", "GeneralizedRCNNWithTTA"]

# If a view has only these transforms, its maps can be transformed back by flipping and scaling.
_FLIPS = {T.HFlipTransform: -1, T.VFlipTransform: -2}
_PLAIN = (T.NoOpTransform, T.ResizeTransform, T.ColorTransform)

# Boxes vote on a kept box if their IoU reaches this, or the threshold of NMS if that is higher.
_VOTE_THRESH = 0.7


class DatasetMapperTTA:
    """Generates the views of an image: each size, and each size flipped."""

    @configurable
    def __init__(self, min_sizes: list[int], max_size: int, flip: bool):
        """
        Args:
            min_sizes: lengths of the views' shorter sides, in pixels.
            max_size: maximum length of the longer side.
            flip: whether to add a horizontally flipped view of each size.

        Raises:
            ValueError: there is no size, or a size is not positive.
        """
        if len(min_sizes) == 0 or min(min_sizes) < 1 or max_size < 1:
            raise ValueError(
                "DatasetMapperTTA needs positive min_sizes (TEST.AUG.MIN_SIZES) and max_size "
                f"(TEST.AUG.MAX_SIZE), got {list(min_sizes)} and {max_size}"
            )
        self.min_sizes = min_sizes
        self.max_size = max_size
        self.flip = flip

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        aug = cfg.TEST.AUG
        return {"min_sizes": aug.MIN_SIZES, "max_size": aug.MAX_SIZE, "flip": aug.FLIP}

    def __call__(self, dataset_dict: dict) -> list[dict]:
        """Generate the views.

        Args:
            dataset_dict: a dict with "image", a (C, H', W') tensor, and "height" and "width", the size of the
                output frame. It is not changed.

        Returns:
            For each view a copy of the dict with its own "image", and with "transforms", a `TransformList`
            from the output frame to the view.
        """
        image = np.ascontiguousarray(dataset_dict["image"].permute(1, 2, 0).cpu().numpy())
        frame, size = (dataset_dict["height"], dataset_dict["width"]), image.shape[:2]
        before = T.NoOpTransform() if frame == size else T.ResizeTransform(*frame, *size)
        views = []
        for min_size in self.min_sizes:
            resize = T.ResizeShortestEdge(min_size, self.max_size).get_transform(image)
            resized = resize.apply_image(image)
            views.append((resized, [before, resize]))
            if self.flip:
                flip = T.HFlipTransform(resized.shape[1])
                views.append((flip.apply_image(resized), [before, resize, flip]))
        return [
            {
                **dataset_dict,
                "image": torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1))),
                "transforms": T.TransformList(transforms),
            }
            for view, transforms in views
        ]


def _flipped_axes(transforms: T.Transform) -> list[int]:
    """Return the axes of a view's (..., H, W) maps to flip when they are transformed back.

    Raises:
        ValueError: there is a transform other than scaling, flipping and color.
    """
    counts = {-1: 0, -2: 0}
    for transform in getattr(transforms, "transforms", [transforms]):
        if type(transform) in _FLIPS:
            counts[_FLIPS[type(transform)]] += 1
        elif not isinstance(transform, _PLAIN):
            raise ValueError(
                "Masks, keypoints and semantic maps can be averaged over views that are scaled, flipped or "
                f"recolored; the mapper made one with a {type(transform).__name__}"
            )
    return [axis for axis, count in counts.items() if count % 2]


def _transform_boxes(boxes: Boxes, transform: T.Transform) -> Boxes:
    """Return the boxes in another frame, with the same type, dtype and device."""
    coordinates = boxes.tensor.double().cpu().numpy()
    if isinstance(boxes, RotatedBoxes):
        moved = transform.apply_rotated_box(coordinates)
    else:
        moved = transform.apply_box(coordinates)
    return type(boxes)(torch.as_tensor(moved).to(boxes.tensor))


def _vote(instances: Instances, keep: torch.Tensor, nms_thresh: float) -> Boxes:
    """Return the boxes at the indices `keep`, each averaged with those that overlap it, weighted by score."""
    boxes, classes = instances.pred_boxes, instances.pred_classes
    votes = boxes[keep].pairwise_iou(boxes) >= max(_VOTE_THRESH, nms_thresh)
    votes &= classes[keep][:, None] == classes
    votes[torch.arange(len(keep), device=keep.device), keep] = True
    scores = instances.scores.clamp(min=torch.finfo(instances.scores.dtype).tiny).to(boxes.tensor.dtype)
    weights = votes * (scores / scores.max() if len(scores) else scores)
    return type(boxes)((weights @ boxes.tensor) / weights.sum(dim=1, keepdim=True))


class GeneralizedRCNNWithTTA(nn.Module):
    """A detector or segmentor with test-time augmentation, called as the model itself is.

    It supports models whose class sets `MetaArchitecture.supports_tta`, and calls their `tta_` methods:

    * `GeneralizedRCNN`: boxes are merged, then the mask and keypoint heads run on the merged boxes in every
      view, and their outputs are averaged.
    * `PanopticFPN`: in addition the semantic maps are averaged; then both are merged as without augmentation.
    * RetinaNet, FCOS: boxes are merged.
    * `SemanticSegmentor`: the semantic maps are averaged.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        tta_mapper: Callable[[dict], list[dict]] | None = None,
        batch_size: int = 3,
        *,
        box_voting: bool = True,
    ):
        """
        Args:
            cfg: the config: TEST.AUG for the views, INPUT.FORMAT for reading images, the thresholds of
                merging, and DATASETS for the keypoints that swap when flipped.
            model: the model, with its weights; must be in eval mode when called.
            tta_mapper: generates the views, see `DatasetMapperTTA.__call__`; by default
                `DatasetMapperTTA(cfg)`.
            batch_size: maximum number of views per forward pass; they all have the same size.
            box_voting: whether boxes that NMS keeps are averaged with those that overlap them; otherwise each
                is the box of one view. Rotated boxes are not averaged.

        Raises:
            TypeError: the model does not support test-time augmentation.
        """
        super().__init__()
        model = comm.unwrap(model)
        if not facts_of(model).supports_tta:
            names = sorted(name for name, x in META_ARCH_REGISTRY if getattr(x, "supports_tta", False))
            raise TypeError(
                f"Test-time augmentation (TEST.AUG.ENABLED) does not support {type(model).__name__}; a model "
                f"that does has supports_tta = True in its class, such as {', '.join(names)}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.cfg = cfg.clone()
        self.model = model
        self.tta_mapper = DatasetMapperTTA(cfg) if tta_mapper is None else tta_mapper
        self.batch_size = batch_size
        self.box_voting = box_voting

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Predict on several views of each image and merge the results.

        Args:
            batched_inputs: dicts as for the model. The views are generated from the original image: "image"
                if its size is "height" x "width" or these are missing, otherwise the image in "file_name".
                Without such a file, "image" is used.

        Returns:
            The model's outputs in the frame of "height" and "width". Semantic maps are the logarithms of the
            averaged probabilities, which are logits again.

        Raises:
            ValueError: the model is in training mode, or a dict has neither "image" nor "file_name".
        """
        if self.model.training:
            raise ValueError("Test-time augmentation: the model is in training mode; call eval() first.")
        return [self._predict(self._with_original_image(item)) for item in batched_inputs]

    def _with_original_image(self, item: Mapping) -> dict:
        item = dict(item)
        image = item.get("image")
        frame = (item.get("height"), item.get("width"))
        if image is None and "file_name" not in item:
            raise ValueError(f"An input needs 'image' or 'file_name', got only {sorted(item)}")
        # A float image differs from that in the file.
        is_resized = image is not None and None not in frame and tuple(image.shape[1:]) != frame
        if image is None or (
            is_resized and image.dtype == torch.uint8 and PathManager.isfile(item.get("file_name", ""))
        ):
            array = read_image(item["file_name"], format=self.cfg.INPUT.FORMAT)
            original = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
            if image is None or original.shape[0] == image.shape[0]:
                item["image"] = original
        for key, size in zip(("height", "width"), item["image"].shape[1:]):
            item.setdefault(key, size)
        return item

    def _predict(self, item: dict) -> dict:
        views = self.tta_mapper(item)
        frame = (item["height"], item["width"])
        detections: list[tuple] = []
        total: Any = 0
        num_maps = 0
        for view, output in self._run(views, self.model.tta_predict):
            if "instances" in output:
                detections.append((view, output["instances"]))
            if "sem_seg" in output:
                total = total + self._map_probabilities(view, output["sem_seg"], frame)
                num_maps += 1
        merged: dict = {}
        if num_maps:
            mean = total / num_maps
            merged["sem_seg"] = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
        if detections:
            instances = self._merge(detections, frame)
            self._add_masks_and_keypoints(views, instances)
            merged["instances"] = detector_postprocess(instances, *frame)
        return self.model.combine_outputs(merged)

    def _run(self, views: list[dict], function: Callable, *extra: list) -> Iterator[tuple[dict, Any]]:
        """Call `function` with batches of views and of their `extra` arguments; yield the results by view.

        A batch has views of one size only, as padding would change the predictions near the border.
        """
        rows = list(zip(views, *extra, strict=True))
        for _, group in groupby(rows, key=lambda row: row[0]["image"].shape):
            group = list(group)
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                inputs = [self._model_input(view) for view, *_ in batch]
                outputs = function(inputs, *[list(column) for column in list(zip(*batch))[1:]])
                yield from zip((view for view, *_ in batch), outputs, strict=True)

    def _model_input(self, view: Mapping) -> dict:
        """Return the model's input dict of a view, in the view's own frame."""
        out = {"image": view["image"]}
        if "proposals" in view:
            size, given = tuple(view["image"].shape[1:]), view["proposals"]
            height, width = given.image_size
            to_frame = T.ResizeTransform(height, width, view["height"], view["width"])
            boxes = _transform_boxes(given.proposal_boxes, T.TransformList([to_frame, view["transforms"]]))
            boxes.clip(size)
            out["proposals"] = Instances(size, **given.get_fields())
            out["proposals"].proposal_boxes = boxes
        return out

    def _merge(self, detections: list[tuple[dict, Instances]], frame: tuple[int, int]) -> Instances:
        """Return the best detections of all views in the output frame, after NMS in each class."""
        in_frame = []
        for view, instances in detections:
            boxes = _transform_boxes(instances.pred_boxes, view["transforms"].inverse())
            fields = {"scores": instances.scores, "pred_classes": instances.pred_classes}
            in_frame.append(Instances(frame, pred_boxes=boxes, **fields))
        merged = Instances.cat(in_frame)
        merged.pred_boxes.clip(frame)
        nms_thresh, limit = self.model.tta_merge_limits(self.cfg)
        keep = merged.pred_boxes.batched_nms(merged.scores, merged.pred_classes, nms_thresh)
        keep = keep[:limit] if limit >= 0 else keep
        result = merged[keep]
        if self.box_voting and not isinstance(merged.pred_boxes, RotatedBoxes):
            result.pred_boxes = _vote(merged, keep, nms_thresh)
        return result

    def _add_masks_and_keypoints(self, views: list[dict], merged: Instances) -> None:
        """Run the other heads on the merged boxes in each view and add their averages, in place."""
        fields = self.model.tta_fields()
        mask_on, keypoint_on = "pred_masks" in fields, "pred_keypoint_heatmaps" in fields
        if not (mask_on or keypoint_on):
            return
        if keypoint_on:
            swap = self._keypoint_swap(views)
        given = []
        for view in views:
            boxes = _transform_boxes(merged.pred_boxes, view["transforms"])
            given.append(Instances(tuple(view["image"].shape[1:]), pred_boxes=boxes))
            given[-1].set("pred_classes", merged.pred_classes)
        masks, heatmaps = [], []
        for view, output in self._run(views, self.model.tta_predict_for_boxes, given):
            axes = _flipped_axes(view["transforms"])
            if mask_on:
                masks.append(output.pred_masks.flip(axes))
            if keypoint_on and (len(axes) != 1 or swap is not None):
                maps = output.pred_keypoint_heatmaps.flip(axes)
                heatmaps.append(maps[:, swap] if len(axes) == 1 else maps)
        if mask_on:
            merged.pred_masks = torch.stack(masks).mean(dim=0)
        if keypoint_on:
            keypoint_rcnn_inference(torch.stack(heatmaps).mean(dim=0), [merged])

    def _keypoint_swap(self, views: list[dict]) -> list[int] | None:
        """Return the keypoint that each keypoint becomes in a flipped view; None if no view is flipped.

        Raises:
            ValueError: views are flipped, and no dataset's metadata has the order.
        """
        if not any(len(_flipped_axes(view["transforms"])) == 1 for view in views):
            return None
        for names in (self.cfg.DATASETS.TEST, self.cfg.DATASETS.TRAIN):
            if names:
                return create_keypoint_hflip_indices(names)
        raise ValueError(
            "Flipped views of keypoints need the left-right pairs: name a dataset with 'keypoint_flip_map' "
            "in DATASETS.TEST, or set TEST.AUG.FLIP = False"
        )

    def _map_probabilities(self, view: dict, logits: torch.Tensor, frame: tuple[int, int]) -> torch.Tensor:
        """Return the class probabilities (K, H, W) of a view's pixels in the output frame.

        Args:
            view: the view.
            logits: (K, height, width), in the view's frame.
            frame: (H, W).
        """
        logits = logits.flip(_flipped_axes(view["transforms"]))
        return sem_seg_postprocess(logits, (logits.shape[1], logits.shape[2]), *frame).softmax(dim=0)
