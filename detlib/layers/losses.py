"""IoU-based box regression losses (https://arxiv.org/abs/1911.08287), computed by torchvision.

torchvision is imported on first use, since everything else must work without it.
"""

import torch

__all__ = ["ciou_loss", "diou_loss"]


def diou_loss(
    boxes1: torch.Tensor, boxes2: torch.Tensor, reduction: str = "none", eps: float = 1e-7
) -> torch.Tensor:
    """Compute the distance IoU loss.

    It is 1 - IoU + squared distance of the centers / squared diagonal of the enclosing box.

    Args:
        boxes1, boxes2: (N, 4) boxes, x0 y0 x1 y1 with x1 >= x0 and y1 >= y0, compared row by row.
        reduction: "none", "mean" (0 if there are no boxes) or "sum".
        eps: added to denominators.

    Returns:
        (N,) losses for "none", else a scalar.
    """
    from torchvision.ops import distance_box_iou_loss

    return distance_box_iou_loss(boxes1, boxes2, reduction, eps)


def ciou_loss(
    boxes1: torch.Tensor, boxes2: torch.Tensor, reduction: str = "none", eps: float = 1e-7
) -> torch.Tensor:
    """Compute the complete IoU loss: the distance IoU loss plus a penalty for different aspect ratios.

    Args:
        boxes1, boxes2: (N, 4) boxes, x0 y0 x1 y1 with x1 >= x0 and y1 >= y0, compared row by row.
        reduction: "none", "mean" (0 if there are no boxes) or "sum".
        eps: added to denominators.

    Returns:
        (N,) losses for "none", else a scalar.
    """
    from torchvision.ops import complete_box_iou_loss

    return complete_box_iou_loss(boxes1, boxes2, reduction, eps)
