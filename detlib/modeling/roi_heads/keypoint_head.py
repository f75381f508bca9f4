"""The keypoint head of Mask R-CNN (arXiv:1703.06870, section 5): layers, loss and inference.

Shape legend: N images, R regions of all images together, R_i those of one image, K keypoints of an object,
C channels, S side of the predicted heatmaps.
"""

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

_NOT_VISIBLE = -100  # a label that cross-entropy leaves out


def build_keypoint_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the keypoint head that `cfg.MODEL.ROI_KEYPOINT_HEAD.NAME` names."""
    name = cfg.MODEL.ROI_KEYPOINT_HEAD.NAME
    return ROI_KEYPOINT_HEAD_REGISTRY.get(name, key="MODEL.ROI_KEYPOINT_HEAD.NAME")(cfg, input_shape)


def select_proposals_with_visible_keypoints(proposals: list[Instances]) -> list[Instances]:
    """Keep the regions from which a keypoint can be learnt.

    Args:
        proposals: N foreground `Instances` with `proposal_boxes` and `gt_keypoints`. An image without any
            may lack the fields.

    Returns:
        N `Instances`: those regions in which, border included, a labelled keypoint of their object lies.

    Raises:
        ValueError: instances without `gt_keypoints`.
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
    """Cross-entropy over the S x S cells of each heatmap, summed over the visible keypoints and divided.

    A keypoint is visible if it is labelled and lies in its region.

    Args:
        pred_keypoint_logits: (R, K, S, S) float.
        instances: N `Instances` with `proposal_boxes` and `gt_keypoints`, R in all. An image without any
            may lack the fields.
        normalizer: divide by this; None for the number of visible keypoints.

    Returns:
        Scalar float32; zero with a graph when there is no visible keypoint.

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
            f"'gt_keypoints' have {keypoints.tensor.shape[1]} keypoints an object, the head predicts "
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
    """Give each instance its keypoints, in place.

    Args:
        pred_keypoint_logits: (R, K, S, S) float.
        pred_instances: N `Instances` with `pred_boxes`, R in all. They get `pred_keypoints` (R_i, K, 3)
            float32, x and y in pixels of the boxes' frame and the probability of the place among the S x S
            cells; and `pred_keypoint_heatmaps`, the (R_i, K, S, S) logits.
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
    """Loss and inference of a keypoint head; a subclass brings `layers`.

    Args:
        num_keypoints: K.
        loss_weight: factor of the loss.
        loss_normalizer: "visible" divides the summed loss by the number of visible keypoints of the batch,
            so that a picture with few of them trains the head as hard as one with many. A number divides
            it by that number times the images of the batch.

    Raises:
        ValueError: another word than "visible".
    """

    @configurable
    def __init__(self, *, num_keypoints: int, loss_weight: float = 1.0, loss_normalizer: float | str = 1.0):
        super().__init__()
        if isinstance(loss_normalizer, str) and loss_normalizer != "visible":
            raise ValueError(
                f"{type(self).__name__}: loss_normalizer is 'visible' or a number, got {loss_normalizer!r}."
            )
        self.num_keypoints = num_keypoints
        self.loss_weight = loss_weight
        self.loss_normalizer = loss_normalizer

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        head, heads = cfg.MODEL.ROI_KEYPOINT_HEAD, cfg.MODEL.ROI_HEADS
        check_count(head.NUM_KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS")
        # The other divisor is what a batch would have if all of its foreground had all keypoints visible.
        most = head.NUM_KEYPOINTS * heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION
        return {
            "num_keypoints": head.NUM_KEYPOINTS,
            "loss_weight": head.LOSS_WEIGHT,
            "loss_normalizer": "visible" if head.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS else most,
        }

    def forward(
        self, x: torch.Tensor, instances: list[Instances]
    ) -> dict[str, torch.Tensor] | list[Instances]:
        """Losses in training, else the instances with keypoints.

        Args:
            x: (R, C, H, W) region features.
            instances: N `Instances`, R in all: the regions to learn from in training (see
                `select_proposals_with_visible_keypoints`), else detections with `pred_boxes`.

        Returns:
            {"loss_keypoint": scalar} in training; else `instances`, with the fields that
            `keypoint_rcnn_inference` adds.
        """
        x = self.layers(x)
        if self.training:
            by_visible = self.loss_normalizer == "visible"
            normalizer = None if by_visible else self.loss_normalizer * len(instances)
            return {"loss_keypoint": keypoint_rcnn_loss(x, instances, normalizer) * self.loss_weight}
        keypoint_rcnn_inference(x, instances)
        return instances

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """Region features (R, C, H, W) to heatmap logits (R, K, S, S); the part a subclass writes."""
        raise NotImplementedError(f"{type(self).__name__} must define layers(x).")


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class KRCNNConvDeconvUpsampleHead(BaseKeypointRCNNHead, nn.Sequential):
    """3x3 convolutions, a transposed convolution to K maps of twice the side, and bilinear doubling.

    Args:
        input_shape: channels of the pooled features.
        num_keypoints: K.
        conv_dims: output channels of each convolution.
        **kwargs: `BaseKeypointRCNNHead`'s.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, num_keypoints: int, conv_dims: list[int], **kwargs):
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
        """(R, C, H, W) to (R, K, 4H, 4W) logits."""
        x = for_convolutions(x)  # what is pooled from several maps is contiguous
        for layer in self:
            x = layer(x)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
