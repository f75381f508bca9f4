"""Data sets by address: named in a config by what they consist of, with no Python to write.

    coco:ANNOTATIONS.json@IMAGE_DIR     COCO's instance format; ?empty_boxes=drop leaves out boxes of no area
    voc:DIR@SPLIT                       Pascal VOC's folder layout; boxes are taken as they stand in the XML,
                                        or with ?one_based=1 as VOC's own, counted from 1
    yolo:DATA.yaml@SPLIT                Ultralytics' layout: boxes, polygons or poses; ?empty_boxes=drop
    roboflow:DIR@SPLIT                  Roboflow's COCO export; ?empty_boxes=drop
    dir:PATH[@SPLIT]                    any of these: finds out which, and says so
    shapes:train, shapes:val            generated pictures; shapes:train?num=500&size=128&seed=1;
                                        ?task=panoptic or ?task=stuff chooses what is evaluated;
                                        ?rotated=1 has rectangles with rotated boxes

Files and folders may lie in an object store (`s3://bucket/...`). Importing this package makes the catalogs
understand them.
"""

from detlib.data.catalog import register_address_scheme

from .coco import CocoAddress
from .folder import FolderAddress
from .roboflow import RoboflowAddress
from .shapes import ShapesAddress
from .voc import VocAddress
from .yolo import YoloAddress

__all__ = [
    "CocoAddress",
    "FolderAddress",
    "RoboflowAddress",
    "ShapesAddress",
    "VocAddress",
    "YoloAddress",
    "register_address_scheme",
]

register_address_scheme("coco", CocoAddress)
register_address_scheme("voc", VocAddress)
register_address_scheme("yolo", YoloAddress)
register_address_scheme("roboflow", RoboflowAddress)
register_address_scheme("dir", FolderAddress)
register_address_scheme("shapes", ShapesAddress)
