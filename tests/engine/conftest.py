"""Undoes what the set-up of a training changes in the process."""

import logging

import pytest


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
