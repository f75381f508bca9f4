"""Datasets by name: how each is loaded (`DatasetCatalog`) and what is known about it (`MetadataCatalog`).

A name is either registered, by `DatasetCatalog.register` or by detlib itself, or a dataset URI such as
`coco:annotations.json@images`, which needs no registration. `detlib.data.formats` registers the schemes.
"""

from __future__ import annotations

import types
from collections import UserDict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from detlib.utils.suggest import suggest

__all__ = [
    "DatasetCatalog",
    "DatasetURI",
    "Metadata",
    "MetadataCatalog",
    "check_datasets_exist",
    "is_dataset_uri",
    "parse_dataset_uri",
    "register_path_parser",
    "register_uri_scheme",
]


class DatasetURI(Protocol):
    """A parsed dataset URI: what the catalogs need to know about it."""

    def check(self) -> None:
        """Raise FileNotFoundError or ValueError, cheaply, if the dataset does not exist."""

    def load(self) -> list[dict]:
        """Return the dataset in the standard dict format."""

    def metadata(self) -> dict[str, Any]:
        """Return the attributes of the dataset's `Metadata`."""


_URI_SCHEMES: dict[str, Callable[[str], DatasetURI]] = {}


def register_uri_scheme(scheme: str, parse: Callable[[str], DatasetURI]) -> None:
    """Register the parser of all dataset URIs that begin with `scheme` and a colon.

    Args:
        scheme: the part before the colon.
        parse: called with the full URI; raises ValueError, naming the faulty part, if it is malformed.
    """
    _URI_SCHEMES[scheme] = parse


_path_parsers: list[Callable[[str], DatasetURI | None]] = []
_PATH_SUFFIXES = (".yaml", ".yml", ".data", ".json", ".csv", ".xml", ".zip")


def register_path_parser(parse: Callable[[str], DatasetURI | None]) -> None:
    """Register a parser of names that are paths of existing folders or files.

    Args:
        parse: called with the path; returns None if there is nothing that it reads.
    """
    _path_parsers.append(parse)


class _DatasetCatalog(UserDict):
    """Names of datasets and the functions that load them, as a list of dicts in the standard format.

    Nothing is cached: each call of `get` runs the function.
    """

    def register(self, name: str, func: Callable[[], list[dict]], *, overwrite: bool = False) -> None:
        """Register a dataset.

        Args:
            name: the name to use in `cfg.DATASETS`.
            func: takes no argument and returns `list[dict]`, the same on each call.
            overwrite: replace a dataset that is already registered under `name`, for example when a notebook
                cell runs again.

        Raises:
            TypeError: `func` is not callable.
            ValueError: The name is taken and `overwrite` is False.
        """
        if not callable(func):
            raise TypeError(
                f"DatasetCatalog.register({name!r}, func): func must be a function without arguments that "
                f"returns the list of dicts, not a {type(func).__name__}."
            )
        if name in self and not overwrite:
            raise ValueError(
                f"Dataset {name!r} is already registered. Choose another name, or pass overwrite=True to "
                "replace it (for example when a notebook cell runs again)."
            )
        self[name] = func

    def get(self, name: str) -> list[dict]:
        """Load a dataset.

        Args:
            name: a registered name or a dataset URI.

        Raises:
            KeyError: `name` is neither. The message lists similar names.
        """
        return self[name]() if name in self else parse_dataset_uri(name).load()

    def remove(self, name: str) -> None:
        """Remove `name`. Raise KeyError if it is not registered."""
        if name not in self:
            raise KeyError(_unknown_dataset(name))
        del self[name]

    def __repr__(self) -> str:
        return f"DatasetCatalog({', '.join(self)})"

    __str__ = __repr__

    def list(self) -> list[str]:
        """Return the registered names."""
        return [*self]


class Metadata(types.SimpleNamespace):
    """The metadata of a dataset, as attributes: `thing_classes`, `evaluator_type`, `json_file`.

    An attribute can be set only once, except to an equal value: parts of the program may have read the first
    value and would keep it.
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
                f"Metadata {key!r} of dataset {self.name!r} is already set to {_shorten(known[key])}; the "
                f"new value {_shorten(value)} differs. Replace it with {catalog}.set(overwrite=True, "
                f"{key}=...), or remove all metadata with MetadataCatalog.remove({self.name!r})."
            )
        super().__setattr__(key, value)

    def as_dict(self) -> dict[str, Any]:
        """Return a copy of all attributes as a dict."""
        return dict(self.__dict__)

    def set(self, *, overwrite: bool = False, **kwargs: Any) -> Metadata:
        """Set attributes and return `self`, so that calls can be chained.

        Args:
            overwrite: accept values that differ from earlier ones.
            **kwargs: the attributes.

        Raises:
            ValueError: An attribute already has another value and `overwrite` is False.
        """
        if overwrite:
            self.__dict__.update(kwargs)
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """Return attribute `key`, or `default` if it is not set."""
        return self.__dict__.get(key, default)


class _MetadataCatalog(UserDict):
    """Names of datasets and their `Metadata`. The first call of `get` creates the `Metadata` of a name."""

    def get(self, name: str) -> Metadata:
        """Return the metadata of `name`; if nothing was set before, it has the name only.

        The metadata of a dataset URI are filled from the dataset itself, which may read its files.
        """
        if not name:
            raise ValueError("MetadataCatalog.get: the dataset's name is empty.")
        if name not in self:
            metadata = Metadata(name=name)
            uri = None if name in DatasetCatalog else _parse(name)
            if uri is not None:
                metadata.set(**uri.metadata())
            self[name] = metadata
        return self[name]

    def remove(self, name: str) -> None:
        """Remove the metadata of `name`. Raise KeyError if there are none."""
        if name not in self:
            raise KeyError(f"There are no metadata for dataset {name!r}.{suggest(name, self)}")
        del self[name]

    def __repr__(self) -> str:
        return f"MetadataCatalog({', '.join(self)})"

    __str__ = __repr__

    def list(self) -> list[str]:
        """Return the names that have metadata."""
        return [*self]


# Parsed dataset URIs by name.
_parsed_uris: dict[str, DatasetURI] = {}


def _parse(name: str) -> DatasetURI | None:
    """Return a parsed dataset URI, or None if `name` has no known scheme and is not the path of a dataset."""
    scheme, colon, _ = name.partition(":")
    if name in _parsed_uris:
        return _parsed_uris[name]
    parsed = None
    if colon and scheme in _URI_SCHEMES:
        parsed = _URI_SCHEMES[scheme](name)
    elif "/" in name or name.lower().endswith(_PATH_SUFFIXES):
        parsed = next((found for found in (parse(name) for parse in _path_parsers) if found), None)
    if parsed is not None:
        _parsed_uris[name] = parsed
    return parsed


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()


def is_dataset_uri(name: str) -> bool:
    """Return whether `name` is a dataset URI, and not a registered name.

    Raises:
        ValueError: It is a dataset URI, but malformed.
    """
    return name not in DatasetCatalog and _parse(name) is not None


def parse_dataset_uri(name: str) -> DatasetURI:
    """Parse a dataset URI.

    Raises:
        KeyError: `name` is not a dataset URI. The message lists similar names.
        ValueError: It is malformed.
    """
    uri = _parse(name)
    if uri is None:
        raise KeyError(_unknown_dataset(name))
    return uri


def check_datasets_exist(names: str | Iterable[str]) -> None:
    """Check that every dataset exists, without loading it. For the start of a program.

    Args:
        names: registered names or dataset URIs; a single string is one name.

    Raises:
        KeyError: A name is neither registered nor a dataset URI. The message lists similar names.
        FileNotFoundError, ValueError: A URI is malformed, or names a file that does not exist. A function
            registered under a name may also raise them from its method `check`, if it has one.
    """
    for name in [names] if isinstance(names, str) else names:
        if name in DatasetCatalog:
            check = getattr(DatasetCatalog[name], "check", None)
            if check is not None:
                check()
            continue
        parse_dataset_uri(name).check()


def _unknown_dataset(name: str) -> str:
    schemes = ", ".join(f"{scheme}:..." for scheme in sorted(_URI_SCHEMES))
    return (
        f"Dataset {name!r} is not registered.{suggest(name, DatasetCatalog)} Register it with "
        f"DatasetCatalog.register, or use a dataset URI ({schemes}). "
        f"Registered are: {', '.join(sorted(DatasetCatalog)) or 'none'}."
    )


def _equal(a: Any, b: Any) -> bool:
    """Return whether two metadata values are equal. Arrays are compared by shape and content."""
    same = a == b
    return bool(same.all()) and a.shape == b.shape if hasattr(same, "all") else bool(same)


def _shorten(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
