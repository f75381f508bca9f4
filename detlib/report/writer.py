"""Puts a report together."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from detlib.report.class_table import metrics_class_table, to_csv
from detlib.report.detection_plots import class_metric_figure
from detlib.report.detection_section import add_detections
from detlib.report.detections import find_predictions
from detlib.report.records import Records, read_records
from detlib.report.report import Report, reason_of
from detlib.report.run import dataset_names, read_config
from detlib.report.summary import metrics_table, run_facts
from detlib.report.training_plots import evaluation_figure, learning_rate_figure, losses_figure
from detlib.utils.file_io import PathManager, safe_name

__all__ = ["make_report", "write_report"]

logger = logging.getLogger(__name__)

_INSTANCE_TASKS = ("bbox", "segm", "keypoints")


def _add_training(report: Report, records: Records) -> None:
    page = report.page
    page.section("Training")
    if not records.by_iteration:
        page.note("No curves: there is no metrics.json with any line, so nothing is known of the training.")
        return

    def losses() -> None:
        caption = (
            "Faint: as in metrics.json, which has medians over 20 iterations. Strong: the mean over a tenth "
            "of the points. With dots: validation losses, if the run has measured any."
        )
        report.figure("losses.png", losses_figure(records), "Losses over the iterations", caption)

    def learning_rate() -> None:
        figure = learning_rate_figure(records)
        report.figure("learning_rate.png", figure, "Learning rate over the iterations", "")

    report.attempt("figure of losses", losses)
    if not records.validation_losses():
        page.text("The run has measured no validation loss.")
    report.attempt("figure of the learning rate", learning_rate)


def _add_evaluation(report: Report, records: Records) -> None:
    report.page.section("Evaluation")
    if not records.evaluations():
        report.page.note(
            "No metrics: metrics.json has no results of an evaluation. They are there after the first one, "
            "every TEST.EVAL_PERIOD (train.eval_period) iterations or at the end of training."
        )
        return
    report.page.table(metrics_table(records), "Metrics")

    def figure() -> None:
        alt = "Metrics over the iterations"
        report.figure("evaluation.png", evaluation_figure(records), alt, "Metrics of each evaluation.")

    report.attempt("figure of the metrics", figure)


def _add_class_metrics(report: Report, records: Records, done: bool) -> None:
    """What the evaluations said of single classes, unless it is in the report already."""
    for group, per_class in records.per_class().items():
        task = group.rpartition("/")[2]
        if done and task in _INSTANCE_TASKS:
            continue
        table = metrics_class_table(per_class)
        chief = next((m for m in ("IoU", "AP", "PQ") if m in table[0]), table[0][1])
        report.page.section(f"Classes: {group}")

        def make(table=table, chief=chief, per_class=per_class, group=group) -> None:
            name = f"per_class_{safe_name(group)}"
            report.save(f"{name}.csv", to_csv(table).encode())
            values = {c: metrics[chief] for c, metrics in per_class.items() if chief in metrics}
            figure = class_metric_figure(chief, values)
            report.figure(f"{name}.png", figure, f"{chief} of each class", "Of the last evaluation.")
            report.page.table(table, f"Metrics of each class, {group}")

        report.attempt(f"table of classes for {group}", make)


def _missing_predictions(config: Mapping[str, Any] | None, datasets: tuple[str, ...]) -> str:
    if config is None:
        return "No predictions: there is no config.yaml, so the data set that they belong to is not known."
    if not datasets:
        return "No predictions: the config names no data set to test on (DATASETS.TEST)."
    return (
        "No precision and recall, confusions and pictures: inference/ has no coco_instances_results.json. It "
        "is written by the evaluation of boxes and masks in COCO's or LVIS's way; so nothing has been "
        "evaluated yet, or the data set is evaluated in another way, or the evaluator has no output folder."
    )


def make_report(output_dir: str, cfg: Mapping[str, Any] | None = None) -> str:
    """Write the report of a run; `write_report` without its silence.

    Args:
        output_dir: the run's output folder.
        cfg: the config of either kind; None reads ``config.yaml``.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: there is no such folder, or nothing of a run in it.
        OSError: the report cannot be written.
    """
    output_dir = os.fspath(output_dir)
    if not PathManager.isdir(output_dir):
        raise FileNotFoundError(f"{output_dir} is no folder; the report is made of a run's output folder.")
    parts = ("metrics.json", "config.yaml", "inference")
    if not any(PathManager.exists(os.path.join(output_dir, part)) for part in parts):
        raise FileNotFoundError(
            f"{output_dir} is no output folder of a run: it has none of {', '.join(parts)}."
        )
    start = time.perf_counter()
    report = Report(output_dir)
    report.page.section("Run")
    config: Mapping[str, Any] | None = cfg

    def load_config() -> None:
        nonlocal config
        config = read_config(output_dir)

    if cfg is None:
        report.attempt("config", load_config)
    records = Records()

    def load_records() -> None:
        nonlocal records
        records = read_records(os.path.join(output_dir, "metrics.json"))

    report.attempt("metrics.json", load_records)
    report.attempt("summary", lambda: report.page.facts(run_facts(output_dir, config, records)))
    report.attempt("curves", lambda: _add_training(report, records))
    report.attempt("metrics", lambda: _add_evaluation(report, records))

    datasets = dataset_names(config)
    predictions: dict[str, str] = {}
    report.attempt("predictions", lambda: predictions.update(find_predictions(output_dir, datasets, config)))
    done = False
    for dataset, path in predictions.items():
        folder = safe_name(dataset) if len(predictions) > 1 else ""
        report.page.section(f"Detections: {dataset}")
        made = report.attempt(
            f"report on predictions for {dataset}",
            functools.partial(add_detections, report, path, dataset, config, folder),
        )
        done = done or made
    _add_class_metrics(report, records, done)
    if not predictions and not any(g.startswith("sem_seg") for g in records.evaluations()):
        report.page.section("Detections")
        report.page.note(_missing_predictions(config, datasets))
    path = os.path.join(report.folder, "index.html")
    report.save("index.html", report.page.render().encode())
    logger.info("The report is in %s (made in %.1f s)", path, time.perf_counter() - start)
    return path


def write_report(output_dir: str, cfg: Mapping[str, Any] | None = None) -> str:
    """Write ``OUTPUT_DIR/report``: figures, tables, and a page of all of them.

    It reads what a run leaves in its output folder: ``metrics.json``, ``config.yaml``, ``log.txt`` and the
    predictions in ``inference/``; the ground truth is that of the data set in DATASETS.TEST. What is missing
    the page names. To be called in the main process alone.

    Args:
        output_dir: the run's output folder.
        cfg: the config of either kind; None reads ``config.yaml``.

    Returns:
        The path of the page, or "" if it could not be made: a report never ends a program. The log has the
        reason.
    """
    try:
        return make_report(output_dir, cfg)
    except Exception as error:  # a training that has succeeded does not fail for its report
        logger.exception("The report of %s is not made: %s", output_dir, reason_of(error))
        return ""
