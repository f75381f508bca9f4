"""Tables of per-class metrics and of confusions."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detlib.evaluation.coco_metrics import CocoScores, mean_percent
from detlib.report.detections import Detections
from detlib.report.matching import F1Curve

__all__ = ["Table", "class_table", "confusion_table", "metrics_class_table", "to_csv"]

# Column names and rows of a table; None is an empty cell.
Table = tuple[list[str], list[list[Any]]]

_AREAS = {"small": "APs", "medium": "APm", "large": "APl"}


def _number(value: float, digits: int = 2) -> float | None:
    return None if value is None or math.isnan(value) else round(float(value), digits)


def _ap_columns(scores: CocoScores, index: int) -> dict[str, float | None]:
    """Return the AP of a class in percent: overall, at two IoU thresholds, and by object size."""
    columns = {"AP": scores.ap_of_class(index)}
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        at = np.isclose(scores.iou_thresholds, threshold)
        columns[name] = mean_percent(scores.precision[at, :, index, 0, -1])
    for area, name in _AREAS.items():
        if area in scores.area_names:
            of_area = scores.precision[:, :, index, scores.area_names.index(area), -1]
            columns[name] = mean_percent(of_area)
    return {name: _number(value) for name, value in columns.items()}


def class_table(found: Detections, scores: Mapping[str, CocoScores], curve: F1Curve) -> Table:
    """Return a table with one row per class, in the order of the category ids.

    Args:
        found: the detections and the ground truth.
        scores: the scores of each task. Box AP comes first; other tasks follow as "segm AP" and so on.
        curve: source of precision, recall and F1 (in percent) and of the number of detections, at its
            selected threshold.
    """
    rows = []
    for index, name in enumerate(found.class_names):
        row: dict[str, Any] = {"class": name, "objects": int(curve.num_objects[index])}
        row["detections"] = int(curve.num_detections[curve.best, index])
        for task, of_task in scores.items():
            prefix = "" if task == "bbox" else f"{task} "
            columns = _ap_columns(of_task, index)
            kept = columns if task == "bbox" else {k: columns[k] for k in ("AP", "AP50", "AP75")}
            row |= {prefix + key: value for key, value in kept.items()}
        for key, values in zip(("precision", "recall", "F1"), curve.rates(index)):
            row[key] = _number(100 * values[curve.best])
        rows.append(row)
    columns = list(rows[0]) if rows else ["class"]
    return columns, [[row[column] for column in columns] for row in rows]


def metrics_class_table(per_class: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table with one row per class, from the per-class metrics of an evaluation."""
    metrics = list(dict.fromkeys(metric for values in per_class.values() for metric in values))
    metrics.sort(key=lambda metric: metric not in ("AP", "IoU", "PQ"))
    rows = [
        [name, *(_number(values.get(metric, math.nan)) for metric in metrics)]
        for name, values in per_class.items()
    ]
    return ["class", *metrics], rows


def confusion_table(matrix: np.ndarray, names: Sequence[str]) -> Table:
    """Return the off-diagonal entries of a confusion matrix, the most frequent first.

    The last row and the last column of the matrix are the background.
    """
    labels = [*names, "background"]
    off_diagonal = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    true, predicted = np.nonzero(off_diagonal)
    order = np.argsort(-off_diagonal[true, predicted], kind="stable")
    rows = [[labels[true[i]], labels[predicted[i]], int(matrix[true[i], predicted[i]])] for i in order]
    return ["true class", "predicted as", "count"], rows


def to_csv(table: Table) -> str:
    """Return the table as CSV with a header line; missing values are empty."""
    columns, rows = table
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return text.getvalue()
