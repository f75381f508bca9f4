"""Utilities for evaluation results: print, compare with expected values, flatten."""

from __future__ import annotations

import logging
import math
import pprint
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["flatten_results_dict", "print_csv_format", "verify_results"]

logger = logging.getLogger(__name__)


def print_csv_format(results: Mapping[str, Any]) -> None:
    """Log the main metrics as comma-separated names and values, which can be pasted into a table.

    Args:
        results: `{task: {metric: value}}`. Per-class metrics, with a dash in their name, are omitted. A value
            that is not a dict is logged unchanged.
    """
    for task, metrics in results.items():
        if not isinstance(metrics, Mapping):
            logger.info("copypaste: %s=%s", task, metrics)
            continue
        main = {name: value for name, value in metrics.items() if "-" not in name}
        logger.info("copypaste: Task: %s", task)
        logger.info("copypaste: %s", ",".join(main))
        logger.info("copypaste: %s", ",".join(f"{value:.4f}" for value in main.values()))


def verify_results(cfg: Any, results: Mapping[str, Mapping[str, float]]) -> bool:
    """Compare results with `cfg.TEST.EXPECTED_RESULTS`; exit with status 1 if they differ.

    Args:
        cfg: the config. The expected results are a list of (task, metric, value, tolerance).
        results: `{task: {metric: value}}`.

    Returns:
        True.

    Raises:
        SystemExit: a result is missing, is not finite, or differs by more than its tolerance.
    """
    expected_results = cfg.TEST.EXPECTED_RESULTS
    if not expected_results:
        return True
    wrong = []
    for task, metric, expected, tolerance in expected_results:
        actual = results.get(task, {}).get(metric)
        if actual is None:
            wrong.append(f"{task}/{metric} is missing, expected {expected} +- {tolerance}")
        elif not (math.isfinite(actual) and abs(actual - expected) <= tolerance):
            wrong.append(f"{task}/{metric} is {actual}, expected {expected} +- {tolerance}")
    if wrong:
        logger.error("The results differ from the expected ones: %s", "; ".join(wrong))
        logger.error("All results:\n%s", pprint.pformat(dict(results)))
        sys.exit(1)
    logger.info("The results match the expected ones.")
    return True


def flatten_results_dict(results: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested results into one dict with keys such as `bbox/AP`."""
    flat: dict[str, Any] = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{inner}": v for inner, v in flatten_results_dict(value).items()})
        else:
            flat[key] = value
    return flat
