"""Reads pickles of plain data without running anything that they say.

A pickle is a program: it may import any callable and call it. `load_plain_pickle` knows a fixed list of
names and maps each to a builder of its own, so neither the pickle nor numpy's own restoring functions (which
trust the flags of a pickled dtype) decide what runs. What comes out is made of dicts, lists, tuples, sets,
strings, bytes, numbers and numpy arrays and scalars of plain types.
"""

import builtins
import collections
import io
import math
import pickle
import re
from typing import Any, BinaryIO

import numpy as np

__all__ = ["NUMPY_STAND_INS", "load_plain_pickle", "resolve_stand_ins"]

_PLAIN_BUILTINS = ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list")
_PLAIN_BUILTINS += ("object", "set", "str", "tuple")
_PLAIN_DTYPE = re.compile(r"[biufcSU]\d+")


class _PickledDtype:
    """Stands in for ``numpy.dtype`` while unpickling: kind, size and byte order are all it takes in."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not isinstance(code, str) or not _PLAIN_DTYPE.fullmatch(code):
            raise pickle.UnpicklingError(
                f"numpy dtype {code!r} is refused: only booleans, numbers and strings are read"
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        byte_order = state[1]
        if byte_order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"numpy byte order {byte_order!r} is refused")
        self.dtype = self.dtype.newbyteorder(byte_order)


class _PickledArray:
    """Stands in for ``numpy.ndarray`` while unpickling; `resolve_stand_ins` puts the array in its place."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        shape, dtype, fortran, data = state[-4:]
        self.array = _array_from_bytes(data, dtype, shape, "F" if fortran else "C").array


def _array_from_bytes(data: Any, dtype: Any, shape: Any, order: str = "C") -> _PickledArray:
    """Builds an array from raw bytes, checking that they are as many as the shape needs."""
    if isinstance(data, str):
        data = data.encode("latin1")  # a byte string of Python 2
    if isinstance(data, pickle.PickleBuffer):
        data = data.raw()
    if not isinstance(dtype, _PickledDtype) or not isinstance(data, bytes | bytearray | memoryview):
        raise pickle.UnpicklingError("a pickled numpy array is malformed")
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise pickle.UnpicklingError(f"a pickled numpy array has the malformed shape {shape!r}")
    if len(data) != math.prod(shape) * dtype.dtype.itemsize:
        raise pickle.UnpicklingError(
            f"a pickled numpy array of shape {shape} and dtype {dtype.dtype} holds {len(data)} bytes"
        )
    result = _PickledArray()
    # A copy: the arrays must be writable, and aligned whatever the file held.
    result.array = np.array(np.frombuffer(data, dtype=dtype.dtype).reshape(shape, order=order or "C"))
    return result


def _empty_array(*_args: Any) -> _PickledArray:
    """Takes the place of numpy's ``_reconstruct``: the array's state follows in the pickle."""
    return _PickledArray()


def _scalar(dtype: _PickledDtype, data: Any) -> np.generic:
    """Takes the place of numpy's ``scalar``."""
    array = _array_from_bytes(data, dtype, (1,)).array
    return array[0]


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Takes the place of ``codecs.encode``, with which old protocols write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r} are refused")
    return text.encode("latin1")


def _numpy_stand_ins() -> tuple[tuple[Any, str], ...]:
    pairs: list[tuple[Any, str]] = [(_PickledDtype, "numpy.dtype"), (_PickledArray, "numpy.ndarray")]
    for core in ("numpy.core", "numpy._core"):
        pairs.append((_empty_array, f"{core}.multiarray._reconstruct"))
        pairs.append((_scalar, f"{core}.multiarray.scalar"))
        pairs.append((_array_from_bytes, f"{core}.numeric._frombuffer"))
    return tuple(pairs)


# What a pickle gets for the names that numpy's arrays and scalars need, in the form that
# `torch.serialization.safe_globals` takes too. Whatever was read so must pass `resolve_stand_ins`.
NUMPY_STAND_INS = _numpy_stand_ins()


def _legal_globals() -> dict[str, Any]:
    """All that a pickle may name, and what it gets."""
    legal = {name: stand_in for stand_in, name in NUMPY_STAND_INS}
    legal["collections.OrderedDict"] = collections.OrderedDict
    legal["_codecs.encode"] = _encode_latin1
    for name in _PLAIN_BUILTINS:
        legal[f"builtins.{name}"] = legal[f"__builtin__.{name}"] = getattr(builtins, name)
    return legal


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that resolves names from a table and imports nothing."""

    _legal = _legal_globals()

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._legal:
            raise pickle.UnpicklingError(
                f"it wants to import '{module}.{name}', which is refused: a pickle may run any code through "
                "what it imports, so only plain containers, numbers, strings and numpy arrays are read"
            )
        return self._legal[f"{module}.{name}"]


def load_plain_pickle(file: BinaryIO) -> Any:
    """Reads a pickle of plain containers and numpy arrays; pickles of Python 2 too.

    Args:
        file: opened for reading in binary mode.

    Raises:
        pickle.UnpicklingError: if the pickle names anything but plain data (the message says what), or is
            broken. Nothing of it has been executed then.
    """
    # The whole pickle at once: Unpickler reads a raw file in many small pieces.
    try:
        return resolve_stand_ins(_PlainUnpickler(io.BytesIO(file.read()), encoding="latin1").load())
    except pickle.UnpicklingError:
        raise
    except Exception as e:
        # A malformed pickle can fail in the unpickler in any way (IndexError, KeyError, EOFError ...).
        raise pickle.UnpicklingError(f"it is malformed ({type(e).__name__}: {e})") from e


def resolve_stand_ins(value: Any) -> Any:
    """Replaces what `NUMPY_STAND_INS` built by numpy arrays and dtypes, in a tree of containers."""
    if isinstance(value, _PickledArray):
        if value.array is None:
            raise pickle.UnpicklingError("a pickled numpy array has no content")
        return value.array
    if isinstance(value, _PickledDtype):
        return value.dtype
    if isinstance(value, dict):
        return type(value)((key, resolve_stand_ins(item)) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(resolve_stand_ins(item) for item in value)
    return value
