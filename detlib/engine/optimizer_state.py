"""What must agree between an optimizer and the state that a training resumes with."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["check_optimizer_state", "warn_of_kept_settings"]

logger = logging.getLogger(__name__)

# The rate of the step under way comes from the schedule; how the update is computed is free.
_NOT_COMPARED = ("params", "lr", "foreach", "fused", "capturable", "differentiable", "maximize")
_NAMES = {"initial_lr": "learning rate"}


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Makes sure that a state is of such an optimizer of such parameters, which PyTorch sees late or never.

    Args:
        optimizer: what is to load the state.
        state: what ``optimizer.state_dict()`` gave.

    Raises:
        ValueError: saying what differs and what to do.
    """
    difference = _difference(optimizer, state)
    if difference:
        raise ValueError(
            f"The checkpoint's optimizer does not fit: {difference}. A training is resumed with the model, "
            "frozen parameters (MODEL.FREEZE, train.freeze) and optimizer that it had. To start a new one "
            "from the checkpoint's weights, name it as MODEL.WEIGHTS (train.init_checkpoint) and leave out "
            "--resume"
        )


def _difference(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> str:
    groups, saved_groups = optimizer.param_groups, state["param_groups"]
    if saved_groups:
        lacks = optimizer.defaults.keys() - saved_groups[0].keys()
        others = saved_groups[0].keys() - groups[0].keys()
        if lacks and others:  # one of both alone is another release of PyTorch
            return f"it has {sorted(others)} and not {sorted(lacks)}, as {type(optimizer).__name__} has"
    sizes = [[len(group["params"]) for group in some] for some in (saved_groups, groups)]
    if sizes[0] != sizes[1]:
        return f"it has groups of {sizes[0]} parameters, the model has groups of {sizes[1]}"
    params = [param for group in groups for param in group["params"]]
    numbers = [number for group in saved_groups for number in group["params"]]
    for number, param in zip(numbers, params):
        for name, value in state["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != param.shape:
                return (
                    f"its '{name}' of a parameter has shape {tuple(value.shape)}, the model's parameter "
                    f"{tuple(param.shape)}"
                )
    return ""


def warn_of_kept_settings(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Warns of settings that loading a state will take from it although the config now says otherwise."""
    kept: dict[str, None] = {}
    for group, saved in zip(optimizer.param_groups, state["param_groups"]):
        for name in group.keys() & saved.keys() - set(_NOT_COMPARED):
            old, new = saved[name], group[name]
            if _plain(old) != _plain(new):
                kept[f"{_NAMES.get(name, name)} {old} instead of {new}"] = None
    if kept:
        logger.warning(
            "A resumed training keeps its optimizer's settings, whatever the config says: %s",
            ", ".join(sorted(kept)),
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
