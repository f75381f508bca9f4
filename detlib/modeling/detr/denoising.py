"""Contrastive denoising (DINO, arXiv:2203.03605, section 3.3): queries built from ground truth with noise.

Shape legend: N images, K classes, C channels, M the largest number of objects per image, G groups, Q matching
queries, D = 2 * M * G denoising queries.

Denoising queries precede the matching queries, group by group. Each group has M positive queries, which learn
to reconstruct their objects, then M negative queries with more noise, which learn to predict background.
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
    """Return the number of groups, chosen so that there are about 2 * `dn_number` queries.

    If `dn_number` is below 50, there are 2 * `dn_number` groups, whatever the number of objects.

    Args:
        dn_number: at least 1.
        most_objects: M, at least 1.
    """
    groups = 2 * dn_number
    return max(groups // (2 * most_objects), 1) if groups >= 100 else groups


def apply_label_noise(
    labels: torch.Tensor, label_noise_prob: float = 0.2, num_classes: int = 80
) -> torch.Tensor:
    """Replace some labels by random classes.

    Args:
        labels: int64 of any shape.
        label_noise_prob: probability that a label is replaced by one drawn from all classes.
        num_classes: K.

    Returns:
        A tensor of the same shape; `labels` itself if the probability is 0.
    """
    if label_noise_prob <= 0:
        return labels
    chosen = torch.rand(labels.shape, device=labels.device) < label_noise_prob
    return torch.where(chosen, torch.randint_like(labels, num_classes), labels)


def apply_box_noise(
    boxes: torch.Tensor, box_noise_scale: float = 0.4, is_negative: torch.Tensor | None = None
) -> torch.Tensor:
    """Shift each side of the boxes by a random fraction of half their width or height.

    Args:
        boxes: (..., 4) cx, cy, w, h as fractions of the image.
        box_noise_scale: the largest shift, as a multiple of half the width or height. Negative boxes shift
            by one to two times that.
        is_negative: bool tensor that broadcasts with (...); None if all boxes are positive.

    Returns:
        (..., 4), clipped to the image; `boxes` itself if the scale is 0.
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
    """Return a mask that hides each group of denoising queries from all other queries.

    Denoising queries contain ground truth, so other groups and the matching queries must not attend to them.

    Args:
        num_groups: G.
        group_size: 2 * M.
        num_queries: Q.
        device: device of the mask.

    Returns:
        (D + Q, D + Q) bool, true where the query of the row must not attend to the query of the column.
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
    """Build the denoising queries of a batch.

    Args:
        targets: N dicts of "labels" (M_i,) int64 and "boxes" (M_i, 4): cx, cy, w, h as fractions of the
            image.
        dn_number: see `num_denoising_groups`; 0 for none.
        label_noise_ratio: twice the probability that a label is replaced by a random one.
        box_noise_scale: see `apply_box_noise`.
        num_queries: Q.
        num_classes: K.
        label_enc: the (K, C) embedding of the classes.

    Returns:
        labels: (N, D, C) embedded classes, zero for padding queries without an object.
        boxes: (N, D, 4) logits of cx, cy, w, h, zero for padding queries without an object.
        attn_mask: see `denoising_attention_mask`.
        meta: a dict of "single_padding", 2 * M, and "dn_num", G.
        All are None if `dn_number` is 0 or the batch has no objects.
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
    """Return the matches of the denoising queries: each positive query with its object.

    Args:
        counts: N numbers of objects.
        single_padding: 2 * M.
        dn_num: G.
        device: device of the matches.
    """
    starts = np.arange(dn_num)[:, None] * single_padding
    pairs = [((starts + np.arange(count)).ravel(), np.tile(np.arange(count), dn_num)) for count in counts]
    return Matches.on_device([pairs], counts, device)[0]
