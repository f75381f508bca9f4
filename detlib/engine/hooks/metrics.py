"""Looking up the metric that a hook goes by."""

import math

from detlib.utils.events import EventStorage
from detlib.utils.suggest import near_names

__all__ = ["check_mode", "explain_missing_metric", "is_better"]


def check_mode(mode: str) -> None:
    """
    Raises:
        ValueError: if `mode` is neither "max" nor "min".
    """
    if mode not in ("max", "min"):
        raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")


def is_better(value: float, than: float | None, mode: str) -> bool:
    """Whether a metric is better than another; what is not finite never is, and None always worse."""
    if not math.isfinite(value):
        return False
    if than is None:
        return True
    return value > than if mode == "max" else value < than


def explain_missing_metric(name: str, storage: EventStorage) -> str:
    """What to say of a metric that is not in the storage: near names, and what is there."""
    # The results of evaluations are not smoothed, as the models' own measurements are.
    results = sorted(n for n, smoothed in storage.smoothing_hints().items() if not smoothed and "/" in n)
    near = near_names(name, results) or near_names(name, storage.latest())
    hint = f" Near names: {', '.join(near)}." if near else ""
    return (
        f"No metric '{name}' was put out by the evaluation.{hint} There are: {', '.join(results) or 'none'}"
    )
