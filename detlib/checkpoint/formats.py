"""Reading and writing of checkpoint files, with one function per format.

A reader returns a dict with the parameters under "model" (name to `torch.Tensor` or `numpy.ndarray`) and the
other entries of the file ("optimizer", "trainer", "iteration", "__author__", "matching_heuristics" ...). No
reader executes code from the file, unless the file is trusted.
"""

import errno
import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from detlib.utils.atomic_write import write_bytes_atomically
from detlib.utils.safe_pickle import (
    NUMPY_STAND_INS,
    check_hash_costs,
    load_plain_pickle,
    resolve_stand_ins,
)

__all__ = ["CheckpointError", "read_checkpoint", "to_plain_types", "write_checkpoint"]

logger = logging.getLogger(__name__)

# First bytes of files in the format of torch.save before zip files: a pickled number.
_OLD_TORCH_MAGIC = (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19",)
# torch.save does not compress, and weights that were compressed by other means do not shrink much.
_LARGEST_EXPANSION = 20
_ZIP_MAGIC = b"PK\x03\x04"
# Parsers raise these when the content makes them seek to an impossible position.
_ERRNO_OF_PARSERS = (None, errno.EINVAL, errno.EOVERFLOW)
_TEXT_BYTES = {*range(0x20, 0x7F), *b"\t\r\n"}
_CONFIG = (
    "a config: pass it as --config-file, and set MODEL.WEIGHTS to a checkpoint. For the weights of a config "
    "of the model zoo, use detlib.model_zoo.get_checkpoint_url(config)"
)
# Position and first bytes of other formats.
_OTHER_FORMATS = (
    (0, b"\x89HDF", "an HDF5 file, as Keras writes it"),
    (0, b"\x1f\x8b", "a gzip archive: unpack it first"),
    (0, b"BZh", "a bzip2 archive: unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive: unpack it first"),
    (0, b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it first"),
    (257, b"ustar", "a tar archive: unpack it first"),
    (0, b"\x93NUMPY", "a single numpy array"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (4, b"TFL3", "a TensorFlow Lite model"),
)
_OTHER_ENDINGS = {
    ".yaml": _CONFIG,
    ".yml": _CONFIG,
    ".py": _CONFIG,
    ".json": "a JSON file",
    ".onnx": "an ONNX model",
    ".engine": "a TensorRT engine",
    ".pb": "a TensorFlow graph",
}


class CheckpointError(ValueError):
    """A checkpoint file that cannot be loaded: it is damaged, has another format, or would run code.

    The message has the path of the file.
    """


def read_checkpoint(path: str, *, trust: bool = False) -> dict[str, Any]:
    """Read the checkpoint file at the local `path`.

    Args:
        path: a file of `torch.save` (``.pth``, ``.pyth``), a pickle (``.pkl``) or ``.safetensors``.
        trust: unpickle the file without checks, so that it may run any code. Use it only for your own files.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if the file cannot be read, for example for lack of permission.
        CheckpointError: a ValueError, if the file would run code, is damaged, or is not a checkpoint. The
            message names the file and its format, if that is a known one.
    """
    if not os.path.isfile(path):
        hint = ": it is a folder" if os.path.isdir(path) else ""
        raise FileNotFoundError(f"Checkpoint file {path} does not exist{hint or _config_hint(path)}")
    content = _content(path, trust)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"Checkpoint file {path} holds a {type(content).__name__} instead of a dict")
    content = _with_model_entry(dict(content), path)
    if not isinstance(content["model"], Mapping):
        raise CheckpointError(
            f"Checkpoint file {path} holds a {type(content['model']).__name__} under 'model' "
            "instead of a dict of names and arrays"
        )
    for name in content["model"]:
        if not isinstance(name, str):
            raise CheckpointError(f"Checkpoint file {path} has the parameter name {name!r}, not a string")
    return content


def _content(path: str, trust: bool) -> Any:
    """Read a file, and turn whatever its parser raises into a CheckpointError."""
    try:
        reader = _reader(path)
        if trust and reader is not _read_safetensors:
            logger.warning("Checkpoint file %s is trusted: it may run any code", path)
            reader = _TRUSTING_READERS[reader]
        return reader(path)
    except CheckpointError:
        raise
    except MemoryError as e:
        raise MemoryError(f"Checkpoint file {path} needs more memory than is available: {e}") from e
    except Exception as e:  # the parser of a damaged file can raise any exception
        if isinstance(e, OSError) and e.errno not in _ERRNO_OF_PARSERS:
            e.filename = path
            raise
        raise _broken(path, f"{type(e).__name__}: {_first_sentences(str(e))}") from e


def _broken(path: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"Checkpoint file {path} is broken: {reason}. It has {os.path.getsize(path)} bytes; an interrupted "
        "download or copy leaves such a file, so get it again"
    )


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
        raise CheckpointError(
            f"Checkpoint file {path} has neither a 'model' entry nor only arrays; "
            f"entries that are not arrays: {', '.join(map(repr, others[:8])) or 'none, it is empty'}"
        )
    bare = {"model": content}
    # Only Caffe2 has names without dots.
    return bare if any("." in name for name in content) else bare | {"__author__": "Caffe2"}


def _reader(path: str) -> Callable[[str], Any]:
    """Return the reader for a file. The content decides, since extensions are often wrong.

    Raises:
        CheckpointError: if the file is empty or has another format.
    """
    with open(path, "rb") as f:
        start = f.read(512)
    if not start:
        raise CheckpointError(f"Checkpoint file {path} is empty: its download or copy failed; get it again")
    if start.startswith(_ZIP_MAGIC) or start.startswith(_OLD_TORCH_MAGIC):
        return _read_torch
    if path.endswith(".safetensors") or start[8:10] == b'{"':
        return _read_safetensors
    if kind := _other_format(path, start):
        raise CheckpointError(
            f"Checkpoint file {path} is {kind}. A checkpoint is a file of torch.save (.pth), a pickle of "
            "arrays (.pkl) or a .safetensors file"
        )
    return _read_pickle if path.endswith(".pkl") or start.startswith(b"\x80") else _read_torch


def _other_format(path: str, start: bytes) -> str:
    """Return what the file is, if its first bytes or its extension show another format; otherwise ""."""
    for position, magic, kind in _OTHER_FORMATS:
        if start[position:].startswith(magic):
            return kind
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page, such as the error or login page of a server: download the file itself"
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself: run 'git lfs pull'"
    ending = os.path.splitext(path)[1].lower()
    if ending in _OTHER_ENDINGS:
        return _OTHER_ENDINGS[ending]
    if ending != ".pkl" and not set(start) - _TEXT_BYTES:
        return f"a text file, which begins with {start[:40].decode('latin1')!r}"
    return ""


def _config_hint(path: str) -> str:
    """Return what to do about the path of a config instead of a checkpoint."""
    ending = os.path.splitext(path)[1].lower()
    return f". It is {_CONFIG}" if _OTHER_ENDINGS.get(ending) == _CONFIG else ""


def _read_pickle(path: str) -> Any:
    """Read a model-zoo ``{"model": {name: ndarray}, "__author__": ..., "matching_heuristics": ...}``."""
    with open(path, "rb") as f:
        try:
            return load_plain_pickle(f)
        except pickle.UnpicklingError as e:
            if e.__cause__ is not None:  # the unpickler failed, as opposed to a refusal
                raise _broken(path, str(e)) from e
            raise CheckpointError(f"Checkpoint file {path} cannot be loaded: {e}") from e


def _read_torch(path: str) -> Any:
    """Read a file of `torch.save` with tensors, numpy arrays and scalars, and plain containers."""
    _check_before_torch(path)
    try:
        with torch.serialization.safe_globals(list(NUMPY_STAND_INS)):
            return resolve_stand_ins(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"Checkpoint file {path} cannot be loaded: it is broken, or has Python objects other than "
            "tensors, numpy arrays and plain containers, which could run code. Message of PyTorch: "
            f"{_first_sentences(str(e))}"
        ) from e


def _check_before_torch(path: str) -> None:
    """Refuse files that would make `torch.load` hang or fill the memory, and other zip archives."""
    with open(path, "rb") as f:
        is_zip = f.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        f.seek(0)
        try:
            if not is_zip:
                # Magic number, version, system, content and names of storages. The storages follow.
                for _ in range(5):
                    check_hash_costs(f)
                return
            if not zipfile.is_zipfile(f):
                raise _broken(path, "the end of the zip archive is missing")
            with zipfile.ZipFile(f) as archive:
                _check_archive(path, archive)
        except pickle.UnpicklingError as e:
            raise CheckpointError(f"Checkpoint file {path} cannot be loaded: {e}") from e


def _check_archive(path: str, archive: zipfile.ZipFile) -> None:
    """Refuse archives that expand far beyond their size, are not from `torch.save`, or have slow keys."""
    entries = archive.infolist()
    size = sum(entry.file_size for entry in entries)
    if size > _LARGEST_EXPANSION * os.path.getsize(path):
        raise CheckpointError(
            f"Checkpoint file {path} is refused: its {os.path.getsize(path)} bytes would expand to {size}"
        )
    names = [entry.filename for entry in entries]
    pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
    if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
        kind = (
            "is a TorchScript program, not a checkpoint: save the state_dict() of its model with torch.save"
        )
    elif not pickles:
        kind = f"is a zip archive of {', '.join(names[:3]) or 'nothing'} ..., not a file of torch.save"
    else:
        for name in pickles:
            with archive.open(name) as content:
                check_hash_costs(content)
        return
    raise CheckpointError(f"Checkpoint file {path} {kind}")


def _read_safetensors(path: str) -> Any:
    """Read tensors by name, in Hugging Face's safetensors format."""
    import safetensors.torch

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
        content = {"model": safetensors.torch.load_file(path)}
        return content | {"matching_heuristics": True} if "matching_heuristics" in notes else content
    except safetensors.SafetensorError as e:
        raise _broken(path, str(e)) from e


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
    return " ".join(blamed) or message.strip().partition("\n")[0]


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
