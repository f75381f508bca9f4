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


@pytest.fixture(autouse=True)
def restore_loggers():
    """Trainers give the library's loggers handlers, and cut them off from pytest's."""
    loggers = [logging.getLogger(name) for name in ("detlib", "fvcore")]
    before = [(log.level, log.propagate, list(log.handlers)) for log in loggers]
    yield
    for log, (level, propagate, handlers) in zip(loggers, before):
        log.setLevel(level)
        log.propagate = propagate
        log.handlers[:] = handlers
