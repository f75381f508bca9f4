"""Checkpoints in two processes."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detlib.checkpoint import DetectionCheckpointer
from detlib.engine import launch
from detlib.utils import comm

pytestmark = pytest.mark.distributed


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()


def _work(folder: str) -> None:
    """Save in two formats, and load from a copy that only the main process can access."""
    x = torch.linspace(-1, 1, 12).view(4, 3)
    expected = _model(0)(x)
    checkpointer = DetectionCheckpointer(DistributedDataParallel(_model(0)), folder)
    checkpointer.save("model")
    checkpointer.save("model.safetensors")
    comm.synchronize()
    own = Path(folder) / f"of_rank_{comm.get_rank()}"
    own.mkdir()
    for name in ("model.pth", "model.safetensors"):
        if comm.is_main_process():
            os.link(Path(folder) / name, own / name)
        for wrapped in (True, False):
            model = _model(1)
            target = DistributedDataParallel(model) if wrapped else model
            # Simulate a disk that is not shared: each process uses a path of its own.
            path = own / name if wrapped else Path(folder) / name
            DetectionCheckpointer(target).load(str(path))
            assert torch.equal(model(x), expected), (name, wrapped)
    (own / "done").touch()


def test_model_saved_by_two_processes_has_the_same_outputs_when_loaded(tmp_path):
    launch(_work, num_gpus_per_machine=2, dist_url="auto", args=(str(tmp_path),))
    assert (tmp_path / "of_rank_0" / "done").exists() and (tmp_path / "of_rank_1" / "done").exists()
    assert (tmp_path / "last_checkpoint").read_text() == "model.pth"
