"""COCO 2017 for DETR-like models: boxes, multiple scales, and random crops of half of the images."""

import detlib.data.transforms as T
from detlib.config import LazyCall as L
from detlib.data import (
    DetrDatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detlib.evaluation import COCOEvaluator


def resize(sizes, **kwargs):
    return L(T.ResizeShortestEdge)(short_edge_length=sizes, sample_style="choice", **kwargs)


_sizes = tuple(range(480, 801, 32))

dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
        mapper=L(DetrDatasetMapper)(
            augmentation=[L(T.RandomFlip)(), resize(_sizes, max_size=1333)],
            augmentation_with_crop=[
                L(T.RandomFlip)(),
                resize((400, 500, 600)),
                L(T.RandomCrop)(crop_type="absolute_range", crop_size=(384, 600)),
                resize(_sizes, max_size=1333),
            ],
            is_train=True,
            mask_on=False,
            img_format="RGB",
        ),
        total_batch_size=16,
        num_workers=16,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(DetrDatasetMapper)(
            augmentation=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
            augmentation_with_crop=None,
            is_train=False,
            mask_on=False,
            img_format="RGB",
        ),
        num_workers=4,
    ),
    evaluator=L(COCOEvaluator)(dataset_name="${..test.dataset.names}"),
)
