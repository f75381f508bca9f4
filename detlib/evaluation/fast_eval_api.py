"""The COCO evaluation in C++ behind pycocotools' interface, under the name that it has in detectron2."""

from faster_coco_eval.core.faster_eval_api import COCOeval_faster

__all__ = ["COCOeval_opt"]


class COCOeval_opt(COCOeval_faster):
    """Takes the place of `pycocotools.cocoeval.COCOeval`, with the same results. It is faster-coco-eval's."""
