"""The networks of timm (PyTorch Image Models) as backbones. timm is an extra: ``detlib[timm]``."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from detlib.layers import FrozenBatchNorm2d, get_norm
from detlib.layers.shape_spec import ShapeSpec
from detlib.modeling.backbone.build import BACKBONE_REGISTRY
from detlib.modeling.backbone.fpn import FPN, LastLevelMaxPool, fpn_from_config, retinanet_fpn_from_config
from detlib.modeling.backbone.third_party import ThirdPartyBackbone
from detlib.modeling.config_checks import check_features, config_keys
from detlib.utils.download import is_offline
from detlib.utils.suggest import suggest

__all__ = [
    "TimmBackbone",
    "build_retinanet_timm_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "log_timm_feature_info",
]

logger = logging.getLogger(__name__)

# What timm's networks call the permission to accept images of any size; the others need none.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"strict_img_size": False},
    {},
)


class TimmBackbone(ThirdPartyBackbone):
    """A network of timm that gives the maps "p0", "p1", ...: timm's feature number 0, 1, ...

    Strides follow from the network: of a ResNet "p0" has 2 and "p4" 32, of a ConvNeXt or Swin transformer
    "p0" has 4 and "p3" 32; `output_shape()` tells. Parameters are those of timm's feature extractor, below
    ``timm_model``; those that no map depends on, which timm leaves in a few networks, do not train. Vision
    transformers, all of whose maps have one stride, take images of any size too.
    """

    _network_name = "timm_model"

    def __init__(
        self,
        model_name: str,
        features_only: bool = True,
        pretrained: bool = False,
        checkpoint_path: str = "",
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        norm_layer: str | Callable[[int], nn.Module] | None = None,
        *,
        out_features: Sequence[str] | None = None,
    ):
        """
        Args:
            model_name: a model of `timm.list_models()`, "resnet50", or one with the tag of its weights,
                "resnet50.a1_in1k".
            features_only: True; a classifier has no maps to give.
            pretrained: load timm's weights, over the network unless they are in its cache.
            checkpoint_path: a file of timm's weights for this model (``.safetensors``, ``.pth``), loaded as
                `pretrained` ones are, without network.
            in_channels: channels of the images; pretrained weights of other numbers are adapted by timm.
            out_indices: numbers of timm's features; negative ones count from the last.
            norm_layer: None for the network's own norms. `FrozenBatchNorm2d` ("FrozenBN") turns its batch
                norms into frozen ones of the same values and eps, `torch.nn.SyncBatchNorm` ("SyncBN") into
                synchronized ones. Other norms are handed to timm, whose ResNets take them.
            out_features: which of the maps to return, by name; by default all of `out_indices`.

        Raises:
            ImportError: timm is not installed.
            ValueError: an unknown model (near names are listed), indices beyond its features, a model that
                has no feature maps or cannot take images of any size, or a norm that does not fit.
            FileNotFoundError: there is no file at `checkpoint_path`, or pretrained weights are neither in the
                cache nor to be had; what to put where is told.
        """
        super().__init__()
        self.model_name = model_name
        if not features_only:
            raise ValueError("TimmBackbone needs features_only=True: without, timm gives scores of classes")
        _check_model_name(model_name)
        if checkpoint_path and not os.path.isfile(checkpoint_path):
            raise FileNotFoundError(f"TimmBackbone's checkpoint_path {checkpoint_path!r} is no file")
        kwargs: dict[str, Any] = {"in_chans": in_channels}
        convert = _conversion(norm_layer)
        if convert is None and norm_layer is not None:
            kwargs["norm_layer"] = _for_timm(norm_layer)
        numbers = _numbers(model_name, out_indices, kwargs)
        names = [f"p{i}" for i in numbers]
        if out_features is not None:
            giver = f"timm's {model_name} with out_indices {tuple(out_indices)}"
            check_features(out_features, names, "TimmBackbone's out_features", giver)
            names = [name for name in names if name in out_features]
        kwargs["out_indices"] = tuple(int(name[1:]) for name in names)
        model = _create(model_name, pretrained, checkpoint_path, kwargs)
        self.timm_model = model if convert is None else convert(model, model_name)

        log_timm_feature_info(model.feature_info)
        self._probe(in_channels, names, f"timm's model {model_name!r}")

    def _run(self, network, x):
        return network(x)


def log_timm_feature_info(feature_info: Any) -> None:
    """Logs channels and strides of the features of one of timm's extractors, as timm has them."""
    channels, strides = feature_info.channels(), feature_info.reduction()
    for index, *values in zip(feature_info.out_indices, channels, strides):
        logger.info("Feature %d of timm's model has %d channels and stride %d", index, *values)


def _import_timm() -> Any:
    if is_offline():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # it counts until timm is imported for the first time
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "TimmBackbone needs timm (PyTorch Image Models), which is not installed: pip install "
            "'detlib[timm]'"
        ) from error
    return timm


def _check_model_name(name: str) -> None:
    timm = _import_timm()
    if ":" in name:  # from a hub or a folder
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}.{suggest(architecture, timm.list_models())} "
            "timm.list_models() lists all"
        )
    if tag:
        tagged = timm.list_pretrained(f"{architecture}.*")
        if name not in tagged:
            raise ValueError(
                f"timm {timm.__version__} has no weights {name!r} of the model {architecture!r}."
                f"{suggest(name, tagged)} It has {', '.join(tagged) or 'none'}"
            )


def _numbers(model_name: str, out_indices: Sequence[int], kwargs: dict[str, Any]) -> list[int]:
    """`out_indices` as ascending numbers from 0."""
    given = list(out_indices)
    if not given or not all(isinstance(i, int) and not isinstance(i, bool) for i in given):
        raise ValueError(f"TimmBackbone's out_indices must be numbers of features, got {out_indices!r}")
    with torch.device("meta"):
        count = len(_build(model_name, {**kwargs, "out_indices": (-1,)}).feature_info.info)
    wrong = [i for i in given if not -count <= i < count]
    if wrong:
        raise ValueError(
            f"TimmBackbone's out_indices are {tuple(given)}, but {model_name!r} has {count} features, "
            f"numbers 0 to {count - 1}: {', '.join(map(str, wrong))} is none of them"
        )
    numbers = sorted({i % count for i in given})
    if len(numbers) < len(given):
        raise ValueError(f"TimmBackbone's out_indices {tuple(given)} name a feature twice")
    return numbers


def _build(model_name: str, kwargs: dict[str, Any]) -> nn.Module:
    """timm's feature extractor, which takes images of any size if it can."""
    timm = _import_timm()
    for permission in _ANY_SIZE:
        try:
            model = timm.create_model(model_name, features_only=True, **kwargs, **permission)
        except TypeError as error:
            if any(name in str(error) for name in permission):
                continue
            raise ValueError(f"timm cannot build {model_name!r} with {kwargs}: {error}") from error
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "features_only" not in str(error):
                raise
            raise ValueError(
                f"timm gives no features {list(kwargs['out_indices'])} of its model {model_name!r}: {error}"
            ) from error
        for module in model.modules():
            if not getattr(module, "strict_img_size", True) and hasattr(module, "dynamic_img_pad"):
                module.dynamic_img_pad = True  # of the Swin transformers, which have no argument for it
        return model
    raise AssertionError("the last entry of _ANY_SIZE asks for nothing")


def _create(model_name: str, pretrained: bool, checkpoint_path: str, kwargs: dict[str, Any]) -> nn.Module:
    if checkpoint_path:
        # As pretrained weights: timm renames what old files call otherwise and leaves the classifier out.
        file = {"file": checkpoint_path, "source": "timm"}
        return _build(model_name, {**kwargs, "pretrained": True, "pretrained_cfg_overlay": file})
    if not pretrained:
        return _build(model_name, kwargs)
    try:
        return _build(model_name, {**kwargs, "pretrained": True})
    except Exception as error:
        with torch.device("meta"):
            model = _build(model_name, kwargs)  # raises again if the weights are not what it was about
        raise _no_weights(model_name, model.pretrained_cfg, error) from error


def _no_weights(model_name: str, source: dict[str, Any], error: Exception) -> Exception:
    """What to say when pretrained weights cannot be loaded."""
    hub, url = source.get("hf_hub_id"), source.get("url")
    if not hub and not url:
        return ValueError(f"timm has no pretrained weights of {model_name!r}: pretrained must be False")
    full = ".".join(filter(None, (source.get("architecture", model_name), source.get("tag"))))
    ways = []
    if hub:
        from huggingface_hub.constants import HF_HUB_CACHE

        filename = source.get("hf_hub_filename") or "model.safetensors"
        ways.append(
            f"They are {filename!r} of {hub!r} on the Hugging Face hub, and cached in "
            f"{os.path.join(HF_HUB_CACHE, 'models--' + hub.replace('/', '--'))!r}: copy that folder from a "
            "machine that has it"
        )
    if url:
        place = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
        ways.append(f"They are at {url}{' too' if hub else f', and cached as {place!r}: put the file there'}")
    return FileNotFoundError(
        f"The pretrained weights of timm's model {model_name!r} ({full}) cannot be loaded "
        f"({type(error).__name__}: {error}). {'. '.join(ways)}. Or give a file of them as checkpoint_path"
    )


class _FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """A frozen norm with what timm joins to some batch norms: a dropping of parts and an activation."""

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def _freeze_norms(module: nn.Module) -> int:
    """Replaces the batch norms below `module`; returns how many."""
    count = 0
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            joined = hasattr(child, "act")
            new = (_FrozenBatchNormAct2d if joined else FrozenBatchNorm2d).convert_frozen_batchnorm(child)
            if joined:
                new.drop, new.act = getattr(child, "drop", nn.Identity()), child.act
            setattr(module, name, new)
            count += 1
        else:
            count += _freeze_norms(child)
    return count


def _frozen(model: nn.Module, model_name: str) -> nn.Module:
    if not _freeze_norms(model):
        logger.warning("timm's model '%s' has no batch norms that norm_layer could freeze", model_name)
    return model


def _synchronized(model: nn.Module, model_name: str) -> nn.Module:
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def _conversion(norm_layer: Any) -> Callable[[nn.Module, str], nn.Module] | None:
    """How a built network gets the norms that `norm_layer` asks for; None if timm must see to it."""
    if norm_layer == "FrozenBN" or (
        isinstance(norm_layer, type) and issubclass(norm_layer, FrozenBatchNorm2d)
    ):
        return _frozen
    if norm_layer in ("SyncBN", "nnSyncBN", nn.SyncBatchNorm):
        return _synchronized
    return None


def _for_timm(norm_layer: str | Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    if not isinstance(norm_layer, str):
        return norm_layer
    get_norm(norm_layer, 32)  # so that an unknown name is told now
    if norm_layer == "BN":
        return nn.BatchNorm2d
    return lambda channels, **_: cast(nn.Module, get_norm(norm_layer, channels))


_TIMM_FEATURES = "timm's network (MODEL.TIMM.OUT_INDICES)"


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg, input_shape: ShapeSpec) -> TimmBackbone:
    """Build a network of timm from `cfg.MODEL.TIMM`.

    Args:
        cfg: the full config.
        input_shape: channels of the image.

    Raises:
        ValueError: a key with an illegal value; the key is named.
        FileNotFoundError: weights that are not there.
    """
    timm = cfg.MODEL.TIMM
    with config_keys("MODEL.TIMM"):
        return TimmBackbone(
            timm.MODEL_NAME,
            pretrained=timm.PRETRAINED,
            checkpoint_path=timm.CHECKPOINT_PATH,
            in_channels=input_shape.channels,
            out_indices=timm.OUT_INDICES,
            norm_layer=timm.NORM or None,
        )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build a network of timm with FPN, and "p6", from `cfg.MODEL.TIMM` and `cfg.MODEL.FPN`.

    `MODEL.FPN.IN_FEATURES` names timm's maps: "p1" to "p4" of a ResNet become levels "p2" to "p5".

    Args:
        cfg: the full config.
        input_shape: channels of the image.
    """
    return fpn_from_config(cfg, build_timm_backbone(cfg, input_shape), LastLevelMaxPool(), _TIMM_FEATURES)


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build a network of timm with FPN, and RetinaNet's "p6" and "p7" from the last of its maps.

    Args:
        cfg: the full config.
        input_shape: channels of the image.
    """
    return retinanet_fpn_from_config(cfg, build_timm_backbone(cfg, input_shape), _TIMM_FEATURES)
