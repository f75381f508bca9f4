"""The script that converts weight files."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from detlib.checkpoint.formats import read_checkpoint

ROOT = Path(__file__).parents[2]


def run(*args):
    command = [sys.executable, str(ROOT / "tools" / "convert_weights.py"), *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize(
    "ending", [".pth", *(pytest.param(e, marks=pytest.mark.slow) for e in (".pkl", ".safetensors"))]
)
def test_torchvision_weights_are_converted(tmp_path, ending):
    model = torchvision.models.resnet18(weights=None)
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    output = tmp_path / f"R-18{ending}"
    result = run(tmp_path / "resnet18.pth", output, "--convert", "torchvision")
    assert result.returncode == 0, result.stderr
    assert "layer1.0.bn2.weight -> res2.0.conv2.norm.weight (64,)" in result.stdout
    content = read_checkpoint(str(output))
    assert content["matching_heuristics"] is True
    got = torch.as_tensor(content["model"]["res5.1.conv2.weight"])
    assert torch.equal(got, model.layer4[1].conv2.weight)


def test_detectron_weights_are_converted_to_safetensors_and_pth(tmp_path):
    blobs = {
        "fc6_w": np.ones((2, 3), np.float32),
        "fc6_w_momentum": np.ones(1),
        "cls_score_b": np.arange(3.0),
    }
    (tmp_path / "d.pkl").write_bytes(pickle.dumps({"blobs": blobs}))
    result = run(tmp_path / "d.pkl", tmp_path / "d.safetensors")
    assert result.returncode == 0, result.stderr
    assert "fc6_w -> box_head.fc1.weight (2, 3)" in result.stdout and "2 of 3 arrays" in result.stdout
    assert run(tmp_path / "d.safetensors", tmp_path / "d.pth").returncode == 0
    content = read_checkpoint(str(tmp_path / "d.pth"))
    assert content["model"]["cls_score.bias"].tolist() == [1, 2, 0] and content["matching_heuristics"] is True


def test_wrong_arguments_print_an_error(tmp_path):
    result = run(tmp_path / "a.pth", tmp_path / "a.onnx")
    assert result.returncode == 2 and ".safetensors" in result.stderr
    result = run(tmp_path / "a.pth", tmp_path / "b.pth")
    assert result.returncode == 1 and "a.pth does not exist" in result.stderr
