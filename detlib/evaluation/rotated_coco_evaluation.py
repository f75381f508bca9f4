"""The COCO metric for rotated boxes."""

from __future__ import annotations

from typing import Any

from detlib.evaluation.coco_evaluation import COCOEvaluator
from detlib.evaluation.coco_json import instances_to_coco_json
from detlib.structures import Instances

__all__ = ["RotatedCOCOEvaluator"]


class RotatedCOCOEvaluator(COCOEvaluator):
    """Evaluator of rotated boxes with COCO's average precision.

    The IoU is that of the rotated rectangles. `COCOEvaluator` does the same if the ground truth (`bbox` of
    five numbers: center x, center y, width, height, angle in degrees) or the predictions contain rotated
    boxes. This class always does so, and ignores masks and keypoints. Sizes ("APs" etc.) are width times
    height unless the ground truth has `area`.

    Results are the same as of `COCOEvaluator`, with "bbox" as the only task.
    """

    _always_rotated = True

    def __init__(self, dataset_name: str, tasks=None, *args, **kwargs) -> None:
        """
        Args:
            dataset_name: see `COCOEvaluator`.
            tasks: None or ("bbox",).
            *args: see `COCOEvaluator`.
            **kwargs: see `COCOEvaluator`.

        Raises:
            ValueError: `tasks` contains a task other than "bbox".
        """
        super().__init__(dataset_name, tasks, *args, **kwargs)
        if set(self._tasks or ()) - {"bbox"}:
            raise ValueError(
                f"RotatedCOCOEvaluator supports only the task 'bbox', got tasks {list(self._tasks or ())}."
            )

    def instances_to_json(self, instances: Instances, img_id: Any) -> list[dict]:
        """Convert the boxes of an image to COCO's result format, see `instances_to_coco_json`."""
        fields = {name: instances.get(name) for name in ("pred_boxes", "scores", "pred_classes")}
        return instances_to_coco_json(Instances(instances.image_size, **fields), img_id)

    def _to_json(self, instances: Instances, img_id: Any) -> list[dict]:
        return self.instances_to_json(instances, img_id)

    def _check_tasks_of(self, results: list[dict]) -> set[str]:
        return {"bbox"}
