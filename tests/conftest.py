"""Shared pytest configuration: tests marked `gpu` are skipped where there is no CUDA device."""

import logging

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def log(caplog, monkeypatch):
    """What detlib logs, even after a test that stopped its logger from handing messages on."""
    monkeypatch.setattr(logging.getLogger("detlib"), "propagate", True)
    caplog.set_level(logging.INFO, "detlib")
    return caplog
