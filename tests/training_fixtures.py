"""Fixtures of the tests that train: one thread for their tiny models, and loggers as they were before."""

import logging

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """More threads only wait for each other at this size, and round differently from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _reset_loggers(level: int) -> None:
    for name in ("detlib", "fvcore"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate = True
        logger.handlers.clear()


@pytest.fixture(autouse=True)
def restore_loggers():
    """Trainers give loggers that say too little handlers of their own, and cut them off from pytest's."""
    _reset_loggers(logging.INFO)
    yield
    _reset_loggers(logging.NOTSET)
