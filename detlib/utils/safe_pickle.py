"""Reading of pickles of plain data without executing code from them.

A pickle is a program: it may import any callable and call it. `load_plain_pickle` maps a fixed list of names
to its own builders, so that neither the pickle nor the restoring functions of numpy and torch decide what
runs. The result consists of dicts, lists, tuples, sets, strings, bytes, numbers, numpy arrays and scalars of
plain types, and torch tensors. A pickle is also scanned before it runs, so that a few bytes cannot allocate
gigabytes.
"""

import collections
import io
import math
import pickle
import pickletools
import re
import sys
from collections.abc import Callable
from typing import IO, Any, BinaryIO

import numpy as np
import torch

__all__ = ["NUMPY_STAND_INS", "check_hash_costs", "load_plain_pickle", "resolve_stand_ins"]

_SHORT_TEXT = 1000
_PLAIN_DTYPE = re.compile(r"[biufcSU]\d+")
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_REFUSED_OPCODES = {"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
_MUTABLE = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_IMMUTABLE = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ"}
# Hashing the keys of a pickle may take this many steps, see `check_hash_costs`.
_FREE_HASH_COST = 1_000_000
_HASH_COST_PER_OPCODE = 10
_HUGE = 1 << 60
_MAX_DIMENSIONS = 64


class _PickledDtype:
    """A stand-in for ``numpy.dtype`` while unpickling; accepts kind, size and byte order only."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not isinstance(code, str) or not _PLAIN_DTYPE.fullmatch(code):
            raise pickle.UnpicklingError(
                f"numpy dtype {code!r} is refused: only booleans, numbers and strings are supported"
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        byte_order = state[1]
        if byte_order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"numpy byte order {byte_order!r} is refused")
        self.dtype = self.dtype.newbyteorder(byte_order)


class _Later:
    """A stand-in for a large object while unpickling; `resolve_stand_ins` calls `build` to replace it.

    By then the unpickler has released its references to the bytes, and objects are built one after the other,
    so the contents of a file are in memory once and not twice.
    """

    def build(self) -> Any:
        raise AssertionError("a stand-in has its own `build`")


class _PickledText(_Later):
    """A stand-in for bytes that an old protocol wrote as text."""

    def __init__(self, text: str):
        self.text = text

    def __len__(self) -> int:
        return len(self.text)

    def build(self) -> bytes:
        return self.text.encode("latin1")


class _PickledArray(_Later):
    """A stand-in for ``numpy.ndarray``."""

    _parts: tuple | None = None

    def __setstate__(self, state: tuple) -> None:
        shape, dtype, fortran, data = state[-4:]
        self._parts = _checked_parts(data, dtype, shape, "F" if fortran else "C")

    def build(self) -> np.ndarray:
        if self._parts is None:
            raise pickle.UnpicklingError("a pickled numpy array has no content")
        data, dtype, shape, order = self._parts
        self._parts = None
        data = data.build() if isinstance(data, _PickledText) else data
        # A copy, because arrays must be writable and aligned.
        return np.array(np.frombuffer(data, dtype=dtype).reshape(shape, order=order))


def _checked_parts(data: Any, dtype: Any, shape: Any, order: str) -> tuple:
    """Return raw bytes, dtype, shape and order of an array, after checking their consistency."""
    if isinstance(data, str):
        data = _PickledText(data)  # a byte string of Python 2
    if isinstance(data, pickle.PickleBuffer):
        data = data.raw()
    if not isinstance(dtype, _PickledDtype) or not isinstance(
        data, bytes | bytearray | memoryview | _PickledText
    ):
        raise pickle.UnpicklingError("a pickled numpy array is malformed")
    legal = isinstance(shape, tuple) and len(shape) <= _MAX_DIMENSIONS
    if not legal or not all(isinstance(n, int) and 0 <= n <= sys.maxsize for n in shape):
        raise pickle.UnpicklingError(f"a pickled numpy array has the malformed shape {shape!r}")
    if len(data) != math.prod(shape) * dtype.dtype.itemsize:
        raise pickle.UnpicklingError(
            f"a pickled numpy array of shape {shape} and dtype {dtype.dtype} holds {len(data)} bytes"
        )
    return data, dtype.dtype, shape, order or "C"


def _array_from_bytes(data: Any, dtype: Any, shape: Any, order: str = "C") -> _PickledArray:
    """Replace numpy's ``_frombuffer``."""
    result = _PickledArray()
    result._parts = _checked_parts(data, dtype, shape, order)
    return result


def _empty_array(*_args: Any) -> _PickledArray:
    """Replace numpy's ``_reconstruct``; the state of the array follows in the pickle."""
    return _PickledArray()


def _scalar(dtype: Any, data: Any) -> np.generic:
    """Replace numpy's ``scalar``."""
    return _array_from_bytes(data, dtype, (1,)).build()[0]


def _encode_latin1(text: str, encoding: str) -> bytes | _PickledText:
    """Replace ``codecs.encode``, with which old protocols write bytes."""
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r} are refused")
    # Short texts may be keys of a dict, so they are built immediately.
    return _PickledText(text) if len(text) > _SHORT_TEXT else text.encode("latin1")


class _PickledStorage(_Later):
    """A stand-in for the storage of a tensor that `torch.save` wrote into a pickle."""

    def __init__(self, data: Any):
        if not isinstance(data, bytes | _PickledText):
            raise pickle.UnpicklingError("a pickled tensor storage is malformed")
        self._data: bytes | _PickledText | None = data
        self._storage: torch.storage.TypedStorage | None = None

    def build(self) -> torch.storage.TypedStorage:
        if self._storage is None:
            data = self._data.build() if isinstance(self._data, _PickledText) else self._data
            assert data is not None, "the bytes are dropped when the storage is built"
            storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if not isinstance(storage, torch.storage.TypedStorage):
                raise pickle.UnpicklingError(f"a pickled tensor storage holds a {type(storage).__name__}")
            self._storage, self._data = storage, None
        return self._storage


class _PickledTensor(_Later):
    """A stand-in for a tensor."""

    def __init__(self, storage: Any, offset: int, size: Any, stride: Any, *_flags: Any):
        """Replace ``torch._utils._rebuild_tensor_v2``."""
        if not isinstance(storage, _PickledStorage) or len(size) != len(stride):
            raise pickle.UnpicklingError("a pickled tensor is malformed")
        if len(size) > _MAX_DIMENSIONS:
            raise pickle.UnpicklingError(f"a pickled tensor has {len(size)} dimensions")
        if not all(isinstance(n, int) and 0 <= n <= sys.maxsize for n in (offset, *size, *stride)):
            raise pickle.UnpicklingError(
                f"a pickled tensor has size {size!r}, stride {stride!r}, offset {offset!r}"
            )
        self._storage, self._offset, self._size, self._stride = storage, offset, tuple(size), tuple(stride)

    def build(self) -> torch.Tensor:
        storage = self._storage.build()
        memory, dtype = storage._untyped_storage, storage.dtype
        last = self._offset + sum((n - 1) * step for n, step in zip(self._size, self._stride))
        if all(self._size) and last >= memory.nbytes() // dtype.itemsize:
            raise pickle.UnpicklingError(f"a pickled tensor of size {self._size} reaches beyond its storage")
        return torch.empty(0, dtype=dtype).set_(memory, self._offset, self._size, self._stride)


def _parameter(data: Any, *_flags: Any) -> _PickledTensor:
    """Replace ``torch._utils._rebuild_parameter``."""
    if not isinstance(data, _PickledTensor):
        raise pickle.UnpicklingError("a pickled parameter is malformed")
    return data


def _container(kind: type) -> Callable[..., Any]:
    """Return a builder of `kind` that refuses numbers: as an argument, a number is a length to allocate."""

    def build(*args: Any) -> Any:
        if args and isinstance(args[0], int):
            raise pickle.UnpicklingError(f"{kind.__name__}({args[0]!r}) is refused")
        return kind(*args)

    return build


def _default_dict(_factory: Any = None, *items: Any) -> dict:
    """Replace ``collections.defaultdict``; the default factory is dropped."""
    return dict(*items)


def _numpy_stand_ins() -> tuple[tuple[Any, str], ...]:
    pairs: list[tuple[Any, str]] = [(_PickledDtype, "numpy.dtype"), (_PickledArray, "numpy.ndarray")]
    for core in ("numpy.core", "numpy._core"):
        pairs.append((_empty_array, f"{core}.multiarray._reconstruct"))
        pairs.append((_scalar, f"{core}.multiarray.scalar"))
        pairs.append((_array_from_bytes, f"{core}.numeric._frombuffer"))
    return tuple(pairs)


# Stand-ins for the names that pickles of numpy arrays and scalars refer to, in the form of
# `torch.serialization.safe_globals`. Pass everything that was read with them to `resolve_stand_ins`.
NUMPY_STAND_INS = _numpy_stand_ins()


def _frozen(function: Callable[..., Any]) -> Any:
    """Return a callable without attributes, because a pickle can set attributes of what it names."""
    members = {"__slots__": (), "__call__": staticmethod(function)}
    return type(getattr(function, "__name__", "stand_in"), (), members)()


def _legal_globals() -> dict[str, Any]:
    """Return the names that a pickle may refer to, and their replacements."""
    legal: dict[str, Any] = {name: stand_in for stand_in, name in NUMPY_STAND_INS}
    legal |= {
        "collections.OrderedDict": lambda *items: collections.OrderedDict(*items),
        "collections.defaultdict": _default_dict,
        "_codecs.encode": _encode_latin1,
        "torch.storage._load_from_bytes": _PickledStorage,
        "torch._utils._rebuild_tensor_v2": _PickledTensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch.Size": _container(tuple),
    }
    for kind in (bytearray, bytes, dict, frozenset, list, set, str, tuple):
        legal[f"builtins.{kind.__name__}"] = legal[f"__builtin__.{kind.__name__}"] = _container(kind)
    for kind in (bool, complex, float, int):
        legal[f"builtins.{kind.__name__}"] = legal[f"__builtin__.{kind.__name__}"] = kind
    # Proposal files store their box mode as this enumeration of integers.
    modules = ("detectron2.structures.boxes", "detlib.structures.boxes", "detlib.structures.box_mode")
    for module in modules:
        legal[f"{module}.BoxMode"] = int
    legal = {name: _frozen(function) for name, function in legal.items()}
    dtypes = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    return legal | {f"torch.{name}": dtype for name, dtype in dtypes.items()}


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that resolves names from a table and does not import anything."""

    _legal = _legal_globals()

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._legal:
            raise pickle.UnpicklingError(
                f"it imports '{module}.{name}', which is refused: a pickle can run arbitrary code through "
                "its imports, so only plain containers, numbers, strings, numpy arrays and torch tensors are "
                "supported"
            )
        return self._legal[f"{module}.{name}"]


def load_plain_pickle(file: BinaryIO) -> Any:
    """Read a pickle of plain containers, numpy arrays and torch tensors, also one written by Python 2.

    Args:
        file: a seekable file, opened in binary mode.

    Raises:
        pickle.UnpicklingError: if the pickle refers to anything but plain data (the message has the name), or
            is malformed. None of its code has been executed then.
    """
    try:
        start = file.tell()
        _scan(file)
        file.seek(start)
        return resolve_stand_ins(_PlainUnpickler(file, encoding="latin1").load())
    except pickle.UnpicklingError:
        raise
    except Exception as e:
        # The unpickler can raise any exception for a malformed pickle (IndexError, KeyError, EOFError ...).
        raise pickle.UnpicklingError(f"it is malformed ({type(e).__name__}: {e})") from e


def _scan(file: BinaryIO) -> None:
    """Refuse opcodes that plain data do not need, memo indices beyond the pickle, and keys slow to hash.

    The unpickler would allocate a table of the size of the largest index.
    """
    costs = _HashCosts()
    for count, (opcode, argument, position) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if name in _REFUSED_OPCODES:
            raise pickle.UnpicklingError(f"it has the opcode {name} at {position}, which is refused")
        if name in _PUTS and argument is not None and argument > count + 1:
            raise pickle.UnpicklingError(
                f"its memo entry {argument} at {position} is refused: it is out of order"
            )
        costs.step(opcode, argument, count)


def check_hash_costs(file: IO[bytes]) -> None:
    """Raise unless the keys of the pickle that starts at the position of `file` can be hashed quickly.

    The hash of a tuple visits the tuples in it once per occurrence. 60 nested tuples, each of which has the
    previous one twice, are a pickle of 200 bytes and take centuries to hash. The file is read up to the end
    of the pickle.

    Raises:
        pickle.UnpicklingError: if hashing would take far more steps than the pickle has opcodes, or the
            pickle is malformed.
    """
    costs = _HashCosts()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            costs.step(opcode, argument, count)
    except pickle.UnpicklingError:
        raise
    except Exception as e:
        raise pickle.UnpicklingError(f"it is malformed ({type(e).__name__}: {e})") from e


class _Cost:
    """The costs of an object on the unpickler's stack."""

    __slots__ = ("content", "hash")

    def __init__(self, hash: int = 1, content: int = 1):
        self.hash = hash
        """Number of steps to hash the object; 1 if it cannot be hashed."""
        self.content = content
        """The same for an immutable copy of the object, with the lists in it as tuples."""


_CHEAP = _Cost()
_MARK = object()


class _HashCosts:
    """The unpickler's stack with costs in place of objects, and the sum of the costs of all keys."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._spent = 0

    def step(self, opcode: Any, argument: Any, count: int) -> None:
        """Apply an opcode, the `count`-th of the pickle."""
        name, stack = opcode.name, self._stack
        if name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in _PUTS:
            self._memo[argument] = stack[-1]
        elif name in _GETS:
            stack.append(self._memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            stack.append(_MARK)
        elif not opcode.stack_before:
            if opcode.stack_after:
                stack.append(_Cost() if name in _MUTABLE else _CHEAP)
        else:
            self._reduce(opcode, name)
            if self._spent > _FREE_HASH_COST + _HASH_COST_PER_OPCODE * count:
                raise pickle.UnpicklingError("its keys are nested tuples that would take too long to hash")

    def _reduce(self, opcode: Any, name: str) -> None:
        """Apply an opcode that takes objects from the stack."""
        stack, items = self._stack, self._pop(opcode)
        hashed: list[_Cost] = []
        if name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
            container, *items = items
            if name != "BUILD":
                container.content = min(container.content + sum(i.content for i in items), _HUGE)
            stack.append(container)
            hashed = items if name == "ADDITEMS" else items[::2] if name.startswith("SETITEM") else []
        elif opcode.stack_after:
            content = min(1 + sum(item.content for item in items), _HUGE)
            if name in _IMMUTABLE:
                stack.append(_Cost(min(1 + sum(item.hash for item in items), _HUGE), content))
                hashed = items if name == "FROZENSET" else []
            elif name in _CALLS:  # the result may be a set, a dict, or a tuple of the arguments
                stack.append(_Cost(content, content))
                hashed = [_Cost(content)] if content > len(items) + 1 else []
            else:
                stack.append(_Cost(1, content))
                hashed = items[::2] if name == "DICT" else []
        self._spent += sum(item.hash for item in hashed)

    def _pop(self, opcode: Any) -> list[Any]:
        """Take the objects that an opcode takes, in their order, and the mark between them if it has one."""
        stack = self._stack
        before = opcode.stack_before
        below = len(before)
        items: list[Any] = []
        if before[-1] is pickletools.stackslice:
            start = len(stack) - 1
            while stack[start] is not _MARK:
                start -= 1
            items = stack[start + 1 :]
            del stack[start:]
            below = before.index(pickletools.markobject)
        elif stack and stack[-1] is _MARK:  # POP may take a mark
            below = 1
        if below > len(stack):
            raise pickle.UnpicklingError(f"{opcode.name} finds too few objects on the stack")
        if below:
            items = stack[len(stack) - below :] + items
            del stack[len(stack) - below :]
        return items


def resolve_stand_ins(value: Any) -> Any:
    """Replace the stand-ins in a tree of containers by arrays, tensors and dtypes.

    Dicts and lists are modified in-place. An object that occurs multiple times is resolved once and remains
    shared, so nesting cannot blow up a small file.
    """
    return _resolve(value, {})


def _resolve(value: Any, known: dict[int, tuple[Any, Any]]) -> Any:
    """Resolve a value. `known` maps the id of a resolved object to the object, kept alive, and its result."""
    if not isinstance(value, _Later | _PickledDtype | dict | list | tuple | set | frozenset):
        return value
    if id(value) in known:
        return known[id(value)][1]
    if isinstance(value, dict | list):
        known[id(value)] = value, value  # before its items, which may refer to it
        items = dict.items(value) if isinstance(value, dict) else enumerate(value)
        for key, item in list(items):
            value[key] = _resolve(item, known)
        return value
    if isinstance(value, _Later):
        result: Any = value.build()
    elif isinstance(value, _PickledDtype):
        result = value.dtype
    else:
        items = [_resolve(item, known) for item in value]
        unchanged = all(new is old for new, old in zip(items, value))
        result = value if unchanged else type(value)(items)
    known[id(value)] = value, result
    return result
