"""Fixtures of the tests that run training: a single thread for tiny models, and restored loggers."""

import logging

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Use one thread: for tiny models, more threads are slower, and rounding varies between runs."""
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
    """Restore the loggers, because trainers add handlers and disable propagation to pytest's."""
    _reset_loggers(logging.INFO)
    yield
    _reset_loggers(logging.NOTSET)
