"""The runs of RLE masks, compared with those of pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from detlib.structures.rle import rle_runs


def runs_of(mask):
    """Return the alternating run lengths of 0 and 1, column by column, by a loop."""
    counts, value = [0], 0
    for pixel in mask.ravel(order="F"):
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (90, 61), (400, 700)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_runs_equal_those_of_a_loop(shape, share):
    rng = np.random.default_rng(0)
    small = rng.random((-(-shape[0] // 3), -(-shape[1] // 3))) < share
    mask = np.kron(small, np.ones((3, 3)))[: shape[0], : shape[1]].astype(np.uint8)
    expected = runs_of(mask)
    compressed = mask_utils.encode(np.asfortranarray(mask))
    text = {"size": list(shape), "counts": compressed["counts"].decode()}
    plain = {"size": list(shape), "counts": expected}
    for rle in (compressed, text, plain):
        assert rle_runs(rle).tolist() == expected


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"counts": [6]}, "the size is None"),
        ({"size": [2, 3.0], "counts": [6]}, r"the size is \[2, 3.0\]"),
        ({"size": [2, 3], "counts": [-1, 7]}, "a run is shorter than 0"),
        ({"size": [2, 3], "counts": [2**31, 6]}, "or longer than any mask"),
        ({"size": [0, 3], "counts": []}, "both must be in 1"),
        ({"size": [2**16, 2**16], "counts": [2**32]}, "below 2.31"),
        ({"size": [2, 3], "counts": [5]}, "cover 5 pixels, .* has 6"),
        ({"size": [2, 3], "counts": [8, -2]}, "shorter than 0"),
        ({"size": [2, 3], "counts": [2.5, 3.5]}, "not integers"),
        ({"size": [2, 3], "counts": None}, "a NoneType, not a list or string"),
        ({"size": [2, 3], "counts": ""}, "not valid compressed runs"),
        ({"size": [2, 3], "counts": "6"}, None),
        ({"size": [2, 3], "counts": "a"}, "not valid compressed runs"),
        ({"size": [2, 3], "counts": "é6"}, "not valid compressed runs"),
        ({"size": [2, 3], "counts": "o" * 20 + "1"}, "not valid compressed runs"),
        ({"size": [2, 3], "counts": "@"}, "shorter than 0"),
    ],
)
def test_malformed_rle_is_refused(rle, message):
    if message is None:
        assert rle_runs(rle).tolist() == [6]
        return
    with pytest.raises(ValueError, match=message):
        rle_runs(rle)


def test_runs_whose_sum_overflows_to_the_size_are_refused():
    def compress(run):  # 5 bits per character, the last without the sixth bit
        codes = [run >> 5 * i & 31 for i in range(13)]
        while codes[-1] == (31 if codes[-2] & 16 else 0):
            codes.pop()
        return "".join(chr(48 + (code | 32 * (i < len(codes) - 1))) for i, code in enumerate(codes))

    large = 2**59 - 1  # 32 times it and 38 more are 2**64 + 6
    counts = compress(large) * 3 + "0" * 29 + compress(38 - large)
    with pytest.raises(ValueError, match=f"the runs cover {2**64 + 6} pixels"):
        rle_runs({"size": [2, 3], "counts": counts})
