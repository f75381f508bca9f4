"""Shared pytest configuration: tests marked `gpu` are skipped without a CUDA device; all others see none."""

import logging
import os

import pytest
import torch

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Workers that each use all cores would wait for one another.
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(share)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))  # for subprocesses of the tests


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Hide CUDA devices from tests without the mark gpu, and from their subprocesses."""
    if "gpu" in item.keywords or not torch.cuda.is_available():
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)


@pytest.fixture
def log(caplog, monkeypatch):
    """Capture the logs of detlib, even if an earlier test turned off propagation of its logger."""
    monkeypatch.setattr(logging.getLogger("detlib"), "propagate", True)
    caplog.set_level(logging.INFO, "detlib")
    return caplog


@pytest.fixture
def exact_float32():
    """Turn off TF32 for convolutions on a GPU, which rounds the mantissa of their inputs to ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
