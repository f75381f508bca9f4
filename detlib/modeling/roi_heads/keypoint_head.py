"""The keypoint head of Mask R-CNN (arXiv:1703.06870, section 5): layers, loss and inference.

Shape legend: N images, R regions of all images together, R_i those of one image, K keypoints of an object,
C channels, S side of the predicted heatmaps.
"""

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from detlib.config import CfgNode, configurable
from detlib.layers import Conv2d, ConvTranspose2d, ShapeSpec, cat, for_convolutions
from detlib.modeling.config_checks import check_count
from detlib.structures import Instances, Keypoints, heatmaps_to_keypoints
from detlib.utils.events import get_event_storage, has_event_storage
from detlib.utils.registry import Registry

__all__ = [
    "BaseKeypointRCNNHead",
    "KRCNNConvDeconvUpsampleHead",
    "ROI_KEYPOINT_HEAD_REGISTRY",
    "build_keypoint_head",
    "keypoint_rcnn_inference",
    "keypoint_rcnn_loss",
    "select_proposals_with_visible_keypoints",
]

ROI_KEYPOINT_HEAD_REGISTRY = Registry("ROI_KEYPOINT_HEAD")
ROI_KEYPOINT_HEAD_REGISTRY.__doc__ = """
Keypoint heads: modules called as `head(features, instances)` that return a dict of losses in training and the
instances with `pred_keypoints` otherwise. An entry is called as `entry(cfg, input_shape)`.
"""

_NOT_VISIBLE = -100  # the label that cross-entropy ignores


def build_keypoint_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the keypoint head `cfg.MODEL.ROI_KEYPOINT_HEAD.NAME`."""
    name = cfg.MODEL.ROI_KEYPOINT_HEAD.NAME
    return ROI_KEYPOINT_HEAD_REGISTRY.get(name, key="MODEL.ROI_KEYPOINT_HEAD.NAME")(cfg, input_shape)


def select_proposals_with_visible_keypoints(proposals: list[Instances]) -> list[Instances]:
    """Select the regions that contain at least one labeled keypoint of their object.

    The border belongs to the region.

    Args:
        proposals: N foreground `Instances` with `proposal_boxes` and `gt_keypoints`. The fields may be
            missing in an image without regions.

    Returns:
        N `Instances` with the selected regions.

    Raises:
        ValueError: regions have no `gt_keypoints`.
    """
    selected = []
    for x in proposals:
        if len(x) == 0:
            selected.append(x)
            continue
        if not x.has("gt_keypoints"):
            raise ValueError(
                "Training the keypoint head needs 'gt_keypoints' in 'instances'; they have "
                f"{sorted(n for n in x.get_fields() if n.startswith('gt_'))}. Annotations without "
                "'keypoints' can only train a model with MODEL.KEYPOINT_ON = False."
            )
        keypoints = x.gt_keypoints.tensor
        boxes = x.proposal_boxes.tensor[:, None]
        points = keypoints[..., :2]
        inside = ((points >= boxes[..., :2]) & (points <= boxes[..., 2:])).all(dim=2)
        learnable = (inside & (keypoints[..., 2] >= 1)).any(dim=1)
        selected.append(x[learnable.nonzero()[:, 0]])
    if has_event_storage() and selected:
        mean = sum(len(x) for x in selected) / len(selected)
        get_event_storage().put_scalar("keypoint_head/num_fg_samples", mean)
    return selected


def _count_skipped_batch() -> None:
    if has_event_storage():
        name, storage = "kpts_num_skipped_batches", get_event_storage()
        before = storage.latest().get(name, (0, 0))[0]
        storage.put_scalar(name, before + 1, smoothing_hint=False)


def keypoint_rcnn_loss(
    pred_keypoint_logits: torch.Tensor, instances: list[Instances], normalizer: float | None
) -> torch.Tensor:
    """Compute the cross-entropy over the S x S cells of each heatmap, summed over visible keypoints.

    A keypoint is visible if it is labeled and inside its region.

    Args:
        pred_keypoint_logits: (R, K, S, S) float.
        instances: N `Instances` with `proposal_boxes` and `gt_keypoints`, R in total. The fields may be
            missing in an image without regions.
        normalizer: divisor of the loss; None for the number of visible keypoints.

    Returns:
        Scalar float32; zero that still requires grad if there is no visible keypoint.

    Raises:
        ValueError: objects have another number of keypoints than the head predicts.
    """
    logits = pred_keypoint_logits.float()
    with_regions = [x for x in instances if len(x) > 0]
    if not with_regions:
        _count_skipped_batch()
        return logits.sum() * 0
    keypoints = Keypoints.cat([x.gt_keypoints for x in with_regions])
    if keypoints.tensor.shape[1] != logits.shape[1]:
        raise ValueError(
            f"'gt_keypoints' have {keypoints.tensor.shape[1]} keypoints per object, the head predicts "
            f"{logits.shape[1]} (MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)."
        )
    boxes = cat([x.proposal_boxes.tensor for x in with_regions])
    cells, valid = keypoints.to_heatmap(boxes, logits.shape[-1])
    targets = torch.where(valid > 0, cells, _NOT_VISIBLE).flatten()
    loss = F.cross_entropy(
        logits.flatten(2).flatten(0, 1), targets, reduction="sum", ignore_index=_NOT_VISIBLE
    )
    return loss / (valid.sum().clamp(min=1) if normalizer is None else normalizer)


def keypoint_rcnn_inference(pred_keypoint_logits: torch.Tensor, pred_instances: list[Instances]) -> None:
    """Add the predicted keypoints to each instance, in place.

    Args:
        pred_keypoint_logits: (R, K, S, S) float.
        pred_instances: N `Instances` with `pred_boxes`, R in total. The added fields are `pred_keypoints`
            (R_i, K, 3) float32, x and y in pixels of the boxes' frame and the probability of that cell among
            the S x S cells; and `pred_keypoint_heatmaps`, the (R_i, K, S, S) logits.
    """
    if not pred_instances:
        return
    heatmaps = pred_keypoint_logits.detach().float()
    boxes = cat([x.pred_boxes.tensor for x in pred_instances]).detach()
    keypoints = heatmaps_to_keypoints(heatmaps, boxes)[:, :, [0, 1, 3]]
    counts = [len(x) for x in pred_instances]
    for x, own_keypoints, own_maps in zip(pred_instances, keypoints.split(counts), heatmaps.split(counts)):
        x.pred_keypoints = own_keypoints
        x.pred_keypoint_heatmaps = own_maps


class BaseKeypointRCNNHead(nn.Module):
    """Base class of keypoint heads: loss and inference. A subclass implements `layers`."""

    @configurable
    def __init__(self, *, num_keypoints: int, loss_weight: float = 1.0, loss_normalizer: float | str = 1.0):
        """
        Args:
            num_keypoints: K.
            loss_weight: factor of the loss.
            loss_normalizer: "visible" divides the summed loss by the number of visible keypoints in the
                batch, so that the weight of a batch does not depend on it. A number divides it by that number
                times the number of images.

        Raises:
            ValueError: `loss_normalizer` is a string other than "visible".
        """
        super().__init__()
        if isinstance(loss_normalizer, str) and loss_normalizer != "visible":
            raise ValueError(
                f"{type(self).__name__}: loss_normalizer must be 'visible' or a number, got "
                f"{loss_normalizer!r}."
            )
        self.num_keypoints = num_keypoints
        self.loss_weight = loss_weight
        self.loss_normalizer = loss_normalizer

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        head, heads = cfg.MODEL.ROI_KEYPOINT_HEAD, cfg.MODEL.ROI_HEADS
        check_count(head.NUM_KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS")
        # The other normalizer is the number of keypoints if all keypoints of all foreground regions are
        # visible.
        most = head.NUM_KEYPOINTS * heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION
        return {
            "num_keypoints": head.NUM_KEYPOINTS,
            "loss_weight": head.LOSS_WEIGHT,
            "loss_normalizer": "visible" if head.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS else most,
        }

    def forward(
        self, x: torch.Tensor, instances: list[Instances]
    ) -> dict[str, torch.Tensor] | list[Instances]:
        """Compute the loss in training, otherwise add keypoints to the instances.

        Args:
            x: (R, C, H, W) region features.
            instances: N `Instances`, R in total: in training the selected regions (see
                `select_proposals_with_visible_keypoints`), otherwise detections with `pred_boxes`.

        Returns:
            {"loss_keypoint": scalar} in training, otherwise `instances` with the fields that
            `keypoint_rcnn_inference` adds.
        """
        x = self.layers(x)
        if self.training:
            by_visible = self.loss_normalizer == "visible"
            normalizer = None if by_visible else cast(float, self.loss_normalizer) * len(instances)
            return {"loss_keypoint": keypoint_rcnn_loss(x, instances, normalizer) * self.loss_weight}
        keypoint_rcnn_inference(x, instances)
        return instances

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """Map region features (R, C, H, W) to heatmap logits (R, K, S, S). Subclasses implement this."""
        raise NotImplementedError(f"{type(self).__name__} must define layers(x).")


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class KRCNNConvDeconvUpsampleHead(BaseKeypointRCNNHead, nn.Sequential):  # type: ignore[misc]  # two `forward`s
    """3x3 convolutions, a transposed convolution with stride 2, and bilinear upsampling by 2."""

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, num_keypoints: int, conv_dims: list[int], **kwargs):
        """
        Args:
            input_shape: channels of the pooled features.
            num_keypoints: K.
            conv_dims: output channels of each convolution.
            **kwargs: arguments of `BaseKeypointRCNNHead`.
        """
        super().__init__(num_keypoints=num_keypoints, **kwargs)
        channels = input_shape.channels
        for k, dim in enumerate(conv_dims, 1):
            self.add_module(f"conv_fcn{k}", Conv2d(channels, dim, kernel_size=3, padding=1))
            self.add_module(f"conv_fcn_relu{k}", nn.ReLU())
            channels = dim
        self.score_lowres = ConvTranspose2d(channels, num_keypoints, kernel_size=4, stride=2, padding=1)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        return super().from_config(cfg, input_shape) | {
            "input_shape": input_shape,
            "conv_dims": cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS,
        }

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """Map (R, C, H, W) features to (R, K, 4H, 4W) logits."""
        x = for_convolutions(x)  # features pooled from several levels are contiguous
        for layer in self:
            x = layer(x)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
