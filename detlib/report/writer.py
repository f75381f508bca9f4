"""Assembly of a report from its sections."""

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
        page.note("No curves: there is no metrics.json, or it is empty.")
        return

    def losses() -> None:
        caption = (
            "Faint: values from metrics.json, which are medians over 20 iterations. Strong: moving average "
            "over a tenth of the points. Dots: validation losses, if the run has any."
        )
        report.figure("losses.png", losses_figure(records), "Losses over the iterations", caption)

    def learning_rate() -> None:
        figure = learning_rate_figure(records)
        report.figure("learning_rate.png", figure, "Learning rate over the iterations", "")

    report.attempt("loss figure", losses)
    if not records.validation_losses():
        page.text("The run has no validation losses.")
    report.attempt("learning rate figure", learning_rate)


def _add_evaluation(report: Report, records: Records) -> None:
    report.page.section("Evaluation")
    if not records.evaluations():
        report.page.note(
            "No metrics: metrics.json has no evaluation results yet. The model is evaluated every "
            "TEST.EVAL_PERIOD (train.eval_period) iterations and at the end of training."
        )
        return
    report.page.table(metrics_table(records), "Metrics")

    def figure() -> None:
        alt = "Metrics over the iterations"
        report.figure("evaluation.png", evaluation_figure(records), alt, "Metrics of each evaluation.")

    report.attempt("figure of metrics", figure)


def _add_class_metrics(report: Report, records: Records, done: bool) -> None:
    """Add the per-class metrics of the evaluations, except for those already in the report."""
    for group, per_class in records.per_class().items():
        task = group.rpartition("/")[2]
        if done and task in _INSTANCE_TASKS:
            continue
        table = metrics_class_table(per_class)
        main = next((m for m in ("IoU", "AP", "PQ") if m in table[0]), table[0][1])
        report.page.section(f"Classes: {group}")

        def make(table=table, main=main, per_class=per_class, group=group) -> None:
            name = f"per_class_{safe_name(group)}"
            report.save(f"{name}.csv", to_csv(table).encode())
            values = {c: metrics[main] for c, metrics in per_class.items() if main in metrics}
            figure = class_metric_figure(main, values)
            report.figure(f"{name}.png", figure, f"{main} of each class", "From the last evaluation.")
            report.page.table(table, f"Metrics of each class, {group}")

        report.attempt(f"table of class metrics for {group}", make)


def _missing_predictions(config: Mapping[str, Any] | None, datasets: tuple[str, ...]) -> str:
    if config is None:
        return "No predictions: there is no config.yaml, so the test dataset is unknown."
    if not datasets:
        return "No predictions: the config has no test dataset (DATASETS.TEST)."
    return (
        "No precision and recall, confusions and images: inference/ has no coco_instances_results.json. The "
        "COCO and LVIS evaluators write it. Either there was no evaluation yet, the dataset has another "
        "evaluator, or the evaluator has no output folder."
    )


def make_report(output_dir: str, cfg: Mapping[str, Any] | None = None) -> str:
    """Write the report of a run like `write_report`, but raise errors.

    Args:
        output_dir: the output folder of the run.
        cfg: the YAML or lazy config of the run; None reads ``config.yaml``.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the folder does not exist or is not the output folder of a run.
        OSError: the report cannot be written.
    """
    output_dir = os.fspath(output_dir)
    if not PathManager.isdir(output_dir):
        raise FileNotFoundError(f"{output_dir} is not a folder; a report needs the output folder of a run.")
    parts = ("metrics.json", "config.yaml", "inference")
    if not any(PathManager.exists(os.path.join(output_dir, part)) for part in parts):
        raise FileNotFoundError(
            f"{output_dir} is not the output folder of a run: it has none of {', '.join(parts)}."
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
    logger.info("Wrote the report to %s in %.1f s", path, time.perf_counter() - start)
    return path


def write_report(output_dir: str, cfg: Mapping[str, Any] | None = None) -> str:
    """Write ``OUTPUT_DIR/report``: figures, tables, and an HTML page with all of them.

    The sources are ``metrics.json``, ``config.yaml``, ``log.txt`` and the predictions in ``inference/`` of
    the output folder, and the ground truth of the dataset in DATASETS.TEST. The page states what is missing.
    Call this in the main process only.

    Args:
        output_dir: the output folder of the run.
        cfg: the YAML or lazy config of the run; None reads ``config.yaml``.

    Returns:
        The path of the page, or "" if it could not be written. Errors are logged, not raised.
    """
    try:
        return make_report(output_dir, cfg)
    except Exception as error:  # a successful training run must not fail because of its report
        logger.exception("Could not write the report of %s: %s", output_dir, reason_of(error))
        return ""
