"""State that a resumed run restores in addition to parameters: the optimizer, and the state of each process.

Some modules keep numbers from step to step outside of parameters and buffers, such as the loss normalizer of
dense detectors, because published checkpoints have no entry for them. These modules have the methods
``training_state()``, which returns a dict of plain numbers, and ``load_training_state(state)``.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from detlib.utils import comm

__all__ = ["check_optimizer_state", "gather_process_state", "load_process_state"]

logger = logging.getLogger(__name__)

# The schedule sets the current learning rate; the others choose an implementation of the same update.
_NOT_COMPARED = ("params", "lr", "foreach", "fused", "capturable", "differentiable", "maximize")
_NAMES = {"initial_lr": "learning rate"}


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Check that a saved state fits an optimizer and its parameters. PyTorch itself fails late or not at all.

    Also warn about settings that the state restores although the config now has other values.

    Args:
        optimizer: the optimizer that will load the state.
        state: the saved result of ``optimizer.state_dict()``.

    Raises:
        ValueError: if it does not fit; the message has the difference and a remedy.
    """
    difference = _difference(optimizer, state)
    if difference:
        raise ValueError(
            f"The optimizer state of the checkpoint does not fit: {difference}. A resumed run needs the same "
            "model, frozen parameters (MODEL.FREEZE, train.freeze) and optimizer. To start a new run from "
            "its weights, set MODEL.WEIGHTS (train.init_checkpoint) to it and leave out --resume"
        )
    kept: dict[str, None] = {}
    for group, saved in zip(optimizer.param_groups, state["param_groups"]):
        for name in group.keys() & saved.keys() - set(_NOT_COMPARED):
            old, new = saved[name], group[name]
            if _as_tuple(old) != _as_tuple(new):
                kept[f"{_NAMES.get(name, name)} {old} instead of {new}"] = None
    if kept:
        logger.warning(
            "A resumed run keeps the optimizer settings of the checkpoint, not those of the config: %s",
            ", ".join(sorted(kept)),
        )


def _difference(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> str:
    groups, saved_groups = optimizer.param_groups, state["param_groups"]
    if saved_groups:
        lacks = optimizer.defaults.keys() - saved_groups[0].keys()
        others = saved_groups[0].keys() - groups[0].keys()
        if lacks and others:  # either one alone comes from another release of PyTorch
            return f"it has {sorted(others)} and lacks {sorted(lacks)} of {type(optimizer).__name__}"
    sizes = [[len(group["params"]) for group in some] for some in (saved_groups, groups)]
    if sizes[0] != sizes[1]:
        return f"it has groups of {sizes[0]} parameters, the model has groups of {sizes[1]}"
    params = [param for group in groups for param in group["params"]]
    numbers = [number for group in saved_groups for number in group["params"]]
    for number, param in zip(numbers, params):
        for name, value in state["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != param.shape:
                return (
                    f"its '{name}' of a parameter has shape {tuple(value.shape)}, the model's parameter has "
                    f"{tuple(param.shape)}"
                )
    return ""


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _stateful_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "training_state")}


def gather_process_state(model: nn.Module) -> list[dict]:
    """Return the ``training_state()`` of every process by module name; [] if no module has one.

    All processes call this together.
    """
    modules = _stateful_modules(model)
    if not modules:
        return []
    return comm.all_gather({name: module.training_state() for name, module in modules.items()})


def load_process_state(model: nn.Module, states: list[dict]) -> None:
    """Restore the result of `gather_process_state`. Other numbers of processes use the mean."""
    if not states:
        return
    if len(states) == comm.get_world_size():
        mine = states[comm.get_rank()]
    else:
        mine = {
            name: {key: sum(s[name][key] for s in states) / len(states) for key in state}
            for name, state in states[0].items()
        }
    for name, module in _stateful_modules(model).items():
        if name in mine:
            module.load_training_state(mine[name])
