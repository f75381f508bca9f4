"""Records lie once in memory, however many processes read them and however these are started."""

import sys

import pytest

from detlib.data.shared_memory import measure


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_records_are_shared(start_method):
    result = measure(12000, 3, start_method)
    assert result.serialized > 30e6
    # A copy in each process would make it 4.
    assert 0.9 < result.ratio < 1.3
