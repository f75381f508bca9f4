"""Reading and writing of checkpoint files, one function a format.

What comes out of a reader is a dict with the parameters under "model" (name to `torch.Tensor` or
`numpy.ndarray`) and whatever else the file holds ("optimizer", "trainer", "iteration", "__author__",
"matching_heuristics" ...). No reader executes code from the file.
"""

import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from detlib.checkpoint.safe_pickle import NUMPY_STAND_INS, load_plain_pickle, resolve_stand_ins
from detlib.utils.atomic_write import write_bytes_atomically

__all__ = ["read_checkpoint", "to_plain_types", "write_checkpoint"]


def read_checkpoint(path: str) -> dict[str, Any]:
    """Reads the checkpoint file at the local `path`; its ending tells the format.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file would run code, is broken, or holds something else than a checkpoint.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"Checkpoint file {path} does not exist")
    reader = _READERS.get(os.path.splitext(path)[1], _read_torch)
    content = reader(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"Checkpoint file {path} holds a {type(content).__name__} instead of a dict")
    content = dict(content)
    if "model" in content:
        if not isinstance(content["model"], Mapping):
            raise ValueError(
                f"Checkpoint file {path} holds a {type(content['model']).__name__} under 'model' "
                "instead of a dict of names and arrays"
            )
        return content
    # A bare state dict, as torch.save(model.state_dict()) writes it.
    strange = [k for k, v in content.items() if not isinstance(v, torch.Tensor | np.ndarray)]
    if strange:
        raise ValueError(
            f"Checkpoint file {path} has neither a 'model' entry nor only arrays; "
            f"entries that are no arrays: {', '.join(map(repr, strange[:8]))}"
        )
    return {"model": content}


def _read_pickle(path: str) -> Any:
    """A model-zoo ``.pkl``: ``{"model": {name: ndarray}, "__author__": ..., "matching_heuristics": ...}``."""
    with open(path, "rb") as f:
        try:
            return load_plain_pickle(f)
        except pickle.UnpicklingError as e:
            raise ValueError(f"Checkpoint file {path} cannot be loaded: {e}") from e


def _read_torch(path: str) -> Any:
    """A file of `torch.save`: tensors, numpy arrays and scalars, and plain containers."""
    try:
        with torch.serialization.safe_globals(list(NUMPY_STAND_INS)):
            return resolve_stand_ins(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as e:
        raise ValueError(
            f"Checkpoint file {path} cannot be loaded: it is broken, or holds Python objects other than "
            "tensors, numpy arrays and plain containers, which could run code. PyTorch says: "
            f"{_first_sentences(str(e))}"
        ) from e
    except (RuntimeError, EOFError) as e:
        raise ValueError(f"Checkpoint file {path} is broken: {e}") from e


_READERS: dict[str, Callable[[str], Any]] = {".pkl": _read_pickle}


def _first_sentences(message: str) -> str:
    """The part of PyTorch's message that says what was refused, without its advice on unsafe loading."""
    blamed = [line.strip() for line in message.splitlines() if "Unsupported" in line or "GLOBAL" in line]
    return " ".join(blamed) or message.strip().splitlines()[0]


def write_checkpoint(path: str, content: Mapping[str, Any]) -> None:
    """Saves `content` at `path` with `torch.save`, never leaving a half-written file there.

    Only plain types are saved (see `to_plain_types`), so every PyTorch reads the file with
    ``weights_only=True``.

    Raises:
        TypeError: if something in `content` is neither a tensor nor of a plain type.
    """
    plain = to_plain_types(content, "checkpoint")
    write_bytes_atomically(path, lambda file: torch.save(plain, file))


def to_plain_types(value: Any, where: str) -> Any:
    """Copies a tree, turning numpy scalars and mapping types into plain numbers and dicts.

    Args:
        value: tensors, numbers, strings, None, and dicts, lists, tuples and sets of them.
        where: what to call `value` in messages.

    Raises:
        TypeError: for anything else, naming its place in the tree.
    """
    if isinstance(value, torch.Tensor):
        return value.detach()
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Mapping):
        # State dicts carry versions of their modules as an attribute, which a copy keeps.
        copy = type(value)() if hasattr(value, "_metadata") else {}
        for key, item in value.items():
            copy[to_plain_types(key, where)] = to_plain_types(item, f"{where}[{key!r}]")
        if hasattr(value, "_metadata"):
            copy._metadata = value._metadata
        return copy
    if isinstance(value, list | tuple | set | frozenset):
        items = (to_plain_types(item, f"{where}[{i}]") for i, item in enumerate(value))
        kind = next(k for k in (list, tuple, set, frozenset) if isinstance(value, k))
        return kind(items)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):  # subclasses, such as enum members and torch.Size's numbers
            return kind(value)
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}: a checkpoint holds only tensors "
        "and plain types, so that it can be loaded without running code"
    )
