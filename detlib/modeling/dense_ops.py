"""What all dense detectors do with their maps: flatten, choose the best, decode, and weigh against the truth.

RPN uses it, and every other detector that predicts on anchors or points can.

Shape legend: N images, L feature levels, H and W one level's size, A anchors per pixel, R = H*W*A anchors of
one level (or of all levels), K numbers per anchor, B numbers per box, T chosen boxes.
"""

import torch

from detlib.modeling.box_regression import box_regression_loss

__all__ = [
    "decode_top_predictions",
    "dense_box_regression_loss",
    "gather_rows",
    "permute_to_N_HWA_K",
    "top_per_level",
]


def permute_to_N_HWA_K(tensor: torch.Tensor, K: int) -> torch.Tensor:
    """Turn a convolution's output into one row for each anchor.

    Args:
        tensor: (N, A*K, H, W): K numbers for each of A anchors.
        K: numbers for one anchor.

    Returns:
        (N, H*W*A, K) tensor; rows in the order of a contiguous (H, W, A) tensor, as the anchors are.

    Raises:
        ValueError: not four dimensions, or channels that are no multiple of K.
    """
    if tensor.dim() != 4 or tensor.shape[1] % K:
        raise ValueError(f"expected (N, A*{K}, H, W), got the shape {tuple(tensor.shape)}")
    n, channels, height, width = tensor.shape
    tensor = tensor.view(n, channels // K, K, height, width).permute(0, 3, 4, 1, 2)
    return tensor.reshape(n, height * width * (channels // K), K)


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take rows of each image: (N, R, B) by (N, T) int64 gives (N, T, B)."""
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[-1]))


def top_per_level(scores: list[torch.Tensor], topk: int):
    """The best predictions of each level and image.

    Args:
        scores: L tensors (N, R).
        topk: how many to choose on each level and image; all where there are fewer.

    Returns:
        top_scores: (N, T) float32, T the number chosen on all levels together; falling within a level.
        indices: L tensors (N, T_l) int64 of rows of the level.
        level_ids: (T,) int64, the level of each.
    """
    chosen = [s.topk(min(s.shape[1], topk), dim=1) for s in scores]
    top_scores = torch.cat([c.values.float() for c in chosen], dim=1)
    level_ids = torch.cat(
        [torch.full((c.indices.shape[1],), i, device=top_scores.device) for i, c in enumerate(chosen)]
    )
    return top_scores, [c.indices for c in chosen], level_ids


def decode_top_predictions(anchors, scores, deltas, box2box_transform, topk: int):
    """Choose the best predictions of each level, and decode these only.

    Args:
        anchors: L sets of R boxes, the same for all images.
        scores: L tensors (N, R).
        deltas: L tensors (N, R, B).
        box2box_transform: what relates deltas and boxes.
        topk: how many to choose on each level and image.

    Returns:
        boxes: (N, T, B) float32, in the anchors' frame.
        top_scores: (N, T) float32.
        level_ids: (T,) int64.
    """
    top_scores, indices, level_ids = top_per_level(scores, topk)
    top_deltas = torch.cat([gather_rows(d, i) for d, i in zip(deltas, indices)], dim=1)
    top_anchors = torch.cat([a.tensor[i] for a, i in zip(anchors, indices)], dim=1)
    boxes = box2box_transform.apply_deltas(top_deltas.flatten(0, 1), top_anchors.flatten(0, 1))
    return boxes.view_as(top_anchors), top_scores, level_ids


def dense_box_regression_loss(
    anchors,
    box2box_transform,
    pred_anchor_deltas: list[torch.Tensor],
    gt_boxes: list[torch.Tensor],
    fg_idxs: tuple[torch.Tensor, torch.Tensor],
    box_reg_loss_type: str = "smooth_l1",
    smooth_l1_beta: float = 0.0,
) -> torch.Tensor:
    """The summed box loss of the foreground anchors of a batch.

    Args:
        anchors: the boxes of all levels, R together.
        box2box_transform: what relates deltas and boxes.
        pred_anchor_deltas: L tensors (N, R_l, B).
        gt_boxes: N tensors (R, B): each anchor's matched ground truth.
        fg_idxs: two int64 tensors of one length: image in [0, N) and anchor in [0, R) of each foreground.
        box_reg_loss_type: see `detlib.modeling.box_regression.box_regression_loss`.
        smooth_l1_beta: likewise.

    Returns:
        A scalar.
    """
    image_idxs, anchor_idxs = fg_idxs
    return box_regression_loss(
        box2box_transform,
        anchors.tensor[anchor_idxs],
        torch.cat(pred_anchor_deltas, dim=1)[image_idxs, anchor_idxs],
        torch.stack(gt_boxes)[image_idxs, anchor_idxs],
        box_reg_loss_type,
        smooth_l1_beta,
    )
