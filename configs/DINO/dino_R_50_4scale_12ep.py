"""DINO with a ResNet-50 and four scales, trained for 12 epochs of COCO."""

from ..common.data.coco_detr import dataloader
from ..common.detr import lr_multiplier_12ep as lr_multiplier
from ..common.detr import optimizer, train
from .models.dino_r50 import model

train.output_dir = dataloader.evaluator.output_dir = "./output/dino_r50_4scale_12ep"
train.max_iter = 90000
