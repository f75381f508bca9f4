"""Panoptic FPN (arXiv:1901.02446): Mask R-CNN and a semantic head on one feature pyramid.

Shape legend: R instances, K semantic classes, H and W the size of one image's output.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from detlib.config import CfgNode, configurable
from detlib.modeling.meta_arch.build import META_ARCH_REGISTRY
from detlib.modeling.meta_arch.rcnn import GeneralizedRCNN
from detlib.modeling.meta_arch.semantic_seg import build_sem_seg_head, take_sem_seg
from detlib.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detlib.structures import Instances

__all__ = ["PanopticFPN", "combine_semantic_and_instance_outputs"]


def _scale_losses(roi_heads: nn.Module, factor: float) -> None:
    """Multiply the losses of the box, mask and keypoint heads, of every stage of a cascade."""
    for name in ("box_predictor", "mask_head", "keypoint_head"):
        head: Any = getattr(roi_heads, name, None)
        for part in head if isinstance(head, nn.ModuleList) else [head]:
            weight = getattr(part, "loss_weight", None)
            if isinstance(weight, dict):
                # A loss that is missing in the dict has the weight 1.
                losses = dict.fromkeys(("loss_cls", "loss_box_reg"), 1.0) | weight
                part.loss_weight = {key: value * factor for key, value in losses.items()}
            elif weight is not None:
                part.loss_weight = weight * factor


@META_ARCH_REGISTRY.register()
class PanopticFPN(GeneralizedRCNN):
    """Mask R-CNN with a semantic head, whose outputs are merged into one segment per pixel."""

    @classmethod
    def num_classes_keys(cls, cfg: CfgNode) -> dict[str, str]:
        """See `MetaArchitecture.num_classes_keys`."""
        return super().num_classes_keys(cfg) | {"stuff_classes": "MODEL.SEM_SEG_HEAD.NUM_CLASSES"}

    @classmethod
    def outputs(cls, cfg: CfgNode) -> frozenset[str]:
        """See `MetaArchitecture.outputs`."""
        added = {"sem_seg", "panoptic_seg"} if cfg.MODEL.PANOPTIC_FPN.COMBINE.ENABLED else {"sem_seg"}
        return super().outputs(cfg) | added

    @configurable
    def __init__(
        self,
        *,
        sem_seg_head: nn.Module,
        combine_overlap_thresh: float = 0.5,
        combine_stuff_area_thresh: float = 4096,
        combine_instances_score_thresh: float = 0.5,
        combine_on: bool = True,
        **kwargs,
    ):
        """
        Args:
            sem_seg_head: maps feature maps to semantic logits and losses, see `SEM_SEG_HEADS_REGISTRY`. Its
                class 0 represents all things and never becomes a segment.
            combine_overlap_thresh: instances are dropped if a larger fraction is covered by better ones.
            combine_stuff_area_thresh: stuff with fewer pixels is dropped.
            combine_instances_score_thresh: instances below this score are not merged.
            combine_on: whether to merge; otherwise outputs have no "panoptic_seg".
            **kwargs: arguments of `GeneralizedRCNN`.
        """
        super().__init__(**kwargs)
        self.sem_seg_head = sem_seg_head
        self.combine_overlap_thresh = combine_overlap_thresh
        self.combine_stuff_area_thresh = combine_stuff_area_thresh
        self.combine_instances_score_thresh = combine_instances_score_thresh
        self.combine_on = combine_on

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.PANOPTIC_FPN
        combine = node.COMBINE
        if combine.ENABLED and not cfg.MODEL.MASK_ON:
            raise ValueError(
                "PanopticFPN merges masks: set MODEL.MASK_ON = True, or "
                "MODEL.PANOPTIC_FPN.COMBINE.ENABLED = False."
            )
        args = super().from_config(cfg)
        if node.INSTANCE_LOSS_WEIGHT != 1.0:
            _scale_losses(args["roi_heads"], node.INSTANCE_LOSS_WEIGHT)
        return args | {
            "sem_seg_head": build_sem_seg_head(cfg, args["backbone"].output_shape()),
            "combine_overlap_thresh": combine.OVERLAP_THRESH,
            "combine_stuff_area_thresh": combine.STUFF_AREA_LIMIT,
            "combine_instances_score_thresh": combine.INSTANCES_CONFIDENCE_THRESH,
            "combine_on": combine.ENABLED,
        }

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """Compute losses in training, segments otherwise.

        Args:
            batched_inputs: N dicts as for `GeneralizedRCNN.forward`, in training also with "sem_seg":
                (H_i, W_i) integer labels of "image", the semantic head's `ignore_value` for unlabeled pixels.

        Returns:
            In training a dict of scalar losses. Otherwise N dicts with

            * "instances": as returned by `GeneralizedRCNN.forward`;
            * "sem_seg": (K, height, width) logits, see `sem_seg_postprocess`;
            * "panoptic_seg": see `combine_semantic_and_instance_outputs`; only with `combine_on`.

        Raises:
            TypeError, ValueError: an input is malformed; the message names the item and the problem.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        gt_sem_seg = take_sem_seg(batched_inputs, images, self.backbone, self.sem_seg_head)
        gt_instances = self._take_ground_truth(batched_inputs)
        features = self.backbone(images.tensor)
        _, losses = self.sem_seg_head(features, gt_sem_seg)
        return losses | self._losses(images, features, batched_inputs, gt_instances)

    def inference(
        self,
        batched_inputs: list[dict],
        do_postprocess: bool = True,
        *,
        detected_instances: list[Instances] | None = None,
    ) -> Any:
        """Detect and segment.

        Args:
            batched_inputs: as for `forward`.
            do_postprocess: whether to scale the results to the output size and merge them.
            detected_instances: see `GeneralizedRCNN.inference`.

        Returns:
            As for `forward`; without `do_postprocess` the N `Instances` in pixels of "image", and the
            semantic logits (N, K, padded height, padded width).
        """
        if self.training:
            raise ValueError("PanopticFPN.inference: the model is in training mode; call eval() first.")
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        sem_seg, _ = self.sem_seg_head(features, None)
        detections = self._detect(images, features, batched_inputs, detected_instances)
        if not do_postprocess:
            return detections, sem_seg
        return [
            self.merge_outputs(
                instances, logits, size, item.get("height", size[0]), item.get("width", size[1])
            )
            for instances, logits, size, item in zip(detections, sem_seg, images.image_sizes, batched_inputs)
        ]

    def merge_outputs(
        self, instances: Instances, logits: torch.Tensor, size: tuple[int, int], height: int, width: int
    ) -> dict:
        """Scale one image's outputs to the output size and merge them.

        Args:
            instances: detections in pixels of "image".
            logits: (K, H, W) semantic logits of the padded image.
            size: (height, width) of "image".
            height: height of the output frame.
            width: width of the output frame.

        Returns:
            The image's dict, as returned by `forward`.
        """
        return self.combine_outputs(
            {
                "sem_seg": sem_seg_postprocess(logits, size, height, width),
                "instances": detector_postprocess(instances, height, width),
            }
        )

    def combine_outputs(self, output: dict) -> dict:
        """Add "panoptic_seg" if `combine_on` is set. See `MetaArchitecture.combine_outputs`."""
        if self.combine_on:
            output["panoptic_seg"] = combine_semantic_and_instance_outputs(
                output["instances"],
                output["sem_seg"].argmax(dim=0),
                self.combine_overlap_thresh,
                self.combine_stuff_area_thresh,
                self.combine_instances_score_thresh,
            )
        return output

    def _tta_predict(self, batched_inputs: list[dict]) -> list[dict]:
        detections, sem_seg = self.inference(batched_inputs, do_postprocess=False)
        sizes = [item["image"].shape[1:] for item in batched_inputs]
        return [
            {"instances": instances, "sem_seg": logits[:, :height, :width]}
            for instances, logits, (height, width) in zip(detections, sem_seg, sizes)
        ]


@torch.no_grad()
def combine_semantic_and_instance_outputs(
    instance_results: Instances,
    semantic_results: torch.Tensor,
    overlap_threshold: float,
    stuff_area_thresh: float,
    instances_score_thresh: float,
) -> tuple[torch.Tensor, list[dict]]:
    """Merge instances and stuff so that each pixel belongs to one segment at most.

    Instances come first, in descending score order, each on the pixels that are still free; then stuff gets
    the remaining pixels.

    Args:
        instance_results: R detections of one image with `scores`, `pred_classes` and `pred_masks` (R, H, W)
            bool.
        semantic_results: (H, W) integer classes; 0 represents all things and gives no segment.
        overlap_threshold: an instance is dropped if more than this fraction of it is not free.
        stuff_area_thresh: stuff with fewer free pixels is dropped.
        instances_score_thresh: instances below this score are dropped.

    Returns:
        (H, W) int32 segment ids, 0 for none; and a dict for each segment, in ascending order of ids from 1:
        "id", "isthing", "category_id" (a thing class or a semantic class), for instances "score" and
        "instance_id" (the index in `instance_results`), for stuff "area" in pixels.

    Raises:
        ValueError: the instances have no masks, or masks of another size than `semantic_results`.
    """
    if not instance_results.has("pred_masks"):
        raise ValueError(
            "Merging needs instances with 'pred_masks' (MODEL.MASK_ON), got "
            f"{sorted(instance_results.get_fields())}."
        )
    masks = instance_results.pred_masks
    if masks.shape[1:] != semantic_results.shape:
        raise ValueError(
            f"Merging needs masks of the semantic map's size {tuple(semantic_results.shape)}, got "
            f"{tuple(masks.shape)}."
        )
    sorted_scores, order = instance_results.scores.sort(descending=True, stable=True)
    count = int((sorted_scores >= instances_score_thresh).sum())
    order = order[:count].tolist()
    # Detections are usually sorted already: then nothing is copied.
    masks = masks[:count] if order == list(range(count)) else masks[order]
    owners, is_placed = _place_instances(masks.to(torch.bool), overlap_threshold)

    segments: list[dict] = []
    new_ids = [0]
    scores, classes = sorted_scores.tolist(), instance_results.pred_classes.tolist()
    for index, score, placed in zip(order, scores, is_placed.tolist()):
        if placed:
            segments.append(
                {
                    "id": len(segments) + 1,
                    "isthing": True,
                    "score": score,
                    "category_id": classes[index],
                    "instance_id": index,
                }
            )
        new_ids.append(len(segments) if placed else 0)
    panoptic_seg = _look_up(new_ids, owners)

    # Pixels of instances count as class 0, which is skipped.
    stuff = semantic_results.to(torch.int64).masked_fill(owners > 0, 0)
    areas = stuff.flatten().bincount().tolist()
    new_ids = [0] * len(areas)
    for category, area in enumerate(areas):
        if category > 0 and area > 0 and area >= stuff_area_thresh:
            new_ids[category] = len(segments) + 1
            segments.append(
                {"id": len(segments) + 1, "isthing": False, "category_id": category, "area": area}
            )
    return panoptic_seg + _look_up(new_ids, stuff), segments


def _look_up(table: Iterable[int], indices: torch.Tensor) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.int32, device=indices.device)[indices]


def _place_instances(masks: torch.Tensor, overlap_threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Assign each pixel to the first instance that covers it.

    The decisions of the loop stay on the device, so a GPU is synchronized only once, before it.

    Args:
        masks: (R, H, W) bool, best first.
        overlap_threshold: see `combine_semantic_and_instance_outputs`.

    Returns:
        (H, W) int64, 1 + the index of the pixel's instance, or 0; and (R,) bool, which instances were placed.
    """
    owners = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device)
    is_placed = torch.zeros(len(masks), dtype=torch.bool, device=masks.device)
    for i, (top, bottom, left, right) in enumerate(_extents(masks)):
        if bottom <= top:
            continue
        owner, mask = owners[top:bottom, left:right], masks[i, top:bottom, left:right]
        visible = mask & (owner == 0)
        area, visible_area = mask.sum(), visible.sum()
        hidden = (area - visible_area).double() / area
        is_placed[i] = (hidden <= overlap_threshold) & (visible_area > 0)
        owner.masked_fill_(visible & is_placed[i], i + 1)
    return owners, is_placed


def _extents(masks: torch.Tensor) -> list[list[int]]:
    """Return the bounds of each mask (R, H, W): top, bottom, left, right; all 0 for empty masks."""
    ends = []
    for dim in (2, 1):
        hit = masks.view(torch.uint8).amax(dim=dim)  # much faster than any() on the CPU
        first, last = hit.argmax(dim=1), hit.shape[1] - hit.flip(1).argmax(dim=1)
        ends += [first, last * hit.amax(dim=1)]
    return torch.stack(ends, dim=1).tolist()
