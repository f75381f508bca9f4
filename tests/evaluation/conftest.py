import logging

import pytest


@pytest.fixture
def log(caplog, monkeypatch):
    """What detlib logs, even after a test that stopped its logger from handing messages on."""
    monkeypatch.setattr(logging.getLogger("detlib"), "propagate", True)
    caplog.set_level(logging.INFO, "detlib")
    return caplog
