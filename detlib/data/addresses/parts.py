"""What the parsers of addresses share."""

from __future__ import annotations

import os
from urllib.parse import parse_qsl

from detlib.utils.file_io import PathManager
from detlib.utils.suggest import suggest

__all__ = ["need_folder", "split_choice", "split_folder_and_split", "split_options"]


def split_options(address: str, legal: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """Splits `scheme:body?key=value&...` into body and options, of which only `legal` ones may occur."""
    body = address.partition(":")[2]
    head, mark, tail = body.rpartition("?")
    if not mark:
        return body, {}
    try:
        options = dict(parse_qsl(tail, strict_parsing=True, keep_blank_values=True))
    except ValueError as error:
        raise ValueError(f"Dataset address {address!r}: {tail!r} is not of the form key=value&...") from error
    for key in options:
        if key not in legal:
            raise ValueError(
                f"Dataset address {address!r}: there is no option {key!r}, only "
                f"{', '.join(legal)}.{suggest(key, legal)}"
            )
    return head, options


def split_choice(address: str, options: dict[str, str], key: str, legal: tuple[str, ...]) -> str:
    """Returns the option `key`, by default the first of `legal`; anything else is an error."""
    value = options.get(key, legal[0])
    if value not in legal:
        listed = " or ".join(map(repr, legal))
        raise ValueError(f"Dataset address {address!r}: {key} must be {listed}, not {value!r}.")
    return value


def split_folder_and_split(address: str, body: str, form: str) -> tuple[str, str]:
    """Splits `PATH@SPLIT` at the last @. `form` is how such an address is written, for the error."""
    path, _, split = body.rpartition("@")
    if not path or not split:
        raise ValueError(f"Dataset address {address!r}: it must be {form}; path or split is missing.")
    return os.path.expanduser(path), split


def need_folder(address: str, what: str, path: str) -> None:
    """Raises FileNotFoundError if `path` is no folder."""
    if not PathManager.isdir(path):
        fault = "is a file, not a folder" if PathManager.isfile(path) else "does not exist"
        raise FileNotFoundError(f"Dataset address {address!r}: the {what} {path!r} {fault}.")
