"""Encodings of one box relative to another, and the box regression losses.

Shape legend: R boxes, K classes or other repetitions of a prediction, B numbers per box (4 for
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

# No box grows by more than 1000/16, a large image's side over a small stride; larger deltas are clamped.
_DEFAULT_SCALE_CLAMP = math.log(1000.0 / 16)

_IOU_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}

BOX_LOSS_TYPES = ("smooth_l1", *_IOU_LOSSES)
"""The legal values of `loss_type` in `box_regression_loss`."""


def _check_boxes(src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> None:
    for name, boxes in (("src_boxes", src_boxes), ("target_boxes", target_boxes)):
        if not isinstance(boxes, torch.Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(boxes).__name__}")


def _check_area(src_size: torch.Tensor) -> None:
    """Raise ValueError if a source box has no area; on the CPU only, as the check would synchronize a GPU."""
    if src_size.device.type == "cpu" and not bool((src_size > 0).all()):
        bad = (src_size <= 0).any(dim=-1).nonzero().flatten()[:5].tolist()
        raise ValueError(f"src_boxes without area cannot be regressed from: rows {bad}")


def _wrap_degrees(angle: torch.Tensor) -> torch.Tensor:
    """Return the angles wrapped to [-180, 180)."""
    return (angle + 180.0) % 360.0 - 180.0


def _split(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the centers and sizes, each (..., 2), of XYXY boxes."""
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size


class Box2BoxTransform:
    """The (dx, dy, dw, dh) parametrization of R-CNN (arXiv:1311.2524).

    dx and dy shift the source's center by that fraction of its width and height; its width and height are
    scaled by exp(dw) and exp(dh). Each delta is multiplied by its weight.
    """

    box_dim: int = 4

    def __init__(
        self,
        weights: tuple[float, float, float, float],
        scale_clamp: float = _DEFAULT_SCALE_CLAMP,
    ):
        """
        Args:
            weights: factors of (dx, dy, dw, dh). Fast R-CNN uses (10, 10, 5, 5), which gives the deltas about
                unit variance; RPN uses (1, 1, 1, 1).
            scale_clamp: maximum of dw and dh, after division by the weights.
        """
        if len(weights) != 4:
            raise ValueError(f"weights must be four numbers (dx, dy, dw, dh), got {weights!r}")
        self.weights = tuple(weights)
        self.scale_clamp = scale_clamp

    def get_deltas(self, src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        """Return the deltas for which `apply_deltas(deltas, src_boxes)` gives `target_boxes`.

        Args:
            src_boxes: (R, 4) boxes such as anchors or proposals.
            target_boxes: (R, 4) boxes such as ground truth.

        Returns:
            (R, 4) tensor.

        Raises:
            ValueError: a source box has no area. Only boxes on the CPU are checked, as the check would
                synchronize a GPU; there the deltas become infinite.
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
        """Apply deltas to boxes.

        Args:
            deltas: (R, K*4) tensor of any float type: K sets of (dx, dy, dw, dh) for each box.
            boxes: (R, 4) boxes.

        Returns:
            (R, K*4) float32 boxes (float64 if the deltas are).
        """
        # Half precision cannot represent pixel coordinates.
        deltas = deltas if deltas.dtype == torch.float64 else deltas.float()
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
    """The (dx, dy, dw, dh, da) parametrization of rotated boxes (arXiv:1703.01086, section IV).

    dx to dh are those of `Box2BoxTransform`, along the image's axes and with the sides before the rotation;
    da is the angle from source to target in radians. Each delta is multiplied by its weight. Angles of boxes
    are in degrees, counter-clockwise.
    """

    box_dim: int = 5

    def __init__(
        self,
        weights: tuple[float, float, float, float, float],
        scale_clamp: float = _DEFAULT_SCALE_CLAMP,
    ):
        """
        Args:
            weights: factors of (dx, dy, dw, dh, da); (10, 10, 5, 5, 1) for a box head, ones for an RPN.
            scale_clamp: maximum of dw and dh, after division by the weights.

        Raises:
            ValueError: there are not five weights.
        """
        if len(weights) != 5:
            raise ValueError(
                "weights of rotated boxes (BBOX_REG_WEIGHTS) must be five numbers (dx, dy, dw, dh, da), got "
                f"{tuple(weights)!r}"
            )
        self.weights = tuple(weights)
        self.scale_clamp = scale_clamp

    def get_deltas(self, src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        """Return the deltas for which `apply_deltas(deltas, src_boxes)` gives `target_boxes`.

        Angles agree up to multiples of 360 degrees.

        Args:
            src_boxes: (R, 5) boxes such as anchors or proposals.
            target_boxes: (R, 5) boxes such as ground truth.

        Returns:
            (R, 5) tensor; da / weight is in [-pi, pi).

        Raises:
            ValueError: a source box has no area; see `Box2BoxTransform.get_deltas`.
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
        """Apply deltas to rotated boxes.

        Args:
            deltas: (R, K*5) tensor of any float type: K sets of (dx, dy, dw, dh, da) for each box.
            boxes: (R, 5) boxes.

        Returns:
            (R, K*5) float32 boxes (float64 if the deltas are), angles in [-180, 180).
        """
        # Half precision cannot represent pixel coordinates.
        deltas = deltas if deltas.dtype == torch.float64 else deltas.float()
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
    """Return the transform for a config's BBOX_REG_WEIGHTS: five weights mean rotated boxes."""
    return (Box2BoxTransformRotated if len(weights) == 5 else Box2BoxTransform)(weights=weights)


class Box2BoxTransformLinear:
    """Distances from the source's center to the target's four sides, as in FCOS (arXiv:1904.01355)."""

    box_dim: int = 4

    def __init__(self, normalize_by_size=True):
        """
        Args:
            normalize_by_size: whether distances are in units of the source's width and height instead of
                pixels.
        """
        self.normalize_by_size = normalize_by_size

    def _units(self, size: torch.Tensor) -> torch.Tensor:
        return torch.cat((size, size), dim=-1)

    def get_deltas(self, src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        """Return the deltas (left, top, right, bottom) for which `apply_deltas` gives `target_boxes`.

        Args:
            src_boxes: (R, 4) boxes; their center must be in the target for positive deltas.
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
        """Return boxes whose sides are `deltas` away from the centers; negative deltas count as 0.

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
    """Raise ValueError if `loss_type` is not defined for boxes of `box_dim` numbers.

    Args:
        loss_type: one of `BOX_LOSS_TYPES`.
        box_dim: numbers per box, B.
        key: the config key, for the message.
    """
    if box_dim != 4 and loss_type in _IOU_LOSSES:
        raise ValueError(
            f"{key} {loss_type!r} compares axis-aligned boxes; rotated boxes support only 'smooth_l1'"
        )


def box_regression_loss(
    box2box_transform,
    src_boxes: torch.Tensor,
    pred_deltas: torch.Tensor,
    target_boxes: torch.Tensor,
    loss_type: str = "smooth_l1",
    smooth_l1_beta: float = 0.0,
) -> torch.Tensor:
    """Return the summed loss of predicted deltas, for RPN, dense detectors and box heads.

    Args:
        box2box_transform: encoding of the boxes, such as `Box2BoxTransform`.
        src_boxes: (R, B) boxes that the deltas are relative to, in absolute pixels.
        pred_deltas: (R, B) predictions.
        target_boxes: (R, B) targets.
        loss_type: "smooth_l1" compares deltas; "giou" (arXiv:1902.09630), "diou" and "ciou"
            (arXiv:1911.08287) compare boxes and are defined for axis-aligned boxes only.
        smooth_l1_beta: transition point from quadratic to linear; 0 is the L1 loss.

    Returns:
        A scalar, the sum over all boxes; 0 that still requires grad if there are none.

    Raises:
        ValueError: `loss_type` is unknown or not defined for rotated boxes.
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
    """Return the summed box loss of the foreground anchors of a batch.

    Shape legend: N images, L feature levels, R_l anchors of one level, R of all levels.

    Args:
        anchors: the R anchors of all levels.
        box2box_transform: encoding of the boxes.
        pred_anchor_deltas: L tensors (N, R_l, B).
        gt_boxes: N tensors (R, B): each anchor's matched ground truth.
        fg_idxs: two int64 tensors of the same length: image in [0, N) and anchor in [0, R) of each foreground
            anchor.
        box_reg_loss_type: see `box_regression_loss`.
        smooth_l1_beta: see `box_regression_loss`.

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
