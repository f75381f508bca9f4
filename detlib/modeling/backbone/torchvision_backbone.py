"""The networks of torchvision as backbones, by its feature extraction: any node of a network can be a map."""

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from detlib.layers.shape_spec import ShapeSpec
from detlib.modeling.backbone.build import BACKBONE_REGISTRY
from detlib.modeling.backbone.fpn import FPN, LastLevelMaxPool, fpn_from_config, retinanet_fpn_from_config
from detlib.modeling.backbone.third_party import ThirdPartyBackbone
from detlib.modeling.config_checks import config_keys
from detlib.utils.download import is_offline
from detlib.utils.suggest import suggest

__all__ = [
    "TorchvisionBackbone",
    "build_retinanet_torchvision_fpn_backbone",
    "build_torchvision_backbone",
    "build_torchvision_fpn_backbone",
]


class TorchvisionBackbone(ThirdPartyBackbone):
    """A network of torchvision that gives the outputs of some of its nodes as maps.

    The network is ``model``, its graph with the chosen outputs is ``feature_extractor``; both hold the same
    parameters, so each has two names. Batch norms are torchvision's and train. Parameters that no map depends
    on, such as those of the classifier, keep their values and names but do not train.
    """

    _network_name = "feature_extractor"

    def __init__(
        self,
        model_name: str = "resnet50",
        pretrained: bool = False,
        return_nodes: Mapping[str, str] | None = {  # noqa: B006, it is only read
            "layer1": "res2",
            "layer2": "res3",
            "layer3": "res4",
            "layer4": "res5",
        },
        train_return_nodes: Mapping[str, str] | None = None,
        eval_return_nodes: Mapping[str, str] | None = None,
        tracer_kwargs: Mapping[str, Any] | None = None,
        suppress_diff_warnings: bool = False,
        **kwargs: Any,
    ):
        """
        Args:
            model_name: a classifier of `torchvision.models.list_models(torchvision.models)`.
            pretrained: load torchvision's best weights, over the network unless they are in its cache.
            return_nodes: from nodes, as `torchvision.models.feature_extraction.get_graph_node_names` lists
                them or the part before a dot, to the names of the maps.
            train_return_nodes, eval_return_nodes: the same for training and for inference, where their nodes
                differ. Both or none; they go before `return_nodes`, and give maps of the same names.
            tracer_kwargs, suppress_diff_warnings: those of torchvision's `create_feature_extractor`.
            **kwargs: arguments of the network itself.

        Raises:
            ValueError: an unknown model or node (near names are listed), a node that is no feature map, or
                `train_return_nodes` and `eval_return_nodes` that do not go together.
            FileNotFoundError: pretrained weights are neither in the cache nor to be had; what to put where
                is told.
        """
        # On use: all else must run where torchvision does not load.
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        super().__init__()
        self.model_name = model_name
        train, evaluate = _both_nodes(return_nodes, train_return_nodes, eval_return_nodes)
        self.model = _create(model_name, pretrained, kwargs)
        tracer_kwargs = dict(tracer_kwargs or {})
        for nodes, known in zip(
            (train, evaluate),
            get_graph_node_names(self.model, tracer_kwargs, suppress_diff_warning=True),
        ):
            _check_nodes(model_name, nodes, known)
        self.feature_extractor = create_feature_extractor(
            self.model,
            train_return_nodes=train,
            eval_return_nodes=evaluate,
            tracer_kwargs=tracer_kwargs,
            suppress_diff_warning=suppress_diff_warnings,
        )
        self._probe(3, list(evaluate.values()), f"torchvision's model {model_name!r}")

    def __deepcopy__(self, memo):
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        # The copy of an extractor is made anew, for training, whatever its parts were in.
        twin.feature_extractor.train(self.feature_extractor.training)
        for module, own in zip(twin.modules(), self.modules()):
            module.training = own.training
        return twin

    def _run(self, network, x):
        outputs = network(x)
        return [outputs[name] for name in self._out_features]


def _both_nodes(both, train, evaluate) -> tuple[dict[str, str], dict[str, str]]:
    """The nodes for training and for inference."""
    if (train is None) != (evaluate is None):
        raise ValueError(
            "TorchvisionBackbone takes train_return_nodes and eval_return_nodes together, got one without "
            "the other"
        )
    train, evaluate = (both, both) if train is None else (train, evaluate)
    if not train or not evaluate:
        raise ValueError("TorchvisionBackbone's return_nodes must name at least one node")
    train, evaluate = dict(train), dict(evaluate)
    for nodes in (train, evaluate):
        if len(set(nodes.values())) < len(nodes):
            raise ValueError(f"TorchvisionBackbone's return_nodes give two nodes one name: {nodes}")
    if set(train.values()) != set(evaluate.values()):
        raise ValueError(
            f"TorchvisionBackbone's train_return_nodes give the maps {list(train.values())}, its "
            f"eval_return_nodes {list(evaluate.values())}: they must be the same"
        )
    return train, evaluate


def _check_nodes(model_name: str, nodes: Mapping[str, str], known: list[str]) -> None:
    legal = set(known)
    for node in known:
        parts = node.split(".")
        legal |= {".".join(parts[:i]) for i in range(1, len(parts))}
    for node in nodes:
        if node not in legal:
            raise ValueError(
                f"TorchvisionBackbone's return_nodes: {model_name!r} has no node {node!r}."
                f"{suggest(node, sorted(legal))} Its outermost nodes are "
                f"{', '.join(dict.fromkeys(name.split('.')[0] for name in known))}; "
                "torchvision.models.feature_extraction.get_graph_node_names lists all"
            )


def _create(model_name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    import torchvision

    models = torchvision.models.list_models(torchvision.models)
    if str(model_name).lower() not in models:
        raise ValueError(
            f"torchvision {torchvision.__version__} has no classifier {model_name!r}."
            f"{suggest(model_name, models)} torchvision.models.list_models(torchvision.models) lists all"
        )
    if not pretrained:
        return torchvision.models.get_model(model_name, weights=None, **kwargs)
    weights = torchvision.models.get_model_weights(model_name).DEFAULT
    place = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
    try:
        if is_offline() and not os.path.isfile(place):
            raise OSError("$DETLIB_OFFLINE forbids downloading")
        return torchvision.models.get_model(model_name, weights=weights, **kwargs)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and os.path.isfile(place):
            raise  # they were there, and do not fit
        raise FileNotFoundError(
            f"The pretrained weights of torchvision's model {model_name!r} ({weights}) cannot be loaded "
            f"({type(error).__name__}: {error}). They are at {weights.url}, and cached as {place!r}: put the "
            "file there. Or give it as train.init_checkpoint (MODEL.WEIGHTS), with pretrained=False"
        ) from error


_TORCHVISION_FEATURES = "torchvision's network (MODEL.TORCHVISION.OUT_FEATURES)"


@BACKBONE_REGISTRY.register()
def build_torchvision_backbone(cfg, input_shape: ShapeSpec) -> TorchvisionBackbone:
    """Build a network of torchvision from `cfg.MODEL.TORCHVISION`.

    Args:
        cfg: the full config.
        input_shape: channels of the image, which must be 3.

    Raises:
        ValueError: a key with an illegal value; the key is named.
        FileNotFoundError: weights that are not there.
    """
    keys = cfg.MODEL.TORCHVISION
    where = "MODEL.TORCHVISION"
    if input_shape.channels != 3:
        raise ValueError(
            f"{where}: torchvision's networks take images of 3 channels, MODEL.PIXEL_MEAN has "
            f"{input_shape.channels}"
        )
    if len(keys.RETURN_NODES) != len(keys.OUT_FEATURES):
        raise ValueError(
            f"{where}.OUT_FEATURES must name each node of {where}.RETURN_NODES: got "
            f"{list(keys.OUT_FEATURES)} for {list(keys.RETURN_NODES)}"
        )
    with config_keys(where):
        return TorchvisionBackbone(
            keys.MODEL_NAME,
            pretrained=keys.PRETRAINED,
            return_nodes=dict(zip(keys.RETURN_NODES, keys.OUT_FEATURES)),
        )


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build a network of torchvision with FPN, and "p6", from `cfg.MODEL.TORCHVISION` and `cfg.MODEL.FPN`.

    Args:
        cfg: the full config.
        input_shape: channels of the image.
    """
    bottom_up = build_torchvision_backbone(cfg, input_shape)
    return fpn_from_config(cfg, bottom_up, LastLevelMaxPool(), _TORCHVISION_FEATURES)


@BACKBONE_REGISTRY.register()
def build_retinanet_torchvision_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build a network of torchvision with FPN, and RetinaNet's "p6" and "p7" from the last of its maps.

    Args:
        cfg: the full config.
        input_shape: channels of the image.
    """
    return retinanet_fpn_from_config(cfg, build_torchvision_backbone(cfg, input_shape), _TORCHVISION_FEATURES)
