"""Fixtures for tests that train."""

from tests.training_fixtures import one_thread, restore_loggers  # noqa: F401
