"""Contrastive denoising (DINO, arXiv:2203.03605, section 3.3): queries made from objects, with noise put on.

Shape legend: N images, K classes, C channels, M objects of the image that has most, G groups, Q queries that
are matched as usual, D = 2 * M * G denoising queries.

Denoising queries stand before the others, group by group: in each M positive ones, which shall find their
object again, then M negative ones, of which the noise is larger and which shall say that there is nothing.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from detlib.layers import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, inverse_sigmoid
from detlib.modeling.detr.matcher import Matches

__all__ = [
    "apply_box_noise",
    "apply_label_noise",
    "denoising_attention_mask",
    "denoising_matches",
    "make_denoising_queries",
    "num_denoising_groups",
]


def num_denoising_groups(dn_number: int, most_objects: int) -> int:
    """How many groups there are, so that there are about 2 * `dn_number` queries.

    Below 50 `dn_number` is half the number of groups itself, whatever the number of objects.

    Args:
        dn_number: see above, at least 1.
        most_objects: M, at least 1.
    """
    groups = 2 * dn_number
    return max(groups // (2 * most_objects), 1) if groups >= 100 else groups


def apply_label_noise(
    labels: torch.Tensor, label_noise_prob: float = 0.2, num_classes: int = 80
) -> torch.Tensor:
    """Puts any class in the place of some labels.

    Args:
        labels: int64 of any shape.
        label_noise_prob: probability that a label is drawn anew, from all classes.
        num_classes: K.

    Returns:
        A tensor of the same shape; `labels` itself for a probability of 0.
    """
    if label_noise_prob <= 0:
        return labels
    chosen = torch.rand(labels.shape, device=labels.device) < label_noise_prob
    return torch.where(chosen, torch.randint_like(labels, num_classes), labels)


def apply_box_noise(
    boxes: torch.Tensor, box_noise_scale: float = 0.4, is_negative: torch.Tensor | None = None
) -> torch.Tensor:
    """Moves each side of boxes by a random part of half their width or height.

    Args:
        boxes: (..., 4) cx, cy, w, h as fractions of the image.
        box_noise_scale: how far: up to so many halves, and of negative ones by one to two times that.
        is_negative: bool that broadcasts with (...); None for no negative boxes.

    Returns:
        (..., 4), within the image; `boxes` itself for a scale of 0.
    """
    if box_noise_scale <= 0:
        return boxes
    half = torch.cat([boxes[..., 2:], boxes[..., 2:]], dim=-1) / 2
    part = torch.rand_like(boxes)
    if is_negative is not None:
        part = part + is_negative[..., None]
    sign = torch.randint_like(boxes, 2) * 2 - 1
    corners = box_cxcywh_to_xyxy(boxes) + sign * part * half * box_noise_scale
    return box_xyxy_to_cxcywh(corners.clamp(0, 1))


def denoising_attention_mask(
    num_groups: int, group_size: int, num_queries: int, device: torch.device
) -> torch.Tensor:
    """Who must not see whom: nobody outside a group sees its queries, since they tell the truth.

    Args:
        num_groups: G.
        group_size: 2 * M.
        num_queries: Q.
        device: where to.

    Returns:
        (D + Q, D + Q) bool, true where the query of the row must not see that of the column.
    """
    group = torch.arange(num_groups, device=device).repeat_interleave(group_size)
    group = torch.cat([group, group.new_full((num_queries,), -1)])
    return (group[:, None] != group) & (group >= 0)


def make_denoising_queries(
    targets: Sequence[Mapping],
    dn_number: int,
    label_noise_ratio: float,
    box_noise_scale: float,
    num_queries: int,
    num_classes: int,
    label_enc: nn.Embedding,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, int]] | tuple[None, None, None, None]:
    """The denoising queries of a batch.

    Args:
        targets: N dicts of "labels" (M_i,) int64 and "boxes" (M_i, 4): cx, cy, w, h as fractions of the
            image.
        dn_number: see `num_denoising_groups`; 0 for none.
        label_noise_ratio: twice the probability that a label is drawn anew.
        box_noise_scale: see `apply_box_noise`.
        num_queries: Q.
        num_classes: K.
        label_enc: (K, C), what stands for a class.

    Returns:
        labels: (N, D, C) embedded classes, zero for places without an object.
        boxes: (N, D, 4) logits of cx, cy, w, h, zero for places without an object.
        attn_mask: see `denoising_attention_mask`.
        meta: "single_padding", 2 * M, and "dn_num", G.
        All are None where there is nothing to make queries of.
    """
    counts = [len(t["labels"]) for t in targets]
    if dn_number <= 0 or max(counts) == 0:
        return None, None, None, None
    groups = num_denoising_groups(dn_number, max(counts))
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True)  # (N, M)
    boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True)
    ones = [torch.ones_like(t["labels"], dtype=torch.bool) for t in targets]
    exists = pad_sequence(ones, batch_first=True)

    def for_all_groups(x):  # (N, M, ...) to (N, G, 2, M, ...)
        return x[:, None, None].expand(-1, groups, 2, *x.shape[1:])

    is_negative = torch.tensor([False, True], device=boxes.device)[:, None]
    labels = apply_label_noise(for_all_groups(labels), label_noise_ratio * 0.5, num_classes)
    boxes = inverse_sigmoid(apply_box_noise(for_all_groups(boxes), box_noise_scale, is_negative))
    exists = for_all_groups(exists).flatten(1)[..., None]
    return (
        label_enc(labels.flatten(1)) * exists,
        boxes.flatten(1, 3) * exists,
        denoising_attention_mask(groups, 2 * max(counts), num_queries, boxes.device),
        {"single_padding": 2 * max(counts), "dn_num": groups},
    )


def denoising_matches(
    counts: Sequence[int], single_padding: int, dn_num: int, device: torch.device
) -> Matches:
    """The matches of denoising queries: the positive ones with their objects.

    Args:
        counts: N numbers of objects.
        single_padding: 2 * M.
        dn_num: G.
        device: where to.
    """
    starts = np.arange(dn_num)[:, None] * single_padding
    pairs = [((starts + np.arange(count)).ravel(), np.tile(np.arange(count), dn_num)) for count in counts]
    return Matches.on_device([pairs], counts, device)[0]
