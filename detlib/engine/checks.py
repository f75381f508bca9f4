"""Checks of a config before training, so that errors are raised early."""

import functools
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from detlib.config import CfgNode, get_cfg
from detlib.data.catalog import MetadataCatalog, check_datasets_exist, is_dataset_uri
from detlib.data.detection_utils import as_names, get_fed_loss_cls_weights
from detlib.engine.options import RunSettings
from detlib.modeling import FastRCNNOutputLayers, facts_of
from detlib.utils.file_io import is_remote

__all__ = [
    "check_datasets",
    "check_num_classes",
    "check_weights",
    "set_class_weights",
    "set_num_classes",
]

logger = logging.getLogger(__name__)


def check_datasets(cfg: CfgNode | Mapping[str, Any], *, train: bool = True) -> None:
    """Check that all datasets of a config exist, without loading them.

    Args:
        cfg: a CfgNode, of which DATASETS.TRAIN, DATASETS.TEST and TEST.VAL_LOSS are checked; or a lazy
            config, with ``dataset.names`` of ``dataloader.train``, ``dataloader.test`` and
            ``dataloader.val_loss``.
        train: False checks the test data only.

    Raises:
        ValueError: if there is no training dataset, or a name is malformed.
        KeyError: if a name is unknown; similar names are listed.
        FileNotFoundError: if a file or folder of a dataset does not exist.
    """
    if not isinstance(cfg, CfgNode):
        loaders = cfg.get("dataloader", {})
        nodes = [loaders.get(part, {}) for part in (("train", "test") if train else ("test",))]
        val_loss = loaders.get("val_loss", {}) if train else {}
        nodes += [val_loss] if "_target_" in val_loss else list(val_loss.values())
        for node in nodes:
            check_datasets_exist(as_names(node.get("dataset", {}).get("names", ())))
        return
    if train:
        names = as_names(cfg.DATASETS.TRAIN)
        if not names:
            raise ValueError("DATASETS.TRAIN is empty: name a dataset to train on")
        check_datasets_exist(names)
        check_datasets_exist(as_names(cfg.TEST.VAL_LOSS))
    check_datasets_exist(as_names(cfg.DATASETS.TEST))


def check_num_classes(cfg: CfgNode, names: str | Iterable[str]) -> None:
    """Compare the model's number of classes with those of datasets whose classes are already known.

    The class names are compared with those of the first dataset of DATASETS.TRAIN. A model identifies a class
    by its index only, so the same names in another order are an error; different names are a warning.

    Args:
        cfg: the config.
        names: the datasets to check.

    Raises:
        ValueError: if the numbers (the message has the config key) or the orders of the classes differ.
    """
    for kind, key in facts_of(cfg).num_classes_keys(cfg).items():
        if kind == "keypoint_names":
            continue
        number = _get(cfg, key)
        for name in as_names(names):
            classes = MetadataCatalog.get(name).get(kind)
            if classes and len(classes) != number:
                shown = ", ".join(map(str, classes[:5])) + (", ..." if len(classes) > 5 else "")
                hint = "; the background does not count" if kind == "thing_classes" else ""
                raise ValueError(
                    f"{key} is {number}, but dataset '{name}' has {len(classes)} classes ({shown}). "
                    f"Set {key} to {len(classes)}{hint}."
                )
            if classes:
                _compare_names(cfg, kind, name, [*classes])


def _compare_names(cfg: CfgNode, kind: str, name: str, classes: list[str]) -> None:
    first = next(iter(as_names(cfg.DATASETS.TRAIN)), name)
    trained = [*(MetadataCatalog.get(first).get(kind) or ())] if first in MetadataCatalog else []
    if len(trained) != len(classes) or trained == classes:
        return
    index = next(i for i, pair in enumerate(zip(trained, classes)) if pair[0] != pair[1])
    difference = (
        f"class {index} is {classes[index]!r} in dataset '{name}', but {trained[index]!r} in the training "
        f"dataset '{first}'"
    )
    if sorted(trained) == sorted(classes):
        raise ValueError(f"The order of the classes differs: {difference}. Use the same order.")
    logger.warning("The class names differ: %s.", difference)


def set_num_classes(cfg: CfgNode) -> None:
    """Set the model's number of classes and keypoints from the training data, unless the config sets them.

    A number is set if it has its default value and the first entry of DATASETS.TRAIN is a dataset URI. Other
    values are kept, and `check_num_classes` compares them with the data. If the data are not on this machine,
    nothing changes, because a model is often used without its data.

    Args:
        cfg: modified in-place, even if it is frozen, so that the saved config is the one in use.
    """
    names = as_names(cfg.DATASETS.TRAIN)
    if not names or not is_dataset_uri(names[0]):
        return
    defaults = get_cfg()
    keys = facts_of(cfg).num_classes_keys(cfg)
    # A key of a third-party model has no default here, so it counts as set.
    unset = {kind: key for kind, key in keys.items() if _get(cfg, key) == _get(defaults, key)}
    if not unset:
        return
    try:
        check_datasets_exist(names[0])
        metadata = MetadataCatalog.get(names[0])
    except FileNotFoundError as error:
        logger.warning("Could not set the number of classes from the data: %s", error)
        return
    for kind, key in unset.items():
        entries = metadata.get(kind)
        if entries and len(entries) != _get(cfg, key):
            _set(cfg, key, len(entries))
            logger.info("Setting %s to %d, as in dataset '%s'", key, len(entries), names[0])


def set_class_weights(cfg: CfgNode, model: nn.Module) -> None:
    """Set the class weights of a federated loss from the training data.

    The weights are read from the metadata of DATASETS.TRAIN when the loss is first computed.

    Args:
        cfg: the config of the model.
        model: the model; box predictors that already have weights keep them.
    """
    power = cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER
    weights = functools.partial(get_fed_loss_cls_weights, cfg.DATASETS.TRAIN, power)
    for module in model.modules():
        if isinstance(module, FastRCNNOutputLayers):
            module.provide_fed_loss_cls_weights(weights)


def _get(cfg: CfgNode, key: str) -> Any:
    """Return the value of a dotted key; None if there is no such key."""
    for part in key.split("."):
        cfg = cfg.get(part) if isinstance(cfg, CfgNode) else None
    return cfg


def _set(cfg: CfgNode, key: str, value: int) -> None:
    frozen = cfg.is_frozen()
    cfg.defrost()
    parent, _, name = key.rpartition(".")
    setattr(_get(cfg, parent), name, value)
    if frozen:
        cfg.freeze()


def check_weights(cfg: CfgNode | Mapping[str, Any]) -> None:
    """Check that MODEL.WEIGHTS or ``train.init_checkpoint`` exists, if it is a local file.

    Raises:
        FileNotFoundError: if it does not.
    """
    path = RunSettings.from_config(cfg).weights.partition("?")[0]  # options of the checkpointer
    if path and not is_remote(path) and not os.path.isfile(path):
        raise FileNotFoundError(f"MODEL.WEIGHTS (train.init_checkpoint): the file {path} does not exist")
