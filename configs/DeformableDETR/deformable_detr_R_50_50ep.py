"""Deformable DETR with a ResNet-50, trained for 50 epochs of COCO."""

from ..common.data.coco_detr import dataloader
from ..common.detr import lr_multiplier_50ep as lr_multiplier
from ..common.detr import optimizer, train
from .models.deformable_detr_r50 import model

train.output_dir = dataloader.evaluator.output_dir = "./output/deformable_detr_r50_50ep"
train.max_iter = 375000
