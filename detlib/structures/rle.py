"""COCO's run-length encoded masks (RLE): decoding the runs, since pycocotools crashes on malformed ones.

A mask is {"size": [height, width], "counts": runs}: alternating lengths of runs of 0 and 1, column by column.
The runs are a list of ints, or a string with 5 bits per character. In the string, each run from the fourth on
is stored as the difference to the run two positions before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["decode_rle", "rle_runs"]

_MAX_SIDE = 10**6
_MAX_PIXELS = 2**31  # pycocotools counts in 32 bits


def rle_runs(rle: Any) -> np.ndarray:
    """Return the run lengths of a mask.

    Args:
        rle: {"size": [height, width], "counts": list of ints, str or bytes}.

    Returns:
        (N,) int64 array; the runs at odd positions are the mask.

    Raises:
        ValueError: The mask is malformed, or the runs do not fill the size.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple) or [type(number) for number in size] != [int, int]:
        raise ValueError(f"the size is {size!r}, not [height, width]")
    if not all(1 <= side <= _MAX_SIDE for side in size) or size[0] * size[1] >= _MAX_PIXELS:
        raise ValueError(f"the size is {size}; both must be in 1..{_MAX_SIDE}, and their product below 2^31")
    if isinstance(counts, list):
        if not all(type(number) is int for number in counts):
            raise ValueError("the counts are not integers")
        if not all(0 <= number < _MAX_PIXELS for number in counts):
            raise ValueError("a run is shorter than 0 or longer than any mask")
        runs = np.asarray(counts, dtype=np.int64)
    elif isinstance(counts, str | bytes):
        runs = _decompress(counts)
    else:
        raise ValueError(f"the counts are a {type(counts).__name__}, not a list or string")
    if (runs < 0).any():
        raise ValueError("a run is shorter than 0")
    # Longer runs might overflow, so that their sum is right nevertheless.
    if (runs > size[0] * size[1]).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(
            f"the runs cover {sum(runs.tolist())} pixels, the size {size} has {size[0] * size[1]}"
        )
    return runs


def _decompress(counts: str | bytes) -> np.ndarray:
    data = counts.encode("latin-1", "replace") if isinstance(counts, str) else counts
    codes = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("the counts are not valid compressed runs")
    last = (codes & 32) == 0  # the last character of each run
    run = np.concatenate([[0], np.cumsum(last)[:-1]])
    position = np.arange(len(codes)) - np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])[run]
    if position.max() > 11:
        raise ValueError("the counts are not valid compressed runs")
    values = np.zeros(run[-1] + 1, dtype=np.int64)
    np.add.at(values, run, (codes & 31) << (5 * position))
    negative = (codes[last] & 16) != 0
    values -= np.where(negative, np.int64(1) << (5 * (position[last] + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def decode_rle(rle: dict) -> np.ndarray:
    """Return a COCO RLE (compressed, or with counts as a list) as an (H, W) uint8 array of 0 and 1.

    Raises:
        ValueError: it is malformed, which would crash pycocotools.
    """
    import pycocotools.mask as mask_util

    rle_runs(rle)

    if isinstance(rle["counts"], list):
        rle = mask_util.frPyObjects(rle, *rle["size"])
    return mask_util.decode(rle)
