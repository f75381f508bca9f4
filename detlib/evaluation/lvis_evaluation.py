"""The LVIS metric for boxes, masks and box proposals."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from .coco_evaluation import COCOEvaluator
from .coco_json import GroundTruth, load_ground_truth
from .lvis_metrics import METRICS, LvisScores, evaluate_lvis

__all__ = ["LVISEvaluator"]


class LVISEvaluator(COCOEvaluator):
    """Computes LVIS's average precision of instance predictions, or the average recall of box proposals.

    See `detlib.evaluation.lvis_metrics` for what sets it apart from COCO's.

    Args:
        dataset_name: a registered name; its metadata names the annotation file, in LVIS's format.
        tasks: of "bbox" and "segm"; by default, what the predictions have.
        distributed: gather the predictions of all processes into the main one.
        output_dir: folder for `instances_predictions.pth`, `lvis_instances_results.json` (in COCO's result
            format) or `box_proposals.pkl`.
        max_dets_per_image: so many detections of a picture count, the best first, all classes together;
            default 300, negative for all.

    Raises:
        ValueError: the data set has no annotation file, or a task is unknown.
        FileNotFoundError: the annotation file does not exist.
    """

    _METRICS = METRICS
    _RESULTS_FILE = "lvis_instances_results.json"
    _DEFAULT_MAX_DETS = 300

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
    ) -> None:
        super().__init__(dataset_name, tasks, distributed, output_dir, max_dets_per_image=max_dets_per_image)
        if not self._metadata.get("json_file"):
            raise ValueError(
                f"LVISEvaluator: dataset {dataset_name!r} has no 'json_file' in its metadata; the metric "
                "needs the annotation file to know which categories each picture was searched for."
            )

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """Computes the metrics of all that was taken in.

        Args:
            img_ids: evaluate on the pictures with these ids only; all by default.

        Returns:
            A dict of "bbox" and "segm", each with "AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc" and
            "APf" in percent; or of "box_proposals" with "AR@100", "ARs@100" and so on. Empty in processes
            other than the main one, and where nothing can be evaluated.
        """
        return super().evaluate(img_ids)

    @functools.cached_property
    def _ground_truth(self) -> GroundTruth:
        ground_truth = load_ground_truth(self._dataset_name, self._metadata)
        annotations = [{**annotation, "iscrowd": 0} for annotation in ground_truth.coco["annotations"]]
        return dataclasses.replace(ground_truth, coco={**ground_truth.coco, "annotations": annotations})

    def _score(self, results: list[dict], task: str, img_ids: Sequence[int] | None) -> LvisScores:
        return evaluate_lvis(
            self._ground_truth.coco,
            results,
            task,
            max_dets=self._max_dets_per_image or self._DEFAULT_MAX_DETS,
            img_ids=img_ids,
        )

    def _category_ids(self) -> dict[int, int]:
        """Returns the map from class index to category id."""
        if self._metadata.get("thing_dataset_id_to_contiguous_id") is None:
            return {category_id - 1: category_id for category_id in self._ground_truth.category_ids}
        return super()._category_ids()

    def _class_names(self) -> None:
        """There are too many classes for a table of each."""
        return None
