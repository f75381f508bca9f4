"""COCO evaluation in C++ with the interface of pycocotools, under its name in detectron2."""

from faster_coco_eval.core.faster_eval_api import COCOeval_faster

__all__ = ["COCOeval_opt"]


class COCOeval_opt(COCOeval_faster):
    """faster-coco-eval's replacement for `pycocotools.cocoeval.COCOeval`, with the same results."""
