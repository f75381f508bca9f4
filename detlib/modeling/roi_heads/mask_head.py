"""The mask head of Mask R-CNN (arXiv:1703.06870): layers, loss and inference.

Shape legend: R regions of all images together, K classes, C channels, M side of the predicted mask.
"""

import torch
from torch import nn
from torch.nn import functional as F

from detlib.config import CfgNode, configurable
from detlib.layers import Conv2d, ConvTranspose2d, ShapeSpec, cat, for_convolutions, get_norm
from detlib.layers.fvcore_nn import weight_init
from detlib.modeling.config_checks import check_norm
from detlib.structures import Instances
from detlib.utils.events import get_event_storage, has_event_storage
from detlib.utils.registry import Registry

__all__ = [
    "BaseMaskRCNNHead",
    "MaskRCNNConvUpsampleHead",
    "ROI_MASK_HEAD_REGISTRY",
    "build_mask_head",
    "mask_rcnn_inference",
    "mask_rcnn_loss",
]

ROI_MASK_HEAD_REGISTRY = Registry("ROI_MASK_HEAD")
ROI_MASK_HEAD_REGISTRY.__doc__ = """
Mask heads: modules called as `head(features, instances)` that return a dict of losses in training and the
instances with `pred_masks` otherwise. An entry is called as `entry(cfg, input_shape)`.
"""


def _select_class(mask_logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return the (R, M, M) masks of each region's class in (R, K, M, M), or the only ones of (R, 1, M, M)."""
    if mask_logits.shape[1] == 1:
        return mask_logits[:, 0]
    return mask_logits[torch.arange(len(classes), device=classes.device), classes]


def _log_mask_stats(mask_logits: torch.Tensor, gt_masks: torch.Tensor) -> None:
    if not has_event_storage():
        return
    wrong = (mask_logits > 0) != gt_masks
    # Fetched together, which synchronizes a GPU once.
    counts = torch.stack([wrong.sum(), gt_masks.sum(), (wrong & gt_masks).sum()]).tolist()
    (num_wrong, num_positive, num_missed), num_pixels = counts, gt_masks.numel()
    storage = get_event_storage()
    storage.put_scalar("mask_rcnn/accuracy", 1 - num_wrong / num_pixels)
    storage.put_scalar(
        "mask_rcnn/false_positive", (num_wrong - num_missed) / max(num_pixels - num_positive, 1)
    )
    storage.put_scalar("mask_rcnn/false_negative", num_missed / max(num_positive, 1))


def mask_rcnn_loss(
    pred_mask_logits: torch.Tensor, instances: list[Instances], vis_period: int = 0
) -> torch.Tensor:
    """Compute the binary cross-entropy of the masks of the ground-truth classes.

    It is averaged over pixels and regions.

    Args:
        pred_mask_logits: (R, K, M, M) float, or (R, 1, M, M) if masks are class-agnostic.
        instances: N foreground `Instances` with `proposal_boxes`, `gt_classes` and `gt_masks`
            (`PolygonMasks` or `BitMasks`, in the same frame as the boxes), R in total. An image without
            regions may lack the fields.
        vis_period: accepted for compatibility; models do not draw.

    Returns:
        Scalar float32; zero that still requires grad if there is no region.

    Raises:
        ValueError: regions have no `gt_masks`.
    """
    classes, masks = [], []
    for x in instances:
        if len(x) == 0:
            continue
        if not x.has("gt_masks"):
            raise ValueError(
                "Training the mask head needs 'gt_masks' in 'instances'; they have "
                f"{sorted(n for n in x.get_fields() if n.startswith('gt_'))}. Annotations without "
                "'segmentation' can only train a model with MODEL.MASK_ON = False."
            )
        classes.append(x.gt_classes.to(torch.int64))
        cropped = x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, pred_mask_logits.shape[-1])
        masks.append(cropped.to(pred_mask_logits.device))
    if not masks:
        return pred_mask_logits.float().sum() * 0
    logits = _select_class(pred_mask_logits, cat(classes)).float()
    gt_masks = cat(masks).to(torch.bool)
    _log_mask_stats(logits.detach(), gt_masks)
    return F.binary_cross_entropy_with_logits(logits, gt_masks.to(logits.dtype), reduction="mean")


def mask_rcnn_inference(pred_mask_logits: torch.Tensor, pred_instances: list[Instances]) -> None:
    """Add the mask probabilities of each instance's class, `pred_masks` (R_i, 1, M, M) float32, in place.

    Args:
        pred_mask_logits: (R, K, M, M) float, or (R, 1, M, M).
        pred_instances: N `Instances` with `pred_classes`, R in total.
    """
    classes = cat([x.pred_classes for x in pred_instances])
    probs = _select_class(pred_mask_logits, classes).float().sigmoid()[:, None]
    for masks, x in zip(probs.split([len(x) for x in pred_instances]), pred_instances):
        x.pred_masks = masks


class BaseMaskRCNNHead(nn.Module):
    """Base class of mask heads: loss and inference. A subclass implements `layers`."""

    @configurable
    def __init__(self, *, loss_weight: float = 1.0, vis_period: int = 0):
        """
        Args:
            loss_weight: factor of the loss.
            vis_period: accepted for compatibility; models do not draw.
        """
        super().__init__()
        self.loss_weight = loss_weight
        self.vis_period = vis_period

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        return {"vis_period": cfg.VIS_PERIOD}

    def forward(
        self, x: torch.Tensor, instances: list[Instances]
    ) -> dict[str, torch.Tensor] | list[Instances]:
        """Compute the loss in training, otherwise add masks to the instances.

        Args:
            x: (R, C, H, W) region features.
            instances: N `Instances`, R in total: in training the sampled foreground (see `mask_rcnn_loss`),
                otherwise detections with `pred_classes`.

        Returns:
            {"loss_mask": scalar} in training, otherwise `instances` with `pred_masks` (R_i, 1, M, M) float32.
        """
        x = self.layers(x)
        if self.training:
            return {"loss_mask": mask_rcnn_loss(x, instances, self.vis_period) * self.loss_weight}
        mask_rcnn_inference(x, instances)
        return instances

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """Map region features (R, C, H, W) to mask logits (R, K or 1, M, M). Subclasses implement this."""
        raise NotImplementedError(f"{type(self).__name__} must define layers(x).")


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRCNNConvUpsampleHead(BaseMaskRCNNHead, nn.Sequential):  # type: ignore[misc]  # two `forward`s
    """3x3 convolutions, a transposed convolution with stride 2, and a 1x1 predictor."""

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, num_classes: int, conv_dims: list[int], conv_norm: str = "", **kwargs
    ):
        """
        Args:
            input_shape: channels of the pooled features.
            num_classes: K, or 1 for class-agnostic masks.
            conv_dims: output channels of each 3x3 convolution, and last of the transposed convolution.
            conv_norm: normalization of the convolutions, see `detlib.layers.get_norm`.
            **kwargs: arguments of `BaseMaskRCNNHead`.

        Raises:
            ValueError: `conv_dims` is empty.
        """
        super().__init__(**kwargs)
        if len(conv_dims) < 1:
            raise ValueError(
                "MaskRCNNConvUpsampleHead: conv_dims needs at least the upsampling layer's size."
            )
        channels = input_shape.channels
        for k, dim in enumerate(conv_dims[:-1], 1):
            conv = Conv2d(
                channels,
                dim,
                kernel_size=3,
                padding=1,
                bias=not conv_norm,
                norm=get_norm(conv_norm, dim),
                activation=nn.ReLU(),
            )
            weight_init.c2_msra_fill(conv)
            self.add_module(f"mask_fcn{k}", conv)
            channels = dim
        self.deconv = ConvTranspose2d(channels, conv_dims[-1], kernel_size=2, stride=2)
        weight_init.c2_msra_fill(self.deconv)
        self.deconv_relu = nn.ReLU()
        self.predictor = Conv2d(conv_dims[-1], num_classes, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        head = cfg.MODEL.ROI_MASK_HEAD
        check_norm(head.NORM, "MODEL.ROI_MASK_HEAD.NORM")
        return super().from_config(cfg, input_shape) | {
            "input_shape": input_shape,
            "num_classes": 1 if head.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "conv_dims": [head.CONV_DIM] * (head.NUM_CONV + 1),
            "conv_norm": head.NORM,
        }

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """Map (R, C, H, W) features to (R, K or 1, 2H, 2W) logits."""
        x = for_convolutions(x)  # features pooled from several levels are contiguous
        for layer in self:
            x = layer(x)
        return x


def build_mask_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the mask head `cfg.MODEL.ROI_MASK_HEAD.NAME`."""
    name = cfg.MODEL.ROI_MASK_HEAD.NAME
    return ROI_MASK_HEAD_REGISTRY.get(name, key="MODEL.ROI_MASK_HEAD.NAME")(cfg, input_shape)
