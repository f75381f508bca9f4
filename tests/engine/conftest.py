"""Fixtures of the engine tests, which run training."""

from tests.training_fixtures import one_thread, restore_loggers  # noqa: F401
