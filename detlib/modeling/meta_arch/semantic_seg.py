"""Semantic segmentation on a feature pyramid: the semantic branch of Panoptic FPN (arXiv:1901.02446).

Shape legend: N images, K classes, C channels, H and W the size of the padded batch, H_i and W_i the size of
one image before padding.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from detlib.config import CfgNode, configurable
from detlib.layers import Conv2d, ShapeSpec, get_norm
from detlib.layers.fvcore_nn import weight_init
from detlib.modeling.backbone import Backbone, build_backbone
from detlib.modeling.config_checks import check_count, check_features, check_norm
from detlib.modeling.meta_arch.base import MetaArchitecture, describe_item
from detlib.modeling.meta_arch.build import META_ARCH_REGISTRY
from detlib.modeling.postprocessing import sem_seg_postprocess
from detlib.structures import ImageList
from detlib.utils.registry import Registry

__all__ = ["SEM_SEG_HEADS_REGISTRY", "SemSegFPNHead", "SemanticSegmentor", "build_sem_seg_head"]

SEM_SEG_HEADS_REGISTRY = Registry("SEM_SEG_HEADS")
SEM_SEG_HEADS_REGISTRY.__doc__ = """
Semantic heads: modules called as `head(features, targets)` that return the logits (None in training) and a
dict of losses (empty in inference), and have the attribute `ignore_value`. An entry is called as
`entry(cfg, input_shape)`.
"""

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def take_sem_seg(
    batched_inputs: list[dict], images: ImageList, backbone: Backbone, sem_seg_head: nn.Module
) -> torch.Tensor:
    """Return the checked label maps of a batch, padded like the images.

    Labels on a GPU are not checked, as that would synchronize it.

    Args:
        batched_inputs: N dicts with "sem_seg": (H_i, W_i) integers, of the size of "image".
        images: the preprocessed images.
        backbone: defines the padding of the images.
        sem_seg_head: its `ignore_value` fills the padding; its `num_classes`, if any, bounds the labels.

    Returns:
        (N, H, W) int64, on the images' device.

    Raises:
        ValueError: a dict has no "sem_seg", or a label map has another size or labels out of range.
        TypeError: a label map is not a tensor of integers.
    """
    ignore_value, num_classes = sem_seg_head.ignore_value, getattr(sem_seg_head, "num_classes", None)
    maps = []
    for i, (item, size) in enumerate(zip(batched_inputs, images.image_sizes)):
        where = describe_item(batched_inputs, i)
        if "sem_seg" not in item:
            raise ValueError(
                f"Training a semantic head needs 'sem_seg' in every dict; {where} has only {sorted(item)}. "
                "It is loaded from the dataset's 'sem_seg_file_name'."
            )
        labels = item["sem_seg"]
        if not isinstance(labels, torch.Tensor) or labels.dtype not in _INTEGERS:
            found = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise TypeError(f"'sem_seg' of {where} must be a tensor of integers, got {found}.")
        if labels.shape != tuple(size):
            raise ValueError(
                f"'sem_seg' of {where} must have the size of its 'image', {tuple(size)}, got "
                f"{tuple(labels.shape)}."
            )
        if num_classes is not None and labels.device.type == "cpu":
            _check_labels(labels, num_classes, ignore_value, where)
        maps.append(labels.to(images.device).to(torch.int64))
    return ImageList.from_tensors(
        maps, backbone.size_divisibility, ignore_value, dict(backbone.padding_constraints)
    ).tensor


def _check_labels(labels: torch.Tensor, num_classes: int, ignore_value: int, where: str) -> None:
    legal = (labels < num_classes) & (labels >= 0) | (labels == ignore_value)
    if not legal.all():
        raise ValueError(
            f"'sem_seg' of {where} must contain labels in [0, {num_classes}) "
            f"(MODEL.SEM_SEG_HEAD.NUM_CLASSES) or {ignore_value} (MODEL.SEM_SEG_HEAD.IGNORE_VALUE), "
            f"got {labels[~legal].unique().tolist()}."
        )


@META_ARCH_REGISTRY.register()
class SemanticSegmentor(MetaArchitecture):
    """A backbone and a semantic head."""

    supports_tta = True

    @classmethod
    def num_classes_keys(cls, cfg: CfgNode) -> dict[str, str]:
        """See `MetaArchitecture.num_classes_keys`."""
        return {"stuff_classes": "MODEL.SEM_SEG_HEAD.NUM_CLASSES"}

    @classmethod
    def outputs(cls, cfg: CfgNode) -> frozenset[str]:
        """See `MetaArchitecture.outputs`."""
        return frozenset({"sem_seg"})

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        """
        Args:
            backbone: maps images to a dict of feature maps.
            sem_seg_head: maps feature maps to logits and losses, see `SEM_SEG_HEADS_REGISTRY`.
            pixel_mean: mean of each channel, in the pixels' own unit (0 to 255 for the built-in models).
            pixel_std: standard deviation of each channel.
        """
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.register_pixel_stats(pixel_mean, pixel_std)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """Compute losses in training, the logits of every pixel otherwise.

        Args:
            batched_inputs: N dicts, each with

                * "image": (C, H_i, W_i) uint8 or float tensor;
                * "sem_seg": (H_i, W_i) integer labels, the head's `ignore_value` for unlabeled pixels;
                  training only;
                * "height", "width": the output size; by default the image's own.

        Returns:
            In training a dict of scalar losses. Otherwise N dicts with "sem_seg": (K, height, width) logits,
            float32 or wider.

        Raises:
            TypeError, ValueError: an input is malformed; the message names the item and the problem.
        """
        images = self.preprocess_image(batched_inputs)
        targets = None
        if self.training:
            targets = take_sem_seg(batched_inputs, images, self.backbone, self.sem_seg_head)
        results, losses = self.sem_seg_head(self.backbone(images.tensor), targets)
        if self.training:
            return losses
        return [
            {"sem_seg": sem_seg_postprocess(r, size, item.get("height", size[0]), item.get("width", size[1]))}
            for r, item, size in zip(results, batched_inputs, images.image_sizes)
        ]


def build_sem_seg_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the semantic head `cfg.MODEL.SEM_SEG_HEAD.NAME`."""
    name = cfg.MODEL.SEM_SEG_HEAD.NAME
    return SEM_SEG_HEADS_REGISTRY.get(name, key="MODEL.SEM_SEG_HEAD.NAME")(cfg, input_shape)


def _doublings(name: str, stride: int, common_stride: int) -> int:
    """Return how many times a feature map is doubled in size to get from its stride to the common one."""
    ratio = stride // common_stride
    if ratio * common_stride != stride or ratio & (ratio - 1) or ratio < 1:
        raise ValueError(
            f"SemSegFPNHead: feature {name!r} of stride {stride} cannot be doubled to the common stride "
            f"{common_stride} (MODEL.SEM_SEG_HEAD.COMMON_STRIDE)."
        )
    return ratio.bit_length() - 1


@SEM_SEG_HEADS_REGISTRY.register()
class SemSegFPNHead(nn.Module):
    """Upsamples each feature map to a common stride with convolutions, adds them and predicts the classes."""

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        conv_dims: int,
        common_stride: int,
        loss_weight: float = 1.0,
        norm: str | Callable | None = None,
        ignore_value: int = -1,
    ):
        """
        Args:
            input_shape: channels and stride of each feature map used, by name.
            num_classes: K.
            conv_dims: output channels of the convolutions.
            common_stride: stride at which the feature maps are added; all strides must be a power of two
                times it.
            loss_weight: factor of the loss.
            norm: normalization of the convolutions, see `detlib.layers.get_norm`; None for none.
            ignore_value: label of pixels that do not enter the loss.

        Raises:
            ValueError: there is no feature, or a stride is not a power of two times the common one.
        """
        super().__init__()
        if not input_shape:
            raise ValueError("SemSegFPNHead needs at least one feature (MODEL.SEM_SEG_HEAD.IN_FEATURES).")
        shapes = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in shapes]
        self.num_classes = num_classes
        self.ignore_value = ignore_value
        self.common_stride = common_stride
        self.loss_weight = loss_weight

        self.scale_heads = []
        for name, shape in shapes:
            doublings = _doublings(name, shape.stride, common_stride)
            layers: list[nn.Module] = []
            channels = shape.channels
            for _ in range(max(1, doublings)):
                conv = Conv2d(
                    channels,
                    conv_dims,
                    kernel_size=3,
                    padding=1,
                    bias=not norm,
                    norm=get_norm(norm, conv_dims),
                    activation=F.relu,
                )
                weight_init.c2_msra_fill(conv)
                layers.append(conv)
                if doublings:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
                channels = conv_dims
            self.scale_heads.append(nn.Sequential(*layers))
            self.add_module(name, self.scale_heads[-1])
        self.predictor = Conv2d(conv_dims, num_classes, kernel_size=1)
        weight_init.c2_msra_fill(self.predictor)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        head = cfg.MODEL.SEM_SEG_HEAD
        check_features(head.IN_FEATURES, input_shape, "MODEL.SEM_SEG_HEAD.IN_FEATURES")
        check_norm(head.NORM, "MODEL.SEM_SEG_HEAD.NORM")
        check_count(head.NUM_CLASSES, "MODEL.SEM_SEG_HEAD.NUM_CLASSES")
        return {
            "input_shape": {name: input_shape[name] for name in head.IN_FEATURES},
            "num_classes": head.NUM_CLASSES,
            "conv_dims": head.CONVS_DIM,
            "common_stride": head.COMMON_STRIDE,
            "loss_weight": head.LOSS_WEIGHT,
            "norm": head.NORM,
            "ignore_value": head.IGNORE_VALUE,
        }

    def forward(
        self, features: dict[str, torch.Tensor], targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Compute losses in training, logits otherwise.

        Args:
            features: name to (N, C, H / stride, W / stride).
            targets: (N, H, W) int64 labels; training only.

        Returns:
            (None, {"loss_sem_seg": scalar}) in training; else ((N, K, H, W) logits, {}).
        """
        x = self.layers(features)
        if self.training:
            if targets is None:
                raise ValueError("SemSegFPNHead needs targets in training.")
            return None, self.losses(x, targets)
        return self._to_input_size(x), {}

    def layers(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compute the logits (N, K, H / common_stride, W / common_stride).

        Raises:
            KeyError: a feature is missing.
        """
        total = None
        for name, scale_head in zip(self.in_features, self.scale_heads):
            if name not in features:
                raise KeyError(f"SemSegFPNHead needs the feature {name!r}; available: {sorted(features)}.")
            x = scale_head(features[name])
            # Sizes that are not multiples of the stride were rounded up by the backbone.
            total = x if total is None else total + x[..., : total.shape[-2], : total.shape[-1]]
        return self.predictor(total)

    def losses(self, predictions: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the cross-entropy, averaged over the labeled pixels.

        Args:
            predictions: (N, K, H / common_stride, W / common_stride) logits.
            targets: (N, H, W) int64 labels.

        Returns:
            {"loss_sem_seg": scalar}; zero that still requires grad if no pixel is labeled.
        """
        logits = self._to_input_size(predictions)[..., : targets.shape[-2], : targets.shape[-1]]
        total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=self.ignore_value)
        count = (targets != self.ignore_value).sum().clamp(min=1)
        return {"loss_sem_seg": total / count * self.loss_weight}

    def _to_input_size(self, x: torch.Tensor) -> torch.Tensor:
        """Upsample logits by the common stride in float32, as neighbors tie in half precision."""
        x = x if x.dtype == torch.float64 else x.float()
        return F.interpolate(x, scale_factor=self.common_stride, mode="bilinear", align_corners=False)
