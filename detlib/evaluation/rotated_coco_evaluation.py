"""The COCO metric for rotated boxes."""

from __future__ import annotations

from typing import Any

from detlib.evaluation.coco_evaluation import COCOEvaluator
from detlib.evaluation.coco_json import instances_to_coco_json
from detlib.structures import Instances

__all__ = ["RotatedCOCOEvaluator"]


class RotatedCOCOEvaluator(COCOEvaluator):
    """Computes COCO's average precision of rotated boxes: the overlap is that of the rotated rectangles.

    `COCOEvaluator` does the same where boxes are rotated, in the ground truth (`bbox` of five numbers: center
    x, center y, width, height, angle in degrees) or in the predictions. This one does so in any case, and
    leaves masks and keypoints alone. Sizes ("APs" and so on) go by width times height unless the ground truth
    has `area`.

    Arguments and results are those of `COCOEvaluator`; the only task is "bbox".

    Raises:
        ValueError: `tasks` with another task than "bbox".
    """

    _always_rotated = True

    def __init__(self, dataset_name: str, tasks=None, *args, **kwargs) -> None:
        super().__init__(dataset_name, tasks, *args, **kwargs)
        if set(self._tasks or ()) - {"bbox"}:
            raise ValueError(
                f"RotatedCOCOEvaluator: tasks {list(self._tasks or ())}; "
                "rotated boxes have only the task 'bbox'."
            )

    def instances_to_json(self, instances: Instances, img_id: Any) -> list[dict]:
        """Converts one image's boxes to COCO's result format, see `instances_to_coco_json`."""
        fields = {name: instances.get(name) for name in ("pred_boxes", "scores", "pred_classes")}
        return instances_to_coco_json(Instances(instances.image_size, **fields), img_id)

    def _to_json(self, instances: Instances, img_id: Any) -> list[dict]:
        return self.instances_to_json(instances, img_id)

    def _check_tasks_of(self, results: list[dict]) -> set[str]:
        return {"bbox"}
