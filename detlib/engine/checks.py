"""Checks of a config that save the user a late failure."""

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
    """Makes sure that all data sets of a config can be found, without loading them.

    Args:
        cfg: DATASETS.TRAIN, DATASETS.TEST and TEST.VAL_LOSS are looked at; of a lazy config,
            ``dataset.names`` of ``dataloader.train``, ``dataloader.test`` and ``dataloader.val_loss``.
        train: False looks at the data to test on only.

    Raises:
        ValueError: if there is none to train on, or a name is malformed.
        KeyError: if a name is unknown; near names are listed.
        FileNotFoundError: if a file or folder of a data set does not exist.
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
            raise ValueError("DATASETS.TRAIN is empty: name a data set to train on")
        check_datasets_exist(names)
        check_datasets_exist(as_names(cfg.TEST.VAL_LOSS))
    check_datasets_exist(as_names(cfg.DATASETS.TEST))


def check_num_classes(cfg: CfgNode, names: str | Iterable[str]) -> None:
    """Compares the model's number of classes with the data sets', as far as these are known yet.

    Their names are compared with those of the first of DATASETS.TRAIN, if these are known: a class is told by
    its place alone, so in another order all would be taken for others. Other names are worth a warning.

    Raises:
        ValueError: if they differ, naming the key and both numbers; or have the same names in another order.
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
    place = next(i for i, pair in enumerate(zip(trained, classes)) if pair[0] != pair[1])
    said = (
        f"class {place} is {classes[place]!r} in dataset '{name}', but {trained[place]!r} in '{first}', "
        "which is trained on"
    )
    if sorted(trained) == sorted(classes):
        raise ValueError(f"The classes are in another order: {said}. Bring them into one order.")
    logger.warning("The classes have other names: %s.", said)


def set_num_classes(cfg: CfgNode) -> None:
    """Sets the model's numbers of classes and keypoints from the training data, if nobody has set them.

    That is so where the config has the default still and the first of DATASETS.TRAIN is a dataset URI. What
    was set otherwise stays, and is compared with the data by `check_num_classes`. Data that are not on this
    machine change nothing: a model goes where its data do not.

    Args:
        cfg: changed in place, even if it is frozen, so that what is saved is what is used.
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
        logger.warning("The numbers of classes stay as they are: %s", error)
        return
    for kind, key in unset.items():
        entries = metadata.get(kind)
        if entries and len(entries) != _get(cfg, key):
            _set(cfg, key, len(entries))
            logger.info("%s is set to %d, as dataset '%s' has them", key, len(entries), names[0])


def set_class_weights(cfg: CfgNode, model: nn.Module) -> None:
    """Give a model with a federated loss the class weights of the data that it is trained on.

    The weights are read from the metadata of DATASETS.TRAIN when the loss is first computed.

    Args:
        cfg: the model's config.
        model: the model; box predictors that have weights already keep them.
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
    """Makes sure that MODEL.WEIGHTS, or ``train.init_checkpoint``, is there, if it is a file of this machine.

    Raises:
        FileNotFoundError: naming the file.
    """
    path = RunSettings.from_config(cfg).weights.partition("?")[0]  # options of the checkpointer
    if path and not is_remote(path) and not os.path.isfile(path):
        raise FileNotFoundError(f"MODEL.WEIGHTS (train.init_checkpoint): the file {path} does not exist")
