"""DINO with a ResNet-50 and four scales, trained for 24 epochs of COCO, including images without objects."""

from ..common.detr import lr_multiplier_24ep as lr_multiplier
from .dino_R_50_4scale_12ep import dataloader, model, optimizer, train

model.position_embedding.update(temperature=20, offset=0.0)
dataloader.train.dataset.filter_empty = False

train.max_iter = 180000
train.output_dir = "./output/dino_r50_4scale_24ep"
