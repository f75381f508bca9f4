"""Networks of timm (PyTorch Image Models) as backbones. Install timm with the extra ``detlib[timm]``."""

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

# Arguments that make networks of timm accept images of any size; most networks need none.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"strict_img_size": False},
    {},
)


class TimmBackbone(ThirdPartyBackbone):
    """A network of timm with feature maps "p0", "p1", ..., which are timm's features 0, 1, ...

    The strides depend on the network, see `output_shape`: a ResNet has "p0" of stride 2 to "p4" of stride 32,
    a ConvNeXt or Swin Transformer "p0" of stride 4 to "p3" of stride 32. All feature maps of a vision
    transformer have the same stride; it accepts images of any size too.

    Parameters are those of timm's feature extractor, with the prefix ``timm_model``. Parameters that no
    feature map depends on, which timm leaves in a few networks, are frozen.
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
            model_name: name of a model in `timm.list_models()`, such as "resnet50", optionally with the
                tag of its weights, such as "resnet50.a1_in1k".
            features_only: must be True; a classifier has no feature maps.
            pretrained: whether to load timm's weights, which are downloaded unless they are in the cache.
            checkpoint_path: a file with timm's weights for this model (``.safetensors``, ``.pth``), loaded
                like pretrained weights but without downloading.
            in_channels: number of image channels; timm adapts pretrained weights for another number.
            out_indices: indices of timm's features; negative ones count from the last.
            norm_layer: None for the network's own norms. `FrozenBatchNorm2d` ("FrozenBN") converts its batch
                norms to frozen ones with the same values and eps, `torch.nn.SyncBatchNorm` ("SyncBN") to
                synchronized ones. Other norms are passed to timm; its ResNets accept them.
            out_features: names of the feature maps to return; all of `out_indices` by default.

        Raises:
            ImportError: timm is not installed.
            ValueError: the model is unknown (similar names are listed), an index is out of range, the model
                has no feature maps or does not accept images of any size, or the norm does not fit.
            FileNotFoundError: `checkpoint_path` does not exist, or the pretrained weights are neither in the
                cache nor available for download; the message names the files and folders.
        """
        super().__init__()
        self.model_name = model_name
        if not features_only:
            raise ValueError("TimmBackbone needs features_only=True: otherwise, timm returns class scores")
        _check_model_name(model_name)
        if checkpoint_path and not os.path.isfile(checkpoint_path):
            raise FileNotFoundError(f"TimmBackbone's checkpoint_path {checkpoint_path!r} is not a file")
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
    """Log the channels and strides of features, as reported by a feature extractor of timm."""
    channels, strides = feature_info.channels(), feature_info.reduction()
    for index, *values in zip(feature_info.out_indices, channels, strides):
        logger.info("Feature %d of timm's model has %d channels and stride %d", index, *values)


def _import_timm() -> Any:
    if is_offline():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when timm is first imported
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
    if ":" in name:  # a model from a hub or a folder
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}.{suggest(architecture, timm.list_models())} "
            "timm.list_models() lists all models"
        )
    if tag:
        tagged = timm.list_pretrained(f"{architecture}.*")
        if name not in tagged:
            raise ValueError(
                f"timm {timm.__version__} has no weights {name!r} for the model {architecture!r}."
                f"{suggest(name, tagged)} It has {', '.join(tagged) or 'none'}"
            )


def _numbers(model_name: str, out_indices: Sequence[int], kwargs: dict[str, Any]) -> list[int]:
    """Return `out_indices` as non-negative numbers in ascending order."""
    indices = list(out_indices)
    if not indices or not all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
        raise ValueError(f"TimmBackbone's out_indices must be indices of features, got {out_indices!r}")
    with torch.device("meta"):
        count = len(_build(model_name, {**kwargs, "out_indices": (-1,)}).feature_info.info)
    wrong = [i for i in indices if not -count <= i < count]
    if wrong:
        raise ValueError(
            f"TimmBackbone's out_indices are {tuple(indices)}, but {model_name!r} has {count} features, "
            f"0 to {count - 1}; out of range: {', '.join(map(str, wrong))}"
        )
    numbers = sorted({i % count for i in indices})
    if len(numbers) < len(indices):
        raise ValueError(f"TimmBackbone's out_indices {tuple(indices)} name a feature twice")
    return numbers


def _build(model_name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Create a feature extractor of timm that accepts images of any size, if the network supports it."""
    timm = _import_timm()
    for size_kwargs in _ANY_SIZE:
        try:
            model = timm.create_model(model_name, features_only=True, **kwargs, **size_kwargs)
        except TypeError as error:
            if any(name in str(error) for name in size_kwargs):
                continue
            raise ValueError(f"timm cannot build {model_name!r} with {kwargs}: {error}") from error
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "features_only" not in str(error):
                raise
            raise ValueError(
                f"timm's model {model_name!r} has no features {list(kwargs['out_indices'])}: {error}"
            ) from error
        for module in model.modules():
            if not getattr(module, "strict_img_size", True) and hasattr(module, "dynamic_img_pad"):
                module.dynamic_img_pad = True  # Swin Transformers have no argument for it
        return model
    raise AssertionError("unreachable: the last entry of _ANY_SIZE is empty")


def _create(model_name: str, pretrained: bool, checkpoint_path: str, kwargs: dict[str, Any]) -> nn.Module:
    if checkpoint_path:
        # Load them as pretrained weights, so that timm renames old parameters and drops the classifier.
        file = {"file": checkpoint_path, "source": "timm"}
        return _build(model_name, {**kwargs, "pretrained": True, "pretrained_cfg_overlay": file})
    if not pretrained:
        return _build(model_name, kwargs)
    try:
        return _build(model_name, {**kwargs, "pretrained": True})
    except Exception as error:
        with torch.device("meta"):
            model = _build(model_name, kwargs)  # raises again if the error is not about weights
        raise _no_weights(model_name, model.pretrained_cfg, error) from error


def _no_weights(model_name: str, source: dict[str, Any], error: Exception) -> Exception:
    """Return the exception for pretrained weights that cannot be loaded."""
    hub, url = source.get("hf_hub_id"), source.get("url")
    if not hub and not url:
        return ValueError(f"timm has no pretrained weights for {model_name!r}: set pretrained=False")
    full = ".".join(filter(None, (source.get("architecture", model_name), source.get("tag"))))
    ways = []
    if hub:
        from huggingface_hub.constants import HF_HUB_CACHE

        filename = source.get("hf_hub_filename") or "model.safetensors"
        ways.append(
            f"They are {filename!r} in {hub!r} on the Hugging Face Hub, and are cached in "
            f"{os.path.join(HF_HUB_CACHE, 'models--' + hub.replace('/', '--'))!r}: copy that folder from a "
            "machine that has it"
        )
    if url:
        cached = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
        cache_hint = "" if hub else f", and are cached as {cached!r}: put the file there"
        ways.append(f"They are {'also ' if hub else ''}at {url}{cache_hint}")
    return FileNotFoundError(
        f"The pretrained weights of timm's model {model_name!r} ({full}) cannot be loaded "
        f"({type(error).__name__}: {error}). {'. '.join(ways)}. Or set checkpoint_path to a "
        "weights file"
    )


class _FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """A frozen batch norm with the dropout and activation that timm fuses into some batch norms."""

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def _freeze_norms(module: nn.Module) -> int:
    """Replace all batch norms inside `module` by frozen ones, and return their number."""
    count = 0
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            is_fused = hasattr(child, "act")
            new = (_FrozenBatchNormAct2d if is_fused else FrozenBatchNorm2d).convert_frozen_batchnorm(child)
            if is_fused:
                new.drop, new.act = getattr(child, "drop", nn.Identity()), child.act
            setattr(module, name, new)
            count += 1
        else:
            count += _freeze_norms(child)
    return count


def _frozen(model: nn.Module, model_name: str) -> nn.Module:
    if not _freeze_norms(model):
        logger.warning("timm's model '%s' has no batch norms to freeze", model_name)
    return model


def _synchronized(model: nn.Module, model_name: str) -> nn.Module:
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def _conversion(norm_layer: Any) -> Callable[[nn.Module, str], nn.Module] | None:
    """Return the function that converts the norms of a built network; None if `norm_layer` goes to timm."""
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
    get_norm(norm_layer, 32)  # raise for an unknown name here
    if norm_layer == "BN":
        return nn.BatchNorm2d
    return lambda channels, **_: cast(nn.Module, get_norm(norm_layer, channels))


_TIMM_FEATURES = "timm's network (MODEL.TIMM.OUT_INDICES)"


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg, input_shape: ShapeSpec) -> TimmBackbone:
    """Build a network of timm from `cfg.MODEL.TIMM`.

    Args:
        cfg: the full config.
        input_shape: `ShapeSpec` with the number of image channels.

    Raises:
        ValueError: a value is illegal; the message names the key.
        FileNotFoundError: the weights do not exist.
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
    """Build a network of timm with FPN and "p6" from `cfg.MODEL.TIMM` and `cfg.MODEL.FPN`.

    `MODEL.FPN.IN_FEATURES` are the names of timm's feature maps: "p1" to "p4" of a ResNet become the levels
    "p2" to "p5".

    Args:
        cfg: the full config.
        input_shape: `ShapeSpec` with the number of image channels.
    """
    return fpn_from_config(cfg, build_timm_backbone(cfg, input_shape), LastLevelMaxPool(), _TIMM_FEATURES)


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build a network of timm with FPN and RetinaNet's "p6" and "p7", computed from its last feature map.

    Args:
        cfg: the full config.
        input_shape: `ShapeSpec` with the number of image channels.
    """
    return retinanet_fpn_from_config(cfg, build_timm_backbone(cfg, input_shape), _TIMM_FEATURES)
