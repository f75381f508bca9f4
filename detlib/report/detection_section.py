"""The part of a report that looks at detections one by one."""

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
from detlib.report.images import draw_comparison, encode_picture, picture_files, rank_pictures
from detlib.report.matching import F1Curve, Matches, confusion_matrix, f1_curve, match_classes, picture_scores
from detlib.report.report import Report

__all__ = ["add_detections"]

_PICTURES = 6
_CONFUSIONS = 15
_JPEG_QUALITY = 88
_MAX_FAILURES = 2  # then the pictures are most likely not on this machine


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
    """Add figures, tables and pictures of the detections on one data set.

    Args:
        report: the report.
        path: the predictions.
        dataset: the data set's name.
        config: of the run.
        folder: in the report, for the files; "" for the report's own.
    """
    found = load_detections(path, dataset, config)
    page = report.page
    number, pictures = len(found.results), len(found.image_ids)
    of_time = ""
    if os.path.isfile(path):
        of_time = f", written {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(os.path.getmtime(path)))}"
    where = os.path.relpath(path, report.output_dir)
    page.text(
        f"{number} detections in {where}{of_time}; {int(found.gt_counts.sum())} objects of "
        f"{found.num_classes} classes in {pictures} pictures."
    )
    if not number:
        page.note("The model has found nothing at all, so there is nothing to draw of its detections.")
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
        "curves of precision and recall",
        lambda: report.figure(
            name_of("pr_curves.png"),
            pr_figure(found, scores),
            "Precision over recall of the most frequent classes and the mean of all",
            "The mean height of each curve is the AP beside its name. Overlap from 0.5 on the left, the mean "
            "over the thresholds 0.5, 0.55, ..., 0.95 on the right.",
        ),
    )
    _add_threshold(report, found, curve, name_of("f1_curve.png"))

    page.heading("Confusions")
    report.attempt("confusion matrix", lambda: _add_confusions(report, found, matches, curve, name_of))

    page.heading("Classes")
    report.attempt(
        "table of classes",
        lambda: _add_classes(report, class_table(found, scores, curve), curve, name_of("per_class.csv")),
    )

    page.heading("Labels")
    report.attempt(
        "statistics of labels",
        lambda: report.figure(
            name_of("labels.png"),
            labels_figure(found, curve),
            "Number of objects of each class, and sizes of the objects",
            f"Detections are those with confidence from {curve.threshold:.3f}.",
        ),
    )
    report.attempt("pictures", lambda: _add_pictures(report, found, matches, curve.threshold, name_of))


def _add_threshold(report: Report, found: Detections, curve: F1Curve, name: str) -> None:
    page = report.page
    page.heading("Confidence threshold")
    f1 = curve.rates()[2][curve.best]
    if f1 > 0:
        page.text(
            f"The best F1 over all detections together is {f1:.3f}, at confidence {curve.threshold:.3f}. "
            "Tables, confusions and pictures below are made at this threshold."
        )
    else:
        page.note(
            f"No detection is right at any threshold; what follows is made at {curve.threshold:.3f}, which "
            "means nothing."
        )
    report.attempt(
        "figure of F1",
        lambda: report.figure(
            name,
            f1_figure(found, curve),
            "F1, precision and recall over the threshold of confidence",
            "A detection is right if it is the most confident one that overlaps an object of its class from "
            "0.5 on.",
        ),
    )


def _add_confusions(report: Report, found: Detections, matches: Matches, curve: F1Curve, name_of) -> None:
    matrix = confusion_matrix(found, matches, curve.threshold)
    report.figure(
        name_of("confusion_matrix.png"),
        confusion_figure(matrix, found, curve.threshold),
        "Confusion matrix as counts and as shares",
        f"Detections with confidence from {curve.threshold:.3f}, overlap from 0.5. First each class is "
        "matched with its own detections, then what is left across classes. The last column is what was "
        "missed, the last row what was found where no object is. On the right each row is divided by its "
        "sum.",
    )
    columns, rows = confusion_table(matrix, found.class_names)
    report.save(name_of("confusions.csv"), to_csv((columns, rows)).encode())
    if rows:
        report.page.text(
            f"The most frequent mistakes; all of them are in {name_of('confusions.csv')}. "
            "As background: missed. Background as a class: found where no object is."
        )
        report.page.table((columns, rows[:_CONFUSIONS]), "The most frequent mistakes")


def _add_classes(report: Report, table: Table, curve: F1Curve, name: str) -> None:
    report.save(name, to_csv(table).encode())
    report.page.text(
        f"AP in percent; precision, recall, F1 and the number of detections at confidence "
        f"{curve.threshold:.3f} and an overlap from 0.5. A click on a name sorts. The table is also "
        f"in {name}."
    )
    report.page.table(table, "Metrics of each class")


def _add_pictures(report: Report, found: Detections, matches: Matches, threshold: float, name_of) -> None:
    scores = picture_scores(found, matches, threshold)
    files = picture_files(found)
    page = report.page
    failures = 0
    for kind, chosen in zip(("best", "worst"), rank_pictures(scores, _PICTURES)):
        page.heading(f"{kind.capitalize()} pictures")
        if not chosen:
            page.text("There are too few pictures with objects.")
            continue
        if kind == "best":
            page.text(
                "The score of a picture is the sum of the overlaps of all right detections, divided by the "
                "mean of the numbers of objects and of detections: 1 if all is found exactly and nothing "
                "else. Green is right, orange-red is missed or wrong, grey does not count."
            )
        for rank, image in enumerate(chosen, start=1):
            file_name = files[int(found.image_ids[image])]
            shown = os.path.basename(file_name)

            def draw(image=image, rank=rank, file_name=file_name, shown=shown, kind=kind) -> None:
                picture = draw_comparison(found, matches, threshold, image, file_name)
                report.save(name_of(f"{kind}_{rank}.png"), encode_picture(picture, "PNG"))
                counts = {key: int(scores[key][image]) for key in ("objects", "detections", "right")}
                page.figure(
                    encode_picture(picture, "JPEG", quality=_JPEG_QUALITY),
                    f"{shown}: ground truth on the left, predictions on the right",
                    f"{rank}. {shown}: score {scores['score'][image]:.3f}; {counts['objects']} objects, "
                    f"{counts['detections']} detections, {counts['right']} right",
                    "image/jpeg",
                )

            failures += not report.attempt(f"picture of {shown}", draw)
            if failures >= _MAX_FAILURES:
                page.note("The other pictures are not tried.")
                return
