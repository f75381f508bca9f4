"""The full quickstart of the README. A short version is in test_train_net.py."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


def train(config: str, out: Path) -> dict[str, float]:
    """Run the training script on a shipped config and return the last value of every metric."""
    command = [sys.executable, "tools/train_net.py", "--config-file", config, "OUTPUT_DIR", str(out)]
    start = time.perf_counter()
    subprocess.run(command, cwd=_ROOT, check=True, capture_output=True)
    print(f"{config} took {time.perf_counter() - start:.0f} s")
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    return {k: v for line in lines for k, v in line.items()}


@pytest.mark.slow
def test_mask_rcnn_learns_the_shapes(tmp_path):
    out = tmp_path / "out"
    results = train("configs/Quickstart/mask_rcnn_R_18_FPN_shapes.yaml", out)
    assert results["bbox/AP50"] >= 80 and results["segm/AP50"] >= 75
    assert (out / "model_final.pth").exists() and len(list((out / "predictions").glob("*.png"))) == 8


@pytest.mark.slow
def test_panoptic_fpn_learns_the_shapes_and_the_stuff(tmp_path):
    results = train("configs/Quickstart/panoptic_fpn_R_18_shapes.yaml", tmp_path / "out")
    assert results["panoptic_seg/PQ"] >= 65 and results["sem_seg/mIoU"] >= 85
    assert results["segm/AP50"] >= 65
