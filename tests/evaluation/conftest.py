import logging

import pytest


@pytest.fixture
def log(caplog):
    """What detlib logs, even after a test that stopped its logger from handing messages on."""
    logger = logging.getLogger("detlib")
    caplog.set_level(logging.INFO, "detlib")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
