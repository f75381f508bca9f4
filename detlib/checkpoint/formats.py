"""Reading and writing of checkpoint files, with one function per format.

A reader returns a dict with the parameters under "model" (name to `torch.Tensor` or `numpy.ndarray`) and the
other entries of the file ("optimizer", "trainer", "iteration", "__author__", "matching_heuristics" ...). No
reader executes code from the file, unless the file is trusted.
"""

import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.safe_pickle import NUMPY_STAND_INS, load_plain_pickle, resolve_stand_ins

__all__ = ["read_checkpoint", "to_plain_types", "write_checkpoint"]

logger = logging.getLogger(__name__)

# First bytes of files in the format of torch.save before zip files: a pickled number.
_OLD_TORCH_MAGIC = (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19",)
# torch.save does not compress, and weights that were compressed by other means do not shrink much.
_LARGEST_EXPANSION = 20
_UNRELATED_TO_CONTENT = (OSError, MemoryError)


def read_checkpoint(path: str, *, trust: bool = False) -> dict[str, Any]:
    """Read the checkpoint file at the local `path`.

    Args:
        path: a file of `torch.save` (``.pth``, ``.pyth``), a pickle (``.pkl``) or ``.safetensors``.
        trust: unpickle the file without checks, so that it may run any code. Use it only for your own files.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file would run code, is broken, or is not a checkpoint.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"Checkpoint file {path} does not exist")
    reader = _reader(path)
    if trust and reader is not _read_safetensors:
        logger.warning("Checkpoint file %s is trusted: it may run any code", path)
        reader = _TRUSTING_READERS[reader]
    content = reader(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"Checkpoint file {path} holds a {type(content).__name__} instead of a dict")
    content = _with_model_entry(dict(content), path)
    if not isinstance(content["model"], Mapping):
        raise ValueError(
            f"Checkpoint file {path} holds a {type(content['model']).__name__} under 'model' "
            "instead of a dict of names and arrays"
        )
    return content


def _with_model_entry(content: dict[str, Any], path: str) -> dict[str, Any]:
    """Move the parameters to "model", from the entries that other libraries use."""
    if "model" in content:
        return content
    if "blobs" in content:  # Detectron and Caffe2
        content["model"] = content.pop("blobs")
        return content | {"__author__": "Caffe2"}
    if "model_state" in content:  # PySlowFast and pycls
        content["model"] = content.pop("model_state")
        return {"matching_heuristics": True} | content
    if "state_dict" in content:
        content["model"] = content.pop("state_dict")
        return content
    # A bare state dict, as torch.save(model.state_dict()) writes it.
    others = [k for k, v in content.items() if not isinstance(v, torch.Tensor | np.ndarray | np.generic)]
    if others or not content:
        raise ValueError(
            f"Checkpoint file {path} has neither a 'model' entry nor only arrays; "
            f"entries that are not arrays: {', '.join(map(repr, others[:8])) or 'none, it is empty'}"
        )
    bare = {"model": content}
    # Only Caffe2 has names without dots.
    return bare if any("." in name for name in content) else bare | {"__author__": "Caffe2"}


def _reader(path: str) -> Callable[[str], Any]:
    """Return the reader for a file. The content decides, since extensions are often wrong."""
    if path.endswith(".safetensors"):
        return _read_safetensors
    with open(path, "rb") as f:
        start = f.read(16)
    if path.endswith(".pkl") and not start.startswith((b"PK\x03\x04", *_OLD_TORCH_MAGIC)):
        return _read_pickle
    return _read_torch


def _read_pickle(path: str) -> Any:
    """Read a model-zoo ``{"model": {name: ndarray}, "__author__": ..., "matching_heuristics": ...}``."""
    with open(path, "rb") as f:
        try:
            return load_plain_pickle(f)
        except pickle.UnpicklingError as e:
            raise ValueError(f"Checkpoint file {path} cannot be loaded: {e}") from e
        except _UNRELATED_TO_CONTENT:
            raise
        except Exception as e:  # a broken pickle can raise any exception
            raise ValueError(f"Checkpoint file {path} is broken: {e}") from e


def _read_torch(path: str) -> Any:
    """Read a file of `torch.save` with tensors, numpy arrays and scalars, and plain containers."""
    _refuse_zip_bombs(path)
    try:
        with torch.serialization.safe_globals(list(NUMPY_STAND_INS)):
            return resolve_stand_ins(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as e:
        raise ValueError(
            f"Checkpoint file {path} cannot be loaded: it is broken, or has Python objects other than "
            "tensors, numpy arrays and plain containers, which could run code. Message of PyTorch: "
            f"{_first_sentences(str(e))}"
        ) from e
    except _UNRELATED_TO_CONTENT:
        raise
    except Exception as e:  # a broken pickle can raise any exception
        raise ValueError(f"Checkpoint file {path} is broken: {e}") from e


def _refuse_zip_bombs(path: str) -> None:
    """Raise a ValueError for a zip file with entries far larger than the file."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > _LARGEST_EXPANSION * os.path.getsize(path):
        raise ValueError(
            f"Checkpoint file {path} is refused: its {os.path.getsize(path)} bytes would expand to {size}"
        )


def _read_safetensors(path: str) -> Any:
    """Read tensors by name, in Hugging Face's safetensors format."""
    import safetensors.torch

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
        content = {"model": safetensors.torch.load_file(path)}
        return content | {"matching_heuristics": True} if "matching_heuristics" in notes else content
    except safetensors.SafetensorError as e:
        raise ValueError(f"Checkpoint file {path} is broken: {e}") from e


def _read_any_pickle(path: str) -> Any:
    with open(path, "rb") as f:
        return pickle.load(f, encoding="latin1")


def _read_any_torch(path: str) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)


_TRUSTING_READERS: dict[Callable[[str], Any], Callable[[str], Any]] = {
    _read_pickle: _read_any_pickle,
    _read_torch: _read_any_torch,
}


def _first_sentences(message: str) -> str:
    """Return the part of PyTorch's message on what was refused, without its advice on unsafe loading."""
    blamed = [line.strip() for line in message.splitlines() if "Unsupported" in line or "GLOBAL" in line]
    return " ".join(blamed) or message.strip().splitlines()[0]


def write_checkpoint(path: str, content: Mapping[str, Any]) -> None:
    """Save `content` at `path` atomically, so that there is never a half-written file.

    For a path that ends in ``.safetensors``, only the tensors of ``content["model"]`` are saved. Other files
    are written by `torch.save`. Only plain types are saved (see `to_plain_types`), so any version of PyTorch
    can read the file with ``weights_only=True``.

    Raises:
        TypeError: if a value in `content` is neither a tensor nor of a plain type.
    """
    if path.endswith(".safetensors"):
        data = _safetensors_bytes(content)
        write_bytes_atomically(path, lambda file: file.write(data))
        return
    plain = to_plain_types(content, "checkpoint")
    write_bytes_atomically(path, lambda file: torch.save(plain, file))


def _safetensors_bytes(content: Mapping[str, Any]) -> bytes:
    import safetensors.torch

    tensors = {name: torch.as_tensor(value).detach() for name, value in content["model"].items()}
    owners: dict[int, str] = {}
    for name, tensor in tensors.items():
        # The format does not support views: copy tensors that share memory or are not contiguous.
        first = owners.setdefault(tensor.untyped_storage().data_ptr(), name)
        tensors[name] = tensor.contiguous() if first == name else tensor.clone().contiguous()
    notes = {"matching_heuristics": "true"} if content.get("matching_heuristics") else {}
    return safetensors.torch.save(tensors, {"format": "pt"} | notes)


def to_plain_types(value: Any, where: str) -> Any:
    """Copy a tree, with numpy scalars and mappings converted to plain numbers and dicts.

    Args:
        value: tensors, numbers, strings, None, and dicts, lists, tuples and sets of them.
        where: name of `value` in messages.

    Raises:
        TypeError: for anything else. The message has its path in the tree.
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
        # State dicts have the versions of their modules in the attribute _metadata.
        copy: Any = type(value)() if hasattr(value, "_metadata") else {}
        for key, item in value.items():
            copy[to_plain_types(key, where)] = to_plain_types(item, f"{where}[{key!r}]")
        if hasattr(value, "_metadata"):
            copy._metadata = value._metadata
        return copy
    if isinstance(value, list | tuple | set | frozenset):
        items = (to_plain_types(item, f"{where}[{i}]") for i, item in enumerate(value))
        container = next(t for t in (list, tuple, set, frozenset) if isinstance(value, t))
        return container(items)
    for plain in (bool, int, float, str):
        if isinstance(value, plain):  # a subclass, such as an enum member
            return plain(value)
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}: a checkpoint may only have "
        "tensors and plain types, so that it can be loaded without running code"
    )
