"""Fixtures of the tests of annotation formats."""

import pytest

from detlib.data import MetadataCatalog


@pytest.fixture(autouse=True)
def forget():
    """Remove the metadata of the datasets that a test names."""
    before = MetadataCatalog.list()
    yield
    for name in MetadataCatalog.list():
        if name not in before:
            MetadataCatalog.remove(name)
