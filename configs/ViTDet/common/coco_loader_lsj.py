"""COCO with large-scale jitter: images of up to 1024 x 1024 pixels, which the models pad to squares."""

import detlib.data.transforms as T
from detlib.config import LazyCall as L

from ...common.data.coco import dataloader

image_size = 1024
dataloader.train.total_batch_size = 64
dataloader.train.mapper.update(
    augmentations=[
        L(T.RandomFlip)(horizontal=True),
        L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=image_size, target_width=image_size),
        L(T.FixedSizeCrop)(crop_size=(image_size, image_size), pad=False),
    ],
    image_format="RGB",
    # Compute boxes from the cropped masks.
    recompute_boxes=True,
)
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=image_size, max_size=image_size)
]
