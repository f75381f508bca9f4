"""Networks of torchvision as backbones: any node of a network can be extracted as a feature map."""

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
    """A network of torchvision that returns the outputs of some of its nodes as feature maps.

    The attribute ``model`` is the network, and ``feature_extractor`` is its graph with the selected outputs.
    They share their parameters, so each parameter has two names. Batch norms are torchvision's and are
    trained. Parameters that no feature map depends on, such as those of the classifier, are frozen.
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
            model_name: a classifier in `torchvision.models.list_models(torchvision.models)`.
            pretrained: whether to load torchvision's best weights, which are downloaded unless they are in
                the cache.
            return_nodes: a dict from nodes to names of feature maps. Nodes are listed by
                `torchvision.models.feature_extraction.get_graph_node_names`; prefixes that end before a dot
                are legal too.
            train_return_nodes, eval_return_nodes: the same for training and for inference, if their nodes
                differ. Specify both or neither; they take precedence over `return_nodes`, and must have the
                same names of feature maps.
            tracer_kwargs, suppress_diff_warnings: see torchvision's `create_feature_extractor`.
            **kwargs: arguments of the network itself.

        Raises:
            ValueError: a model or node is unknown (similar names are listed), a node is not a feature map, or
                `train_return_nodes` and `eval_return_nodes` do not fit together.
            FileNotFoundError: the pretrained weights are neither in the cache nor available for download; the
                message names the file.
        """
        # Imported here, so that the rest of detlib works where torchvision cannot be imported.
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
        # A copied extractor is always in training mode, whatever the mode of the original.
        twin.feature_extractor.train(self.feature_extractor.training)
        for module, own in zip(twin.modules(), self.modules()):
            module.training = own.training
        return twin

    def _run(self, network, x):
        outputs = network(x)
        return [outputs[name] for name in self._out_features]


def _both_nodes(both, train, evaluate) -> tuple[dict[str, str], dict[str, str]]:
    """Return the nodes for training and for inference."""
    if (train is None) != (evaluate is None):
        raise ValueError(
            "TorchvisionBackbone needs train_return_nodes and eval_return_nodes together, got only one of "
            "them"
        )
    train, evaluate = (both, both) if train is None else (train, evaluate)
    if not train or not evaluate:
        raise ValueError("TorchvisionBackbone's return_nodes must contain at least one node")
    train, evaluate = dict(train), dict(evaluate)
    for nodes in (train, evaluate):
        if len(set(nodes.values())) < len(nodes):
            raise ValueError(f"TorchvisionBackbone's return_nodes use a name for two nodes: {nodes}")
    if set(train.values()) != set(evaluate.values()):
        raise ValueError(
            f"TorchvisionBackbone's train_return_nodes have the names {list(train.values())}, but its "
            f"eval_return_nodes have {list(evaluate.values())}: they must be the same"
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
                "torchvision.models.feature_extraction.get_graph_node_names lists all nodes"
            )


def _create(model_name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    import torchvision

    models = torchvision.models.list_models(torchvision.models)
    if str(model_name).lower() not in models:
        raise ValueError(
            f"torchvision {torchvision.__version__} has no classifier {model_name!r}."
            f"{suggest(model_name, models)} torchvision.models.list_models(torchvision.models) lists all "
            "models"
        )
    if not pretrained:
        return torchvision.models.get_model(model_name, weights=None, **kwargs)
    weights = torchvision.models.get_model_weights(model_name).DEFAULT
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
    try:
        if is_offline() and not os.path.isfile(cached):
            raise OSError("$DETLIB_OFFLINE forbids downloading")
        return torchvision.models.get_model(model_name, weights=weights, **kwargs)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and os.path.isfile(cached):
            raise  # the file exists, but its weights do not fit
        raise FileNotFoundError(
            f"The pretrained weights of torchvision's model {model_name!r} ({weights}) cannot be loaded "
            f"({type(error).__name__}: {error}). They are at {weights.url}, and are cached as {cached!r}: "
            "put the file there. Or use it as train.init_checkpoint (MODEL.WEIGHTS), with pretrained=False"
        ) from error


_TORCHVISION_FEATURES = "torchvision's network (MODEL.TORCHVISION.OUT_FEATURES)"


@BACKBONE_REGISTRY.register()
def build_torchvision_backbone(cfg, input_shape: ShapeSpec) -> TorchvisionBackbone:
    """Build a network of torchvision from `cfg.MODEL.TORCHVISION`.

    Args:
        cfg: the full config.
        input_shape: `ShapeSpec` with the number of image channels, which must be 3.

    Raises:
        ValueError: a value is illegal; the message names the key.
        FileNotFoundError: the weights do not exist.
    """
    keys = cfg.MODEL.TORCHVISION
    where = "MODEL.TORCHVISION"
    if input_shape.channels != 3:
        raise ValueError(
            f"{where}: torchvision's networks need images with 3 channels, but MODEL.PIXEL_MEAN has "
            f"{input_shape.channels}"
        )
    if len(keys.RETURN_NODES) != len(keys.OUT_FEATURES):
        raise ValueError(
            f"{where}.OUT_FEATURES must have a name for each of {where}.RETURN_NODES: got "
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
    """Build a network of torchvision with FPN and "p6" from `cfg.MODEL.TORCHVISION` and `cfg.MODEL.FPN`.

    Args:
        cfg: the full config.
        input_shape: `ShapeSpec` with the number of image channels.
    """
    bottom_up = build_torchvision_backbone(cfg, input_shape)
    return fpn_from_config(cfg, bottom_up, LastLevelMaxPool(), _TORCHVISION_FEATURES)


@BACKBONE_REGISTRY.register()
def build_retinanet_torchvision_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build a network of torchvision with FPN and RetinaNet's "p6" and "p7" from its last feature map.

    Args:
        cfg: the full config.
        input_shape: `ShapeSpec` with the number of image channels.
    """
    return retinanet_fpn_from_config(cfg, build_torchvision_backbone(cfg, input_shape), _TORCHVISION_FEATURES)
