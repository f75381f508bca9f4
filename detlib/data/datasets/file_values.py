"""Bounds on the values in annotation files, so that the work on a file is bounded by its size.

Native code crashes, or takes minutes, for coordinates far beyond every image. Python's own integers and
nested lists have no bound either.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

from detlib.utils.file_io import PathManager

__all__ = [
    "MAX_COORDINATE",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "MAX_SIDE",
    "are_coordinates",
    "is_coordinate",
    "is_id",
    "is_path",
    "is_side",
    "read_json",
]

MAX_COORDINATE = 10**7
MAX_SIDE = 10**6
MAX_FILE_BYTES = 2**30
MAX_PIXELS = 2**28  # of an image with masks: these are decoded at the size of the image
_MAX_ID = 2**63 - 1


def is_coordinate(value: Any) -> bool:
    """Return whether a value is an int or a float, finite, and at most `MAX_COORDINATE`."""
    # The comparison is False for NaN.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_COORDINATE


def are_coordinates(values: Sequence[Any]) -> bool:
    """Return whether all values are finite numbers up to `MAX_COORDINATE`; bools count as numbers.

    The built-in functions are many times faster than a loop.
    """
    try:
        # The sum is NaN if a value is; minimum and maximum may pass over it.
        return math.isfinite(sum(values)) and (
            not values or -MAX_COORDINATE <= min(values) and max(values) <= MAX_COORDINATE
        )
    except (TypeError, OverflowError):
        return False


def is_side(value: Any) -> bool:
    """Return whether a value is a possible width or height of an image: an integer in 1..`MAX_SIDE`."""
    return is_coordinate(value) and 1 <= value <= MAX_SIDE and float(value).is_integer()


def is_id(value: Any, types: tuple[type, ...] = (int, str)) -> bool:
    """Return whether a value can be an id: of one of the types, and an int must fit into 64 bits."""
    return type(value) in types and (not isinstance(value, int) or -_MAX_ID <= value <= _MAX_ID)


def is_path(value: Any) -> bool:
    """Return whether a value can be a path: a string without null characters that UTF-8 can encode.

    Bytes of file names that are not UTF-8 are allowed; Python has them as single surrogates.
    """
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def read_json(file: str, *, local: str | None = None, max_bytes: int | None = None) -> Any:
    """Read a JSON file in UTF-8 or UTF-16, with or without a byte order mark.

    Args:
        file: its path or URL.
        local: the path of a local copy, if there is one.
        max_bytes: the largest size to read; None reads a file of any size.

    Raises:
        ValueError: It is too large, not JSON, or nested too deeply.
    """
    with PathManager.open(local or file, "rb") as opened:
        data = opened.read() if max_bytes is None else opened.read(max_bytes + 1)
    if max_bytes is not None and len(data) > max_bytes:
        raise ValueError(f"Annotation file {file!r} has more than {max_bytes} bytes.")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError(f"Annotation file {file!r} is not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"Annotation file {file!r} is not valid JSON: {error}") from error
