"""The README's main job, whole: it does what it promises. Its short version is in test_train_net.py."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_main_job_learns_the_shapes(tmp_path):
    out = tmp_path / "out"
    config = "configs/Quickstart/mask_rcnn_R_18_FPN_shapes.yaml"
    command = [sys.executable, "tools/train_net.py", "--config-file", config, "OUTPUT_DIR", str(out)]
    start = time.perf_counter()
    subprocess.run(command, cwd=_ROOT, check=True, capture_output=True)
    print(f"the main job took {time.perf_counter() - start:.0f} s")
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    results = {k: v for line in lines for k, v in line.items()}
    assert results["bbox/AP50"] >= 80 and results["segm/AP50"] >= 75
    assert (out / "model_final.pth").exists() and len(list((out / "predictions").glob("*.png"))) == 8
