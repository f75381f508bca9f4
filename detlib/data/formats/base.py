"""The interface of an annotation format, and the registry of all formats."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import parse_qsl

from detlib.data.catalog import Metadata, register_uri_scheme
from detlib.data.formats.findings import FINDING_KINDS, RawSet, raw_from_records
from detlib.data.formats.writing import ConversionSource
from detlib.utils.file_io import PathManager
from detlib.utils.suggest import suggest

__all__ = [
    "CROWD",
    "EMPTY_BOXES",
    "FOLDER_HINTS",
    "FORMATS",
    "Candidate",
    "Format",
    "ParsedURI",
    "URIOption",
    "claimed_by_another_format",
    "option_table",
    "register_format",
    "uri_table",
]


@dataclass(frozen=True)
class URIOption:
    """An option of a dataset URI, as in `coco:ann.json@images?empty_boxes=drop`.

    Attributes:
        name: the key.
        help: what it does, one sentence.
        values: the legal values, the default first; empty if the format checks the value itself.
    """

    name: str
    help: str
    values: tuple[str, ...] = ()


EMPTY_BOXES = URIOption(
    "empty_boxes",
    "`drop` leaves out boxes without area, with a warning; by default they are an error",
    ("error", "drop"),
)

CROWD = URIOption(
    "crowd",
    "`objects` trains on crowd regions (`iscrowd: 1`) as on other objects, for tools that mark every mask so",
    ("regions", "objects"),
)


class ParsedURI(ABC):
    """A dataset named by its URI, `SCHEME:BODY?KEY=VALUE&...`. Base class of the formats' URI classes.

    Class attributes:
        form: how such a URI is written, for example "myformat:DIR@SPLIT".
        options: the options that may follow the question mark.
    """

    form: ClassVar[str]
    options: ClassVar[tuple[URIOption, ...]] = ()

    def __init__(self, uri: str) -> None:
        """Split the URI into `body` and `values`; subclasses parse the body.

        Args:
            uri: the full URI.

        Raises:
            ValueError: The URI is malformed, or has an unknown option or value.
        """
        self.uri = uri
        self.body = uri.partition(":")[2]
        self.values = {option.name: option.values[0] for option in self.options if option.values}
        head, mark, tail = self.body.rpartition("?")
        if mark:
            self.body = head
            self.values |= self._parse_options(tail)

    def _parse_options(self, text: str) -> dict[str, str]:
        try:
            values = dict(parse_qsl(text, strict_parsing=True, keep_blank_values=True))
        except ValueError as error:
            raise self.error(f"{text!r} is not of the form key=value&...") from error
        legal = {option.name: option.values for option in self.options}
        for key, value in values.items():
            if key not in legal:
                raise self.error(f"there is no option {key!r}, only {', '.join(legal)}.{suggest(key, legal)}")
            if legal[key] and value not in legal[key]:
                raise self.error(f"{key} must be {' or '.join(map(repr, legal[key]))}, not {value!r}.")
        return values

    @abstractmethod
    def check(self) -> None:
        """Raise FileNotFoundError or ValueError, cheaply, if the dataset does not exist."""

    @abstractmethod
    def load(self) -> list[dict]:
        """Return the dataset in the standard dict format. The first fault is an error."""

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """Return the attributes of the dataset's `Metadata`."""

    def read_raw(self) -> RawSet:
        """Read the dataset for the checker, whatever is wrong with it.

        Raises:
            FileNotFoundError, ValueError: There is nothing to read.
        """
        return raw_from_records(self.uri)

    def treat_crowd(self, dicts: list[dict]) -> list[dict]:
        """Apply the option `CROWD` to a loaded dataset, and return it."""
        if self.values["crowd"] == "objects":
            for annotation in (a for record in dicts for a in record["annotations"]):
                annotation["iscrowd"] = 0
        return dicts

    def error(self, text: str) -> ValueError:
        """Return a ValueError that names the URI."""
        return ValueError(f"Dataset URI {self.uri!r}: {text}")

    def split_body(self) -> tuple[str, str]:
        """Split a body `PATH@SPLIT` at the last @.

        Raises:
            ValueError: One of the two is missing.
        """
        path, _, split = self.body.rpartition("@")
        if not path or not split:
            raise self.error(f"it must be {self.form}; path or split is missing.")
        return os.path.expanduser(path), split

    def split_body_with_optional_split(self) -> tuple[str, str]:
        """Split a body `PATH` or `PATH@SPLIT`; the split may be empty, and the path may contain an @."""
        body = os.path.expanduser(self.body)
        path, mark, split = body.rpartition("@")
        if not mark or not path or PathManager.isdir(body):
            path, split = body, ""
        if not path:
            raise self.error(f"it must be {self.form}; the path is missing.")
        return path, split

    def require_folder(self, path: str, what: str = "folder") -> None:
        """Raise FileNotFoundError if `path` is not a folder."""
        if not PathManager.isdir(path):
            fault = "is a file, not a folder" if PathManager.isfile(path) else "does not exist"
            raise FileNotFoundError(f"Dataset URI {self.uri!r}: the {what} {path!r} {fault}.")


@dataclass(frozen=True)
class Candidate:
    """A dataset found in a folder.

    Attributes:
        uri: its URI, without options.
        split: name of the split.
        reason: what was found, for the log.
    """

    uri: str
    split: str
    reason: str

    @property
    def scheme(self) -> str:
        """The format."""
        return self.uri.partition(":")[0]


@dataclass(frozen=True)
class Format:
    """An annotation format.

    Attributes:
        name: scheme of its URIs, and its name for the converter.
        summary: what the data are, one line for the tables of the documentation.
        uri_class: parses, checks, loads and leniently reads a dataset.
        read_registered: leniently reads a dataset that was registered by code, given its metadata; returns
            None if the metadata are not those of this format.
        write: writes the annotations of a dataset. It is called with the dataset, the output folder and the
            `masks` argument of `convert_dataset`. It returns the URI of the result and the new path of every
            image; the converter copies the images.
        holds_rotated_boxes: whether `write` accepts rotated boxes.
        find: returns the datasets of this format in a folder, for `dir:`.
        layout: what `find` looks for, for the message if nothing is found.
        hint: returns what is nearly a dataset of this format in a folder, and what to do, for that message.
        claims: whether a file can only be of this format, by its name or first bytes. Other formats do not
            read such files.
        uri_of_file: returns the URI of the dataset that a file describes, for names that are paths; None if
            the file is of another format.
        findings: kinds of findings of this format alone, as in `FINDING_KINDS`.
    """

    name: str
    summary: str
    uri_class: type[ParsedURI]
    read_registered: Callable[[Metadata], RawSet | None] | None = None
    write: Callable[[ConversionSource, str, str], tuple[str, list[str]]] | None = None
    holds_rotated_boxes: bool = False
    find: Callable[[str], list[Candidate]] | None = None
    layout: str = ""
    hint: Callable[[str], str] | None = None
    claims: Callable[[str], bool] | None = None
    uri_of_file: Callable[[str], str | None] | None = None
    findings: Mapping[str, tuple[str, str]] = field(default_factory=dict)


# Functions that return what a folder in no known format nearly is, and what to do; "" if they do not know.
FOLDER_HINTS: list[Callable[[str], str]] = []

# All formats by name, in the order of registration.
FORMATS: dict[str, Format] = {}


def register_format(new: Format) -> Format:
    """Make a format known to the catalogs, the checker, the converter and `dir:`.

    Raises:
        ValueError: The name or a kind of finding is already taken.
    """
    if new.name in FORMATS:
        raise ValueError(f"The format {new.name!r} is already registered.")
    taken = [kind for kind in new.findings if kind in FINDING_KINDS]
    if taken:
        raise ValueError(f"Format {new.name!r}: the kinds of findings {taken} are already registered.")
    FORMATS[new.name] = new
    FINDING_KINDS.update(new.findings)
    register_uri_scheme(new.name, new.uri_class)
    return new


def claimed_by_another_format(path: str, name: str) -> bool:
    """Return whether a file can only be of a format other than `name`."""
    return any(f.claims(path) for f in FORMATS.values() if f.claims is not None and f.name != name)


def uri_table() -> str:
    """Return the table of all formats in Markdown."""
    rows = ["| dataset URI | data | `dir:` finds it | `convert --to` writes it |", "|---|---|---|---|"]
    for f in FORMATS.values():
        marks = ("yes" if part is not None else "–" for part in (f.find, f.write))
        rows.append(f"| `{f.uri_class.form}` | {f.summary} | {' | '.join(marks)} |")
    return "\n".join(rows)


def option_table() -> str:
    """Return the table of all options of dataset URIs in Markdown."""
    users: dict[URIOption, list[str]] = {}
    for f in FORMATS.values():
        for option in f.uri_class.options:
            users.setdefault(option, []).append(f"`{f.name}:`")
    rows = ["| option | formats | meaning |", "|---|---|---|"]
    rows += [f"| `{option.name}` | {', '.join(names)} | {option.help} |" for option, names in users.items()]
    return "\n".join(rows)
