"""Numbers that each process has for itself, beside the parameters.

A module that keeps such numbers from step to step, as dense detectors do with their losses' normaliser, has
the methods ``training_state()``, which returns a dict of plain numbers, and ``load_training_state(state)``.
Published checkpoints have no place for them among the parameters.
"""

from torch import nn

from detlib.utils import comm

__all__ = ["gather_process_state", "load_process_state"]


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "training_state")}


def gather_process_state(model: nn.Module) -> list[dict]:
    """The states of each process's modules, by process and module; [] if there is none. All take part."""
    modules = _modules(model)
    if not modules:
        return []
    return comm.all_gather({name: module.training_state() for name, module in modules.items()})


def load_process_state(model: nn.Module, states: list[dict]) -> None:
    """Restores what `gather_process_state` gave. With another number of processes, each takes the mean."""
    if not states:
        return
    if len(states) == comm.get_world_size():
        mine = states[comm.get_rank()]
    else:
        mine = {
            name: {key: sum(s[name][key] for s in states) / len(states) for key in state}
            for name, state in states[0].items()
        }
    for name, module in _modules(model).items():
        if name in mine:
            module.load_training_state(mine[name])
