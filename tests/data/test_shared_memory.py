"""Records lie once in memory, however many processes read them and however these are started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own, whose memory nothing else changes.
CODE = """
import sys
from detlib.data.shared_memory import measure
if __name__ == "__main__":
    result = measure(12000, 3, sys.argv[1])
    print(result.serialized, result.ratio)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "start_method",
    ["fork", *(pytest.param(method, marks=pytest.mark.slow) for method in ("spawn", "forkserver"))],
)
def test_records_are_shared(tmp_path, start_method):
    script = tmp_path / "measure.py"
    script.write_text(CODE)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), start_method]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    serialized, ratio = map(float, run.stdout.split())
    assert serialized > 30e6
    # A copy in each process would make it 4.
    assert 0.9 < ratio < 1.3
