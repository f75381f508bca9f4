"""The summary at the top of a report."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

import detlib
from detlib.report.class_table import Table
from detlib.report.records import Records
from detlib.report.run import dataset_names, logged_facts, max_iter, model_name, setting

__all__ = ["describe_seconds", "metrics_table", "run_facts"]


def describe_seconds(seconds: float) -> str:
    """Format a duration in its two largest units, such as "2 h 05 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _iterations(config: Mapping[str, Any] | None, records: Records) -> str:
    planned = max_iter(config)
    trained = [i for i, scalars in records.by_iteration.items() if "total_loss" in scalars or "lr" in scalars]
    # The last evaluation runs after the last iteration and is recorded under the next iteration's number.
    done = max(trained[-1] + 1 if trained else 0, records.last_iteration)
    if not records.by_iteration:
        return "unknown: there is no metrics.json"
    if planned is None:
        return f"{done}"
    if done >= planned:
        return f"{done} of {planned}, finished"
    return f"{done} of {planned}: still running, or stopped early"


def _names(names: Any) -> str:
    if names is None:
        return ""
    return names if isinstance(names, str) else ", ".join(map(str, names))


def run_facts(output_dir: str, config: Mapping[str, Any] | None, records: Records) -> dict[str, str]:
    """Return the names and values of the summary. Unknown values are left out."""
    logged = logged_facts(output_dir)
    saved = os.path.join(output_dir, "config.yaml")
    seconds = records.training_seconds()
    gpus = [value for name, value in logged.items() if name.startswith("GPU") and "none" not in value]
    device = setting(config, "MODEL.DEVICE", "train.device")
    hardware = gpus or ([logged["processor"]] if "processor" in logged else [])
    if str(device) == "cpu" and "processor" in logged:
        hardware = [logged["processor"]]
    versions = {name: logged[name] for name in ("detlib", "torch", "Python") if name in logged}
    here = {"detlib": detlib.__version__, "torch": torch.__version__, "Python": sys.version.split()[0]}
    metrics = metrics_summary_line(records)
    facts = {
        "model": model_name(config) or "",
        "config file": logged.get("config file") or (saved if os.path.isfile(saved) else ""),
        "output folder": os.path.abspath(output_dir),
        "trained on": _names(setting(config, "DATASETS.TRAIN", "dataloader.train.dataset.names")),
        "tested on": ", ".join(dataset_names(config)),
        "iterations": _iterations(config, records),
        "batch size": setting(config, "SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size") or "",
        "training time": f"about {describe_seconds(seconds)} without evaluation" if seconds else "",
        "last metrics": metrics,
        "device": ": ".join([str(device), ", ".join(hardware)]) if device and hardware else device or "",
        "versions": ", ".join(f"{name} {version}" for name, version in (versions or here).items()),
        "resumed": f"from iteration {', '.join(map(str, records.restarts))}" if records.restarts else "",
        "report written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if records.skipped_lines:
        shown = ", ".join(map(str, records.skipped_lines[:5]))
        number = len(records.skipped_lines)
        facts["damaged lines"] = (
            f"{number} in metrics.json skipped (line {shown}), truncated by a killed process"
        )
    return {name: value for name, value in facts.items() if value}


def metrics_summary_line(records: Records) -> str:
    """Return the main metric of each task in the last evaluation, as one line."""
    last = records.last_values()
    parts = []
    for group, metrics in records.evaluations().items():
        main = next((m for m in ("AP", "PQ", "mIoU") if m in metrics), next(iter(metrics)))
        parts.append(f"{group} {main} {last[metrics[main]][1]:.2f}")
    return ", ".join(parts)


def metrics_table(records: Records) -> Table:
    """Return a table of the last and the best value of each evaluation metric, with their iterations."""
    last = records.last_values()
    rows: list[list[Any]] = []
    for group, metrics in records.evaluations().items():
        for metric, name in metrics.items():
            at, value = last[name]
            iterations, values = records.series(name)
            known = [None if math.isnan(value) else value, at]
            best = max(zip(values, iterations), key=lambda pair: pair[0], default=None)
            rows.append([group, metric, *known, *(best or (None, None))])
    return ["task", "metric", "last", "at iteration", "highest", "at iteration "], rows
