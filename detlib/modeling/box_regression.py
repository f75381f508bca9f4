"""How networks write one box relative to another, and the losses over boxes written so.

Shape legend: R boxes, K classes or other repetitions of a prediction, B numbers for one box (4 for
axis-aligned boxes, XYXY in absolute pixels; 5 for rotated ones, see `detlib.structures.RotatedBoxes`).
"""

import math

import torch
from torch.nn import functional as F

from detlib.layers.fvcore_nn import giou_loss, smooth_l1_loss
from detlib.layers.losses import ciou_loss, diou_loss

__all__ = [
    "BOX_LOSS_TYPES",
    "Box2BoxTransform",
    "Box2BoxTransformLinear",
    "Box2BoxTransformRotated",
    "box2box_transform_for",
    "box_regression_loss",
    "dense_box_regression_loss",
]

# Growth by more than 1000/16 (a large picture's side over a small stride) is a network gone wrong.
_DEFAULT_SCALE_CLAMP = math.log(1000.0 / 16)

_IOU_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}

BOX_LOSS_TYPES = ("smooth_l1", *_IOU_LOSSES)
"""What `box_regression_loss` takes as `loss_type`."""


def _check_boxes(src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> None:
    for name, boxes in (("src_boxes", src_boxes), ("target_boxes", target_boxes)):
        if not isinstance(boxes, torch.Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(boxes).__name__}")


def _check_area(src_size: torch.Tensor) -> None:
    """Raise ValueError where a source box has no area, on the CPU: a GPU would have to be waited for."""
    if src_size.device.type == "cpu" and not bool((src_size > 0).all()):
        bad = (src_size <= 0).any(dim=-1).nonzero().flatten()[:5].tolist()
        raise ValueError(f"src_boxes without area cannot be regressed from: rows {bad}")


def _wrap_degrees(angle: torch.Tensor) -> torch.Tensor:
    """The same angles within [-180, 180)."""
    return (angle + 180.0) % 360.0 - 180.0


def _split(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres and sizes, each (..., 2), of XYXY boxes."""
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size


class Box2BoxTransform:
    """The (dx, dy, dw, dh) parametrisation of R-CNN (arXiv:1311.2524).

    dx and dy shift the source's centre by that part of its width and height; its width and height grow by
    exp(dw) and exp(dh). Each number is multiplied by its weight.
    """

    box_dim: int = 4

    def __init__(
        self,
        weights: tuple[float, float, float, float],
        scale_clamp: float = _DEFAULT_SCALE_CLAMP,
    ):
        """
        Args:
            weights: factors of (dx, dy, dw, dh). Fast R-CNN has (10, 10, 5, 5), which brings the deltas near
                unit variance; RPN has (1, 1, 1, 1).
            scale_clamp: largest dw and dh (after division by the weights) that is followed.
        """
        if len(weights) != 4:
            raise ValueError(f"weights must be four numbers (dx, dy, dw, dh), got {weights!r}")
        self.weights = tuple(weights)
        self.scale_clamp = scale_clamp

    def get_deltas(self, src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        """Deltas for which `apply_deltas(deltas, src_boxes)` gives `target_boxes`.

        Args:
            src_boxes: (R, 4) boxes such as anchors or proposals.
            target_boxes: (R, 4) boxes such as ground truth.

        Returns:
            (R, 4) tensor.

        Raises:
            ValueError: a source box without area. Only boxes on the CPU are checked, for a check on a GPU
                would wait for it; there the deltas become infinite.
        """
        _check_boxes(src_boxes, target_boxes)
        src_center, src_size = _split(src_boxes)
        target_center, target_size = _split(target_boxes)
        _check_area(src_size)
        wx, wy, ww, wh = self.weights
        shift = (target_center - src_center) / src_size
        growth = torch.log(target_size / src_size)
        return torch.stack(
            (wx * shift[..., 0], wy * shift[..., 1], ww * growth[..., 0], wh * growth[..., 1]), dim=-1
        )

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Move and grow boxes.

        Args:
            deltas: (R, K*4) tensor of any float type: K sets of (dx, dy, dw, dh) for each box.
            boxes: (R, 4) boxes.

        Returns:
            (R, K*4) float32 boxes (float64 if the deltas are).
        """
        deltas = deltas if deltas.dtype == torch.float64 else deltas.float()  # half cannot hold pixels
        center, size = _split(boxes.to(deltas.dtype))
        center, size = center[:, None, :], size[:, None, :]
        wx, wy, ww, wh = self.weights
        d = deltas.reshape(len(deltas), deltas.shape[1] // 4, 4)
        shift = torch.stack((d[..., 0] / wx, d[..., 1] / wy), dim=-1)
        growth = torch.stack((d[..., 2] / ww, d[..., 3] / wh), dim=-1).clamp(max=self.scale_clamp)
        center = shift * size + center
        half = 0.5 * (torch.exp(growth) * size)
        return torch.cat((center - half, center + half), dim=-1).flatten(1)


class Box2BoxTransformRotated:
    """The (dx, dy, dw, dh, da) parametrisation of rotated boxes (arXiv:1703.01086, section IV).

    dx to dh are those of `Box2BoxTransform`, along the picture's axes and with the sides as they are before
    the turn; da is the turn from source to target in radians. Each number is multiplied by its weight.
    Angles of boxes are in degrees, counter-clockwise.
    """

    box_dim: int = 5

    def __init__(
        self,
        weights: tuple[float, float, float, float, float],
        scale_clamp: float = _DEFAULT_SCALE_CLAMP,
    ):
        """
        Args:
            weights: factors of (dx, dy, dw, dh, da); (10, 10, 5, 5, 1) suits a box head, ones an RPN.
            scale_clamp: largest dw and dh (after division by the weights) that is followed.

        Raises:
            ValueError: other than five weights.
        """
        if len(weights) != 5:
            raise ValueError(
                "weights of rotated boxes (BBOX_REG_WEIGHTS) must be five numbers (dx, dy, dw, dh, da), got "
                f"{tuple(weights)!r}"
            )
        self.weights = tuple(weights)
        self.scale_clamp = scale_clamp

    def get_deltas(self, src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        """Deltas for which `apply_deltas(deltas, src_boxes)` gives `target_boxes`, but for whole turns.

        Args:
            src_boxes: (R, 5) boxes such as anchors or proposals.
            target_boxes: (R, 5) boxes such as ground truth.

        Returns:
            (R, 5) tensor; da / weight lies in [-pi, pi).

        Raises:
            ValueError: a source box without area; see `Box2BoxTransform.get_deltas`.
        """
        _check_boxes(src_boxes, target_boxes)
        src_size = src_boxes[..., 2:4]
        _check_area(src_size)
        shift = (target_boxes[..., :2] - src_boxes[..., :2]) / src_size
        growth = torch.log(target_boxes[..., 2:4] / src_size)
        turn = _wrap_degrees(target_boxes[..., 4:] - src_boxes[..., 4:]) * (math.pi / 180)
        columns = torch.cat((shift, growth, turn), dim=-1).unbind(dim=-1)
        return torch.stack([column * weight for column, weight in zip(columns, self.weights)], dim=-1)

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Move, grow and turn boxes.

        Args:
            deltas: (R, K*5) tensor of any float type: K sets of (dx, dy, dw, dh, da) for each box.
            boxes: (R, 5) boxes.

        Returns:
            (R, K*5) float32 boxes (float64 if the deltas are), angles within [-180, 180).
        """
        deltas = deltas if deltas.dtype == torch.float64 else deltas.float()  # half cannot hold pixels
        x, y, width, height, angle = boxes.to(deltas.dtype)[:, None, :].unbind(dim=-1)
        columns = deltas.reshape(len(deltas), deltas.shape[1] // 5, 5).unbind(dim=-1)
        dx, dy, dw, dh, da = (column / weight for column, weight in zip(columns, self.weights))
        turned = [
            dx * width + x,
            dy * height + y,
            torch.exp(dw.clamp(max=self.scale_clamp)) * width,
            torch.exp(dh.clamp(max=self.scale_clamp)) * height,
            _wrap_degrees(da * (180 / math.pi) + angle),
        ]
        return torch.stack(turned, dim=-1).flatten(1)


def box2box_transform_for(weights) -> Box2BoxTransform | Box2BoxTransformRotated:
    """The transform that goes with a config's BBOX_REG_WEIGHTS: five numbers are those of rotated boxes."""
    return (Box2BoxTransformRotated if len(weights) == 5 else Box2BoxTransform)(weights=weights)


class Box2BoxTransformLinear:
    """The distances from the source's centre to the target's four sides, as in FCOS (arXiv:1904.01355)."""

    box_dim: int = 4

    def __init__(self, normalize_by_size=True):
        """
        Args:
            normalize_by_size: whether distances are in units of the source's width and height, not pixels.
        """
        self.normalize_by_size = normalize_by_size

    def _units(self, size: torch.Tensor) -> torch.Tensor:
        return torch.cat((size, size), dim=-1)

    def get_deltas(self, src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        """Deltas (left, top, right, bottom) for which `apply_deltas` gives `target_boxes`.

        Args:
            src_boxes: (R, 4) boxes; their centre must lie in the target for positive deltas.
            target_boxes: (R, 4) boxes.

        Returns:
            (R, 4) tensor.
        """
        _check_boxes(src_boxes, target_boxes)
        size = src_boxes[..., 2:] - src_boxes[..., :2]
        center = 0.5 * (src_boxes[..., :2] + src_boxes[..., 2:])
        deltas = torch.cat((center - target_boxes[..., :2], target_boxes[..., 2:] - center), dim=-1)
        return deltas / self._units(size) if self.normalize_by_size else deltas

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Boxes whose sides lie `deltas` away from the centres; negative deltas count as 0.

        Args:
            deltas: (R, K*4) tensor of any float type.
            boxes: (R, 4) boxes.

        Returns:
            (R, K*4) float32 boxes (float64 if the deltas are).
        """
        deltas = deltas if deltas.dtype == torch.float64 else deltas.float()
        boxes = boxes.to(deltas.dtype)
        size = (boxes[:, 2:] - boxes[:, :2])[:, None, :]
        center = (0.5 * (boxes[:, :2] + boxes[:, 2:]))[:, None, :]
        d = F.relu(deltas).reshape(len(deltas), deltas.shape[1] // 4, 4)
        if self.normalize_by_size:
            d = d * self._units(size)
        return torch.cat((center - d[..., :2], center + d[..., 2:]), dim=-1).flatten(1)


def check_loss_of_boxes(loss_type: str, box_dim: int, key: str = "box loss type") -> None:
    """Raise ValueError where boxes of `box_dim` numbers do not have that loss; `key` begins the message."""
    if box_dim != 4 and loss_type in _IOU_LOSSES:
        raise ValueError(
            f"{key} {loss_type!r} compares axis-aligned boxes; for rotated ones only 'smooth_l1' is legal"
        )


def box_regression_loss(
    box2box_transform,
    src_boxes: torch.Tensor,
    pred_deltas: torch.Tensor,
    target_boxes: torch.Tensor,
    loss_type: str = "smooth_l1",
    smooth_l1_beta: float = 0.0,
) -> torch.Tensor:
    """The summed loss between predicted deltas and the boxes they should lead to.

    Used by RPN, dense detectors and box heads alike.

    Args:
        box2box_transform: what relates boxes and deltas, such as `Box2BoxTransform`.
        src_boxes: (R, B) boxes that the deltas start from, in absolute pixels.
        pred_deltas: (R, B) predictions.
        target_boxes: (R, B) boxes to reach.
        loss_type: "smooth_l1" compares deltas; "giou" (arXiv:1902.09630), "diou" and "ciou"
            (arXiv:1911.08287) compare boxes, and exist for axis-aligned ones only.
        smooth_l1_beta: where smooth L1 turns from a parabola to a line; 0 is the L1 loss.

    Returns:
        A scalar with the sum over all boxes, 0 (with a gradient) where there are none.

    Raises:
        ValueError: an unknown `loss_type`, or one that rotated boxes do not have.
    """
    if loss_type == "smooth_l1":
        target_deltas = box2box_transform.get_deltas(src_boxes, target_boxes)
        return smooth_l1_loss(pred_deltas, target_deltas, beta=smooth_l1_beta, reduction="sum")
    if loss_type in _IOU_LOSSES:
        check_loss_of_boxes(loss_type, src_boxes.shape[-1])
        pred_boxes = box2box_transform.apply_deltas(pred_deltas, src_boxes)
        return _IOU_LOSSES[loss_type](pred_boxes, target_boxes, reduction="sum")
    raise ValueError(
        f"box loss type {loss_type!r}; legal are 'smooth_l1', {', '.join(map(repr, _IOU_LOSSES))}"
    )


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
        box_reg_loss_type: see `box_regression_loss`.
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
