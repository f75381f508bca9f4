"""COCO's run-length masks (RLE): looking at the runs themselves, since broken ones crash their decoder.

A mask is {"size": [height, width], "counts": runs}: lengths of runs of 0 and 1 in turn, down the columns. The
runs are a list of ints, or a string with 5 bits a letter, in which each run from the fourth on is written as
its difference to the one two places before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["rle_runs"]


def rle_runs(rle: Any) -> np.ndarray:
    """Returns the lengths of a mask's runs.

    Args:
        rle: {"size": [height, width], "counts": list of ints, str or bytes}.

    Returns:
        (N,) int64 array; the runs at odd places are the mask.

    Raises:
        ValueError: it is no such mask, or the runs are broken or do not fill the size.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple) or [type(number) for number in size] != [int, int]:
        raise ValueError(f"the size is {size!r}, not [height, width]")
    if isinstance(counts, list):
        if not all(type(number) is int for number in counts):
            raise ValueError("the counts are not whole numbers")
        runs = np.asarray(counts, dtype=np.int64)
    elif isinstance(counts, str | bytes):
        runs = _decompress(counts)
    else:
        raise ValueError(f"the counts are neither a list nor a string but {type(counts).__name__}")
    if (runs < 0).any():
        raise ValueError("a run is shorter than 0")
    if runs.sum() != size[0] * size[1]:
        raise ValueError(f"the runs cover {runs.sum()} pixels, the size {size} has {size[0] * size[1]}")
    return runs


def _decompress(counts: str | bytes) -> np.ndarray:
    letters = counts.encode("latin-1", "replace") if isinstance(counts, str) else counts
    codes = np.frombuffer(letters, dtype=np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("the counts are no compressed runs")
    last = (codes & 32) == 0  # of each run's letters
    run = np.concatenate([[0], np.cumsum(last)[:-1]])
    place = np.arange(len(codes)) - np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])[run]
    if place.max() > 11:
        raise ValueError("the counts are no compressed runs")
    values = np.zeros(run[-1] + 1, dtype=np.int64)
    np.add.at(values, run, (codes & 31) << (5 * place))
    negative = (codes[last] & 16) != 0
    values -= np.where(negative, np.int64(1) << (5 * (place[last] + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
