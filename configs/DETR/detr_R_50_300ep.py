"""DETR with a ResNet-50, trained for 300 epochs of COCO with a batch size of 64."""

from ..common.data.coco_detr import dataloader
from ..common.detr import lr_multiplier_300ep as lr_multiplier
from ..common.detr import optimizer, train
from .models.detr_r50 import model

dataloader.train.total_batch_size = 64

train.clip_grad.enabled = False
train.output_dir = "./output/detr_r50_300ep"
train.max_iter = 554400
