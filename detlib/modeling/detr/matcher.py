"""Bipartite matching of queries and objects with minimal cost (Carion et al., arXiv:2005.12872).

Shape legend: L layers of predictions, N images, Q queries, K classes, M the largest number of objects per
image, P matched pairs in a batch.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from detlib.layers import box_cxcywh_to_xyxy
from detlib.layers.box_ops import broadcast_giou
from detlib.modeling.config_checks import check_choice

__all__ = ["HungarianMatcher", "Matches", "class_cost", "flat_matches"]

_COST_TYPES = ("ce_cost", "focal_loss_cost")
_UNLIKELY = 1e6
"""The replacement of non-finite costs: a diverged model is reported by its loss, not by the matcher."""


class Matches(list):
    """The matches of one layer: for each image a pair of int64 tensors, queries and their matched objects.

    Attributes:
        flat: (3, P) int64, the same matches in one tensor: indices of the image, the query, and the object
            in the concatenation of all images' objects.
    """

    flat: torch.Tensor

    @classmethod
    def on_device(
        cls, layers: Sequence[Sequence[tuple]], num_objects: Sequence[int], device: torch.device
    ) -> list["Matches"]:
        """Create the matches of L layers, with one transfer to the device.

        Args:
            layers: for each layer and image, two int arrays of equal length: queries, and objects of the
                image.
            num_objects: the number of objects of each image.
            device: device of the matches.
        """
        offsets = np.cumsum([0, *num_objects[:-1]])
        blocks = [
            np.stack([np.full(len(queries), image), queries, objects + offsets[image]])
            for layer in layers
            for image, (queries, objects) in enumerate(layer)
        ]
        sizes = [block.shape[1] for block in blocks]
        table = torch.from_numpy(np.concatenate([*blocks, np.zeros((3, 0))], axis=1).astype(np.int64))
        table = table.to(device, non_blocking=True)
        found, start, num_images = [], 0, len(num_objects)
        for i in range(len(layers)):
            own = sizes[i * num_images : (i + 1) * num_images]
            matches = cls()
            matches.flat = table[:, start : start + sum(own)]
            for size, offset in zip(own, offsets):
                matches.append((table[1, start : start + size], table[2, start : start + size] - int(offset)))
                start += size
            found.append(matches)
        return found


def flat_matches(indices: Sequence, targets: Sequence[Mapping]) -> torch.Tensor:
    """Return the pairs of `HungarianMatcher.forward` as one tensor, see `Matches.flat`."""
    if isinstance(indices, Matches):
        return indices.flat
    rows, offset = [], 0
    for image, ((queries, objects), target) in enumerate(zip(indices, targets)):
        rows.append(torch.stack([torch.full_like(queries, image), queries, objects + offset]))
        offset += len(target["labels"])
    return torch.cat(rows, dim=1).to(targets[0]["labels"].device)


def class_cost(
    logits: torch.Tensor, labels: torch.Tensor, kind: str, alpha: float = 0.25, gamma: float = 2.0
) -> torch.Tensor:
    """Return the classification cost of matching each query with each object.

    Args:
        logits: (..., Q, K) floating point; for "ce_cost" the last class is the background.
        labels: (..., M) int64 classes.
        kind: "focal_loss_cost", the focal loss of the class as a positive minus that as a negative; or
            "ce_cost", the negative probability of the class.
        alpha, gamma: parameters of the focal loss, see `detlib.modeling.focal_loss.focal_loss_sum`.

    Returns:
        (..., Q, M).
    """
    index = labels[..., None, :].expand(*logits.shape[:-1], -1)
    if kind == "ce_cost":
        return -logits.softmax(dim=-1).gather(-1, index)
    p = logits.gather(-1, index).sigmoid()
    eps = 1e-8
    background = (1 - alpha) * p**gamma * -(1 - p + eps).log()
    return alpha * (1 - p) ** gamma * -(p + eps).log() - background


class HungarianMatcher(nn.Module):
    """The matcher of each object of an image with one query, with the minimal total cost.

    The costs of all layers and images are transferred to the host in one copy.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        cost_class_type: str = "focal_loss_cost",
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        """
        Args:
            cost_class: weight of the class cost.
            cost_bbox: weight of the L1 distance of boxes.
            cost_giou: weight of the negative generalized IoU.
            cost_class_type: "focal_loss_cost" or "ce_cost", see `class_cost`.
            alpha, gamma: parameters of the focal loss.

        Raises:
            ValueError: `cost_class_type` is unknown, or all weights are 0.
        """
        super().__init__()
        check_choice(cost_class_type, _COST_TYPES, "HungarianMatcher's cost_class_type")
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("one of HungarianMatcher's cost_class, cost_bbox and cost_giou must not be 0")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.cost_class_type = cost_class_type
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, outputs: Mapping, targets: Sequence[Mapping]) -> Matches:
        """Match one layer.

        Args:
            outputs: a dict with "pred_logits" (N, Q, K) and "pred_boxes" (N, Q, 4) as cx, cy, w, h.
            targets: N dicts with "labels" (M_i,) int64 and "boxes" (M_i, 4), in the same coordinates as
                "pred_boxes".

        Returns:
            N pairs of int64 tensors of min(Q, M_i) entries: queries in ascending order, and their objects.
        """
        return self.match_layers([outputs], [targets])[0]

    @torch.no_grad()
    def match_layers(self, outputs: Sequence[Mapping], targets: Sequence[Sequence[Mapping]]) -> list[Matches]:
        """Match L layers of the same N images.

        Args:
            outputs: L dicts, see `forward`.
            targets: the targets of each layer, see `forward`. Layers that share the same list are faster.

        Returns:
            The matches of each layer, on the device of the predictions.
        """
        groups: dict[tuple, list[int]] = {}
        for i, (layer, layer_targets) in enumerate(zip(outputs, targets)):
            groups.setdefault((layer["pred_logits"].shape, id(layer_targets)), []).append(i)
        num_objects = [len(target["labels"]) for target in targets[0]]
        device = outputs[0]["pred_logits"].device
        costs = [
            self.cost(
                torch.stack([outputs[i]["pred_logits"] for i in members]),
                torch.stack([outputs[i]["pred_boxes"] for i in members]),
                targets[members[0]],
            )
            for members in groups.values()
        ]
        on_host = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
        layers: list = [None] * len(outputs)
        start = 0
        for members, cost in zip(groups.values(), costs):
            tables = on_host[start : start + cost.numel()].reshape(cost.shape)
            start += cost.numel()
            for i, table in zip(members, tables):
                layers[i] = [_assign(t[:, :count]) for t, count in zip(table, num_objects)]
        return Matches.on_device(layers, num_objects, device)

    def cost(self, logits: torch.Tensor, boxes: torch.Tensor, targets: Sequence[Mapping]) -> torch.Tensor:
        """Return the cost of matching each query with each object of its image.

        Args:
            logits: (L, N, Q, K).
            boxes: (L, N, Q, 4).
            targets: N dicts, see `forward`.

        Returns:
            (L, N, Q, M), float32, or float64 for float64 predictions. Entries beyond the number of an image's
            objects are meaningless.
        """
        dtype = torch.promote_types(boxes.dtype, torch.float32)
        logits, boxes = logits.to(dtype), boxes.to(dtype)
        labels = pad_sequence([t["labels"] for t in targets], batch_first=True).expand(len(logits), -1, -1)
        gt_boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True).to(dtype)
        giou = broadcast_giou(
            box_cxcywh_to_xyxy(boxes)[:, :, :, None], box_cxcywh_to_xyxy(gt_boxes)[:, None, :]
        )
        distance = torch.cdist(boxes, gt_boxes.expand(len(boxes), -1, -1, -1), p=1)
        by_class = class_cost(logits, labels, self.cost_class_type, self.alpha, self.gamma)
        cost = self.cost_bbox * distance + self.cost_class * by_class - self.cost_giou * giou
        return cost.nan_to_num(nan=_UNLIKELY, posinf=_UNLIKELY, neginf=-_UNLIKELY)

    def extra_repr(self) -> str:
        return (
            f"cost_class={self.cost_class}, cost_bbox={self.cost_bbox}, cost_giou={self.cost_giou}, "
            f"cost_class_type={self.cost_class_type!r}"
        )


def _assign(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(cost)
