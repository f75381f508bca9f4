"""The losses of DETR-like models: each query is trained on the class and box of its matched object.

Shape legend: N images, Q queries, K classes, P matched pairs in a batch.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from detlib.layers import box_cxcywh_to_xyxy
from detlib.layers.box_ops import broadcast_giou
from detlib.modeling.config_checks import check_choice
from detlib.modeling.detr.denoising import denoising_matches
from detlib.modeling.detr.matcher import flat_matches
from detlib.modeling.focal_loss import focal_loss_sum
from detlib.utils import comm

__all__ = [
    "DINOCriterion",
    "DeformableCriterion",
    "SetCriterion",
    "TwoStageCriterion",
]

_LOSS_TYPES = ("ce_loss", "focal_loss")


class SetCriterion(nn.Module):
    """The set prediction loss: bipartite matching, then class and box losses for every decoder layer.

    The losses are returned unweighted; the model multiplies them by the weights in `weight_dict`.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: Mapping[str, float],
        losses: Sequence[str] = ("class", "boxes"),
        eos_coef: float | None = 0.1,
        loss_class_type: str = "focal_loss",
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        """
        Args:
            num_classes: K, without the background.
            matcher: a `HungarianMatcher`, or a module with a compatible `match_layers` method.
            weight_dict: the weight of each loss by name, such as "loss_bbox_0".
            losses: the losses to compute: "class", "boxes" or both.
            eos_coef: weight of the background class in "ce_loss".
            loss_class_type: "focal_loss" on the sigmoids of K logits, or "ce_loss" on the softmax of K + 1
                logits with the background last.
            alpha, gamma: parameters of the focal loss, see `detlib.modeling.focal_loss.focal_loss_sum`.

        Raises:
            ValueError: `loss_class_type` is unknown.
        """
        super().__init__()
        check_choice(loss_class_type, _LOSS_TYPES, f"{type(self).__name__}'s loss_class_type")
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = dict(weight_dict)
        self.losses = list(losses)
        self.eos_coef = eos_coef
        self.loss_class_type = loss_class_type
        self.alpha = alpha
        self.gamma = gamma
        if loss_class_type == "ce_loss":
            empty_weight = torch.ones(num_classes + 1)
            empty_weight[-1] = cast(float, eos_coef)
            self.register_buffer("empty_weight", empty_weight)

    def forward(self, outputs: Mapping, targets: Sequence[Mapping], return_indices: bool = False):
        """Compute the losses of all layers.

        Args:
            outputs: the predictions of the last layer: "pred_logits" (N, Q, K, or K + 1 for "ce_loss") and
                "pred_boxes" (N, Q, 4) as cx, cy, w, h. Optionally "aux_outputs", a list of such dicts, one
                for each earlier layer.
            targets: N dicts with "labels" (M_i,) int64 and "boxes" (M_i, 4), in the same coordinates as
                "pred_boxes".
            return_indices: whether to return the matches too.

        Returns:
            dict[str, Tensor]: "loss_class", "loss_bbox" (L1) and "loss_giou". Each is a sum divided by the
            number of objects per process, averaged over all processes and at least 1; with "ce_loss",
            "loss_class" is a weighted mean over queries instead. The losses of earlier layers have the
            suffixes "_0", "_1" and so on. With `return_indices`, a pair of this dict and the list of
            matches: those of the earlier layers first, then those of the last layer.
        """
        num_boxes = self.count_boxes(targets, outputs["pred_boxes"].device)
        losses, matches = self._match_and_compare(outputs, targets, num_boxes)
        return (losses, [*matches[1:], matches[0]]) if return_indices else losses

    def _match_and_compare(self, outputs, targets, num_boxes) -> tuple[dict[str, torch.Tensor], list]:
        """Return the losses of all layers, and the matches in the order of `_layers`."""
        layers = self._layers(outputs, targets)
        matches = self.matcher.match_layers([layer for _, layer, _ in layers], [t for _, _, t in layers])
        losses = {}
        for (suffix, layer, layer_targets), indices in zip(layers, matches):
            for loss in self.losses:
                found = self.get_loss(loss, layer, layer_targets, indices, num_boxes)
                losses.update({name + suffix: value for name, value in found.items()})
        return losses, matches

    def _layers(self, outputs, targets) -> list[tuple[str, Mapping, Sequence[Mapping]]]:
        """Return a (suffix of the loss names, predictions, targets) triple for every layer."""
        others = enumerate(outputs.get("aux_outputs", ()))
        return [("", outputs, targets), *((f"_{i}", layer, targets) for i, layer in others)]

    @staticmethod
    def count_boxes(targets: Sequence[Mapping], device: torch.device) -> torch.Tensor:
        """Return the number of objects per process, averaged over all processes and at least 1: a scalar."""
        count = torch.full((), float(sum(len(t["labels"]) for t in targets)), device=device)
        world_size = comm.get_world_size()
        if world_size > 1:
            torch.distributed.all_reduce(count)
        return (count / world_size).clamp(min=1)

    def get_loss(self, loss, outputs, targets, indices, num_boxes, **kwargs) -> dict[str, torch.Tensor]:
        """Compute the loss "class" or "boxes" of one layer; see `loss_labels` for the other arguments.

        Raises:
            ValueError: `loss` is unknown.
        """
        kinds = {"class": self.loss_labels, "boxes": self.loss_boxes}
        check_choice(loss, kinds, f"{type(self).__name__}'s losses")
        return kinds[loss](outputs, targets, indices, num_boxes, **kwargs)

    def loss_labels(self, outputs, targets, indices, num_boxes) -> dict[str, torch.Tensor]:
        """Compute the classification loss of one layer.

        Args:
            outputs: a dict with "pred_logits", see `forward`.
            targets: see `forward`.
            indices: N pairs of int64 tensors: queries and the objects that they are matched to. Unmatched
                queries are background.
            num_boxes: the divisor of the loss.

        Returns:
            "loss_class", a scalar.
        """
        logits = outputs["pred_logits"]
        images, queries, objects = flat_matches(indices, targets)
        labels = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        labels[images, queries] = torch.cat([t["labels"] for t in targets])[objects]
        if self.loss_class_type == "focal_loss":
            return {"loss_class": focal_loss_sum(logits, labels, self.alpha, self.gamma) / num_boxes}
        logits = logits.to(self.empty_weight.dtype)
        return {"loss_class": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), self.empty_weight)}

    def loss_boxes(self, outputs, targets, indices, num_boxes) -> dict[str, torch.Tensor]:
        """Compute the box losses of the matched queries of one layer.

        Args:
            outputs: a dict with "pred_boxes", see `forward`.
            targets, indices, num_boxes: see `loss_labels`.

        Returns:
            "loss_bbox", the L1 distance of cx, cy, w, h; and "loss_giou", 1 - generalized IoU.
        """
        images, queries, objects = flat_matches(indices, targets)
        boxes = outputs["pred_boxes"][images, queries]
        boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
        gt_boxes = torch.cat([t["boxes"] for t in targets])[objects].to(boxes.dtype)
        giou = broadcast_giou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(gt_boxes))
        return {
            "loss_bbox": (boxes - gt_boxes).abs().sum() / num_boxes,
            "loss_giou": (1 - giou).sum() / num_boxes,
        }


class TwoStageCriterion(SetCriterion):
    """The losses of a two-stage model, whose encoder predicts the initial boxes of the queries."""

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: Mapping[str, float],
        losses: Sequence[str] = ("class", "boxes"),
        eos_coef: float | None = None,
        loss_class_type: str = "focal_loss",
        alpha: float = 0.25,
        gamma: float = 2.0,
        two_stage_binary_cls: bool = False,
    ):
        """
        Args:
            num_classes, matcher, weight_dict, losses, eos_coef, loss_class_type, alpha, gamma: see
                `SetCriterion`.
            two_stage_binary_cls: whether the encoder is class-agnostic: it only separates objects, as
                class 0, from the background.
        """
        eos_coef = 0.1 if eos_coef is None else eos_coef
        super().__init__(num_classes, matcher, weight_dict, losses, eos_coef, loss_class_type, alpha, gamma)
        self.two_stage_binary_cls = two_stage_binary_cls

    def _layers(self, outputs, targets):
        """Append the encoder's predictions, if any; their losses have the suffix "_enc"."""
        layers = super()._layers(outputs, targets)
        if "enc_outputs" in outputs:
            enc_targets = targets
            if self.two_stage_binary_cls:
                enc_targets = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
            layers.append(("_enc", outputs["enc_outputs"], enc_targets))
        return layers


class DeformableCriterion(TwoStageCriterion):
    """The losses of Deformable DETR, with a class-agnostic encoder; see `SetCriterion` for the arguments."""

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: Mapping[str, float],
        losses: Sequence[str] = ("class", "boxes"),
        eos_coef: float | None = 0.1,
        loss_class_type: str = "focal_loss",
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        super().__init__(
            num_classes,
            matcher,
            weight_dict,
            losses,
            eos_coef,
            loss_class_type,
            alpha,
            gamma,
            two_stage_binary_cls=True,
        )


class DINOCriterion(TwoStageCriterion):
    """The losses of DINO; see `TwoStageCriterion` for the arguments.

    Denoising queries are built from known objects, so they need no matching.
    """

    def forward(
        self, outputs: Mapping, targets: Sequence[Mapping], dn_metas: Mapping | None = None
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of all layers.

        Args:
            outputs: see `SetCriterion.forward`; optionally with "enc_outputs", the encoder's predictions.
            targets: see `SetCriterion.forward`.
            dn_metas: a dict that describes the denoising queries: "single_padding" and "dn_num", see
                `make_denoising_queries`, and "output_known_lbs_bboxes", their predictions in the format of
                `outputs`. None without denoising queries.

        Returns:
            The losses of `SetCriterion.forward`. Those of the encoder have the suffix "_enc", those of the
            denoising queries "_dn", "_dn_0" and so on; the latter are zero without denoising queries.
        """
        num_boxes = self.count_boxes(targets, outputs["pred_boxes"].device)
        losses, _ = self._match_and_compare(outputs, targets, num_boxes)
        aux_num = len(outputs.get("aux_outputs", ()))
        losses.update(self.compute_dn_loss(dn_metas, targets, aux_num, num_boxes))
        return losses

    def compute_dn_loss(
        self,
        dn_metas: Mapping | None,
        targets: Sequence[Mapping],
        aux_num: int,
        num_boxes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of the denoising queries.

        Args:
            dn_metas, targets: see `forward`.
            aux_num: the number of decoder layers before the last.
            num_boxes: the number of objects, see `count_boxes`.
        """
        suffixes = ["_dn", *(f"_dn_{i}" for i in range(aux_num))]
        if not dn_metas or "output_known_lbs_bboxes" not in dn_metas:
            zero = torch.zeros((), device=num_boxes.device)
            names = {"class": ("loss_class",), "boxes": ("loss_bbox", "loss_giou")}
            return {
                name + suffix: zero for suffix in suffixes for kind in self.losses for name in names[kind]
            }
        known = dn_metas["output_known_lbs_bboxes"]
        layers = [known, *known.get("aux_outputs", ())]
        counts = [len(t["labels"]) for t in targets]
        groups = dn_metas["dn_num"]
        device = known["pred_boxes"].device
        indices = denoising_matches(counts, dn_metas["single_padding"], groups, device)
        return {
            name + suffix: value
            for suffix, layer in zip(suffixes, layers)
            for kind in self.losses
            for name, value in self.get_loss(kind, layer, targets, indices, num_boxes * groups).items()
        }
