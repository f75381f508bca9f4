"""The section of a report on the individual detections."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from detlib.evaluation.coco_metrics import METRICS, CocoScores
from detlib.evaluation.lvis_evaluation import METRICS as LVIS_METRICS
from detlib.report.class_table import Table, class_table, confusion_table, to_csv
from detlib.report.detection_plots import confusion_figure, f1_figure, labels_figure, pr_figure
from detlib.report.detections import Detections, load_detections
from detlib.report.images import draw_comparison, encode_image, image_files, rank_images
from detlib.report.matching import F1Curve, Matches, confusion_matrix, f1_curve, image_scores, match_classes
from detlib.report.report import Report

__all__ = ["add_detections"]

_NUM_IMAGES = 6
_CONFUSIONS = 15
_JPEG_QUALITY = 88
_MAX_FAILURES = 2  # After this many, the images are most likely not on this machine.


def _scores_table(scores: Mapping[str, CocoScores], is_lvis: bool) -> Table:
    legal = LVIS_METRICS if is_lvis else METRICS
    metrics = list(dict.fromkeys(metric for task in scores for metric in legal[task]))
    rows: list[list[Any]] = []
    for task, of_task in scores.items():
        values = [of_task.ap(metric) if metric in legal[task] else np.nan for metric in metrics]
        rows.append([task, *(None if np.isnan(value) else round(value, 4) for value in values)])
    return ["task", *metrics], rows


def add_detections(
    report: Report, path: str, dataset: str, config: Mapping[str, Any] | None, folder: str
) -> None:
    """Add figures, tables and example images of the detections on one dataset.

    Args:
        report: the report to add to.
        path: the file of predictions.
        dataset: the name of the dataset.
        config: the config of the run.
        folder: subfolder of the report for the files; "" writes into the report's own folder.
    """
    found = load_detections(path, dataset, config)
    page = report.page
    number, num_images = len(found.results), len(found.image_ids)
    written = ""
    if os.path.isfile(path):
        written = f", written {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(os.path.getmtime(path)))}"
    where = os.path.relpath(path, report.output_dir)
    page.text(
        f"{number} detections in {where}{written}; {int(found.gt_counts.sum())} objects of "
        f"{found.num_classes} classes in {num_images} images."
    )
    if not number:
        page.note("The model has no detections at all, so there is nothing to plot.")
        return
    scores = {task: found.scores(task) for task in found.tasks}
    matches = match_classes(found)
    curve = f1_curve(found, matches)

    def name_of(name: str) -> str:
        return os.path.join(folder, name)

    page.heading("Metrics of these detections")
    page.table(_scores_table(scores, found.is_lvis), "Metrics of the detections")

    page.heading("Precision and recall")
    report.attempt(
        "precision-recall curves",
        lambda: report.figure(
            name_of("pr_curves.png"),
            pr_figure(found, scores),
            "Precision over recall of the most frequent classes and the mean of all",
            "The mean height of each curve is the AP next to its name. Left: IoU threshold 0.5. Right: mean "
            "over the IoU thresholds 0.5, 0.55, ..., 0.95.",
        ),
    )
    _add_threshold(report, found, curve, name_of("f1_curve.png"))

    page.heading("Confusions")
    report.attempt("confusion matrix", lambda: _add_confusions(report, found, matches, curve, name_of))

    page.heading("Classes")
    report.attempt(
        "table of class metrics",
        lambda: _add_classes(report, class_table(found, scores, curve), curve, name_of("per_class.csv")),
    )

    page.heading("Labels")
    report.attempt(
        "label statistics",
        lambda: report.figure(
            name_of("labels.png"),
            labels_figure(found, curve),
            "Number of objects of each class, and sizes of the objects",
            f"Detections with a confidence of at least {curve.threshold:.3f} are counted.",
        ),
    )
    report.attempt("example images", lambda: _add_images(report, found, matches, curve.threshold, name_of))


def _add_threshold(report: Report, found: Detections, curve: F1Curve, name: str) -> None:
    page = report.page
    page.heading("Confidence threshold")
    f1 = curve.rates()[2][curve.best]
    if f1 > 0:
        page.text(
            f"The best F1 over all detections is {f1:.3f}, at confidence {curve.threshold:.3f}. "
            "The tables, confusions and images below use this threshold."
        )
    else:
        page.note(
            f"No detection is correct at any threshold. The following uses the arbitrary threshold "
            f"{curve.threshold:.3f}."
        )
    report.attempt(
        "F1 figure",
        lambda: report.figure(
            name,
            f1_figure(found, curve),
            "F1, precision and recall over the confidence threshold",
            "A detection is correct if it is the most confident one with an IoU of at least 0.5 with an "
            "object of its class.",
        ),
    )


def _add_confusions(report: Report, found: Detections, matches: Matches, curve: F1Curve, name_of) -> None:
    matrix = confusion_matrix(found, matches, curve.threshold)
    report.figure(
        name_of("confusion_matrix.png"),
        confusion_figure(matrix, found, curve.threshold),
        "Confusion matrix as counts and as fractions",
        f"Detections with a confidence of at least {curve.threshold:.3f}, matched at an IoU of at least 0.5. "
        "Objects are first matched with detections of their own class, the remaining ones across classes. "
        "The last column counts missed objects, the last row detections where there is no object. On the "
        "right, each row is divided by its sum.",
    )
    columns, rows = confusion_table(matrix, found.class_names)
    report.save(name_of("confusions.csv"), to_csv((columns, rows)).encode())
    if rows:
        report.page.text(
            f"The most frequent mistakes. All of them are in {name_of('confusions.csv')}. "
            "Predicted as background: a missed object. True class background: a detection where there is no "
            "object."
        )
        report.page.table((columns, rows[:_CONFUSIONS]), "The most frequent mistakes")


def _add_classes(report: Report, table: Table, curve: F1Curve, name: str) -> None:
    report.save(name, to_csv(table).encode())
    report.page.text(
        f"All metrics are in percent. Precision, recall, F1 and the number of detections are at a confidence "
        f"of at least {curve.threshold:.3f} and an IoU of at least 0.5. Click a column name to sort. The "
        f"table is also in {name}."
    )
    report.page.table(table, "Metrics of each class")


def _add_images(report: Report, found: Detections, matches: Matches, threshold: float, name_of) -> None:
    scores = image_scores(found, matches, threshold)
    files = image_files(found)
    page = report.page
    failures = 0
    for kind, chosen in zip(("best", "worst"), rank_images(scores, _NUM_IMAGES)):
        page.heading(f"{kind.capitalize()} images")
        if not chosen:
            page.text("There are too few images with objects.")
            continue
        if kind == "best":
            page.text(
                "The score of an image is the sum of the IoUs of all correct detections, divided by the mean "
                "of the number of objects and the number of detections. It is 1 if every object is detected "
                "exactly and nothing else. Green: correct. Orange-red: missed or wrong. Gray: not counted."
            )
        for rank, image in enumerate(chosen, start=1):
            file_name = files[int(found.image_ids[image])]
            shown = os.path.basename(file_name)

            def draw(image=image, rank=rank, file_name=file_name, shown=shown, kind=kind) -> None:
                drawing = draw_comparison(found, matches, threshold, image, file_name)
                report.save(name_of(f"{kind}_{rank}.png"), encode_image(drawing, "PNG"))
                counts = {key: int(scores[key][image]) for key in ("objects", "detections", "correct")}
                page.figure(
                    encode_image(drawing, "JPEG", quality=_JPEG_QUALITY),
                    f"{shown}: ground truth on the left, predictions on the right",
                    f"{rank}. {shown}: score {scores['score'][image]:.3f}; {counts['objects']} objects, "
                    f"{counts['detections']} detections, {counts['correct']} correct",
                    "image/jpeg",
                )

            failures += not report.attempt(f"comparison for {shown}", draw)
            if failures >= _MAX_FAILURES:
                page.note("The remaining images were skipped.")
                return
