"""Data sets by name: how each is loaded (`DatasetCatalog`) and what is known about it (`MetadataCatalog`).

A name is either registered, by `DatasetCatalog.register` or by detlib itself, or an address such as
`coco:annotations.json@images`, which needs no registration. An address begins with a scheme; what answers for
a scheme is set with `register_address_scheme` (see `detlib.data.addresses` for the schemes that exist).
"""

from __future__ import annotations

import types
from collections import UserDict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from detlib.utils.suggest import suggest

__all__ = [
    "Address",
    "DatasetCatalog",
    "Metadata",
    "MetadataCatalog",
    "check_datasets_exist",
    "find_address",
    "is_address",
    "register_address_scheme",
]


class Address(Protocol):
    """A data set that is named by what it consists of. Made by a scheme's parser from the whole address."""

    def check(self) -> None:
        """Raises FileNotFoundError or ValueError, cheaply, if the address leads nowhere."""

    def load(self) -> list[dict]:
        """Returns the data set in the standard dict format."""

    def metadata(self) -> dict[str, Any]:
        """Returns the attributes for the data set's `Metadata`."""


_ADDRESS_SCHEMES: dict[str, Callable[[str], Address]] = {}


def register_address_scheme(scheme: str, parse: Callable[[str], Address]) -> None:
    """Lets `parse` answer for all data set names that begin with `scheme` and a colon.

    Args:
        scheme: the letters before the colon.
        parse: called with the whole address; raises ValueError, naming the faulty part, if it is malformed.
    """
    _ADDRESS_SCHEMES[scheme] = parse


class _DatasetCatalog(UserDict):
    """Maps names to functions that return a data set as a list of dicts in the standard format.

    The functions run when `get` is called, not before, and each time that it is called.
    """

    def register(self, name: str, func: Callable[[], list[dict]], *, overwrite: bool = False) -> None:
        """Registers a data set.

        Args:
            name: the name, as it stands in `cfg.DATASETS`.
            func: takes no argument and returns `list[dict]`, the same each time that it is called.
            overwrite: replace what `name` stands for already, say when a notebook's cell runs again.

        Raises:
            TypeError: `func` cannot be called.
            ValueError: the name is taken and `overwrite` is not set.
        """
        if not callable(func):
            raise TypeError(
                f"DatasetCatalog.register({name!r}, func): func must be a function without arguments that "
                f"returns the list of dicts, not a {type(func).__name__}."
            )
        if name in self and not overwrite:
            raise ValueError(
                f"Dataset {name!r} is registered already. Choose another name, or pass overwrite=True to "
                "replace it (as when a notebook's cell runs again)."
            )
        self[name] = func

    def get(self, name: str) -> list[dict]:
        """Loads the data set `name`, which is a registered name or an address.

        Raises:
            KeyError: `name` is neither. The message lists near names.
        """
        if name in self:
            return self[name]()
        address = _addresses.find(name)
        if address is None:
            raise KeyError(_unknown_dataset(name))
        return address.load()

    def remove(self, name: str) -> None:
        """Forgets `name`. Raises KeyError if it is not registered."""
        if name not in self:
            raise KeyError(_unknown_dataset(name))
        del self[name]

    def __repr__(self) -> str:
        return f"DatasetCatalog({', '.join(self)})"

    __str__ = __repr__

    def list(self) -> list[str]:
        """Returns the registered names."""
        return [*self]


class Metadata(types.SimpleNamespace):
    """What is known about a data set, as attributes: `thing_classes`, `evaluator_type`, `json_file`.

    An attribute may be set once; setting it again is accepted only with an equal value, since parts of the
    program that have read the first one would go on with it.
    """

    name: str = "N/A"

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)
        known = [*self.__dict__]
        raise AttributeError(
            f"The metadata of dataset {self.name!r} has no {key!r}.{suggest(key, known)} It has: "
            f"{', '.join(known)}. Set it with MetadataCatalog.get({self.name!r}).set({key}=...)."
        )

    def __setattr__(self, key: str, value: Any) -> None:
        known = self.__dict__
        if key in known and not _equal(known[key], value):
            catalog = f"MetadataCatalog.get({self.name!r})"
            raise ValueError(
                f"Metadata {key!r} of dataset {self.name!r} is set already, to {_shorten(known[key])}; the "
                f"new value {_shorten(value)} differs. Replace it with {catalog}.set(overwrite=True, "
                f"{key}=...), or forget all of it with MetadataCatalog.remove({self.name!r})."
            )
        super().__setattr__(key, value)

    def as_dict(self) -> dict[str, Any]:
        """Returns all attributes as a dict, which may be changed without changing the metadata."""
        return dict(self.__dict__)

    def set(self, *, overwrite: bool = False, **kwargs: Any) -> Metadata:
        """Sets attributes, and returns the metadata itself so that calls can be chained.

        Args:
            overwrite: accept values that differ from those set before.
            **kwargs: the attributes.

        Raises:
            ValueError: an attribute has another value already and `overwrite` is not set.
        """
        if overwrite:
            self.__dict__.update(kwargs)
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """Returns attribute `key`, or `default` where it is not set."""
        return self.__dict__.get(key, default)


class _MetadataCatalog(UserDict):
    """Maps names to `Metadata`. There is one `Metadata` for a name, made when it is first asked for."""

    def get(self, name: str) -> Metadata:
        """Returns the metadata of `name`: empty but for its name, if nothing was set before.

        For an address it is filled from the data set itself, for which the files may have to be read.
        """
        if not name:
            raise ValueError("MetadataCatalog.get: the dataset's name is empty.")
        if name not in self:
            metadata = Metadata(name=name)
            address = None if name in DatasetCatalog else _addresses.find(name)
            if address is not None:
                metadata.set(**address.metadata())
            self[name] = metadata
        return self[name]

    def remove(self, name: str) -> None:
        """Forgets the metadata of `name`. Raises KeyError if there is none."""
        if name not in self:
            raise KeyError(f"There is no metadata of a dataset {name!r}.{suggest(name, self)}")
        del self[name]

    def __repr__(self) -> str:
        return f"MetadataCatalog({', '.join(self)})"

    __str__ = __repr__

    def list(self) -> list[str]:
        """Returns the names that metadata exists of."""
        return [*self]


class _Addresses:
    """The addresses that were used so far, parsed."""

    def __init__(self) -> None:
        self._parsed: dict[str, Address] = {}

    def find(self, name: str) -> Address | None:
        """Returns what the address stands for, or None if `name` has no known scheme."""
        scheme, colon, _ = name.partition(":")
        if not colon or scheme not in _ADDRESS_SCHEMES:
            return None
        if name not in self._parsed:
            self._parsed[name] = _ADDRESS_SCHEMES[scheme](name)
        return self._parsed[name]


_addresses = _Addresses()

DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()


def is_address(name: str) -> bool:
    """Whether `name` is an address, and not registered.

    Raises:
        ValueError: it is one, but malformed.
    """
    return name not in DatasetCatalog and _addresses.find(name) is not None


def find_address(name: str) -> Address:
    """Returns what an address stands for.

    Raises:
        KeyError: `name` is no address. The message lists near names.
    """
    address = _addresses.find(name)
    if address is None:
        raise KeyError(_unknown_dataset(name))
    return address


def check_datasets_exist(names: str | Iterable[str]) -> None:
    """Makes sure that every name can be loaded, without loading: for the start of a program.

    Args:
        names: data set names or addresses; a single string is one name.

    Raises:
        KeyError: a name is neither registered nor an address. The message lists near names.
        FileNotFoundError, ValueError: an address is malformed, or leads to a file that does not exist; or the
            function that a name was registered with has a method `check` that raises it.
    """
    for name in [names] if isinstance(names, str) else names:
        if name in DatasetCatalog:
            check = getattr(DatasetCatalog[name], "check", None)
            if check is not None:
                check()
            continue
        address = _addresses.find(name)
        if address is None:
            raise KeyError(_unknown_dataset(name))
        address.check()


def _unknown_dataset(name: str) -> str:
    schemes = ", ".join(f"{scheme}:..." for scheme in sorted(_ADDRESS_SCHEMES))
    return (
        f"Dataset {name!r} is not registered.{suggest(name, DatasetCatalog)} Register it with "
        f"DatasetCatalog.register, or give an address ({schemes}). "
        f"Registered are: {', '.join(sorted(DatasetCatalog)) or 'none'}."
    )


def _equal(a: Any, b: Any) -> bool:
    """Whether two metadata values are equal; arrays of the same content are."""
    same = a == b
    return bool(same.all()) and a.shape == b.shape if hasattr(same, "all") else bool(same)


def _shorten(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
