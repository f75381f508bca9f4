"""DINO with a ResNet-50 with a dilated last stage (DC5), trained for 12 epochs of COCO."""

from detlib.config import LazyCall as L
from detlib.modeling.backbone import make_stage

from .dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.stages = L(make_stage)(depth=50, stride_in_1x1=False, norm="FrozenBN", res5_dilation=2)

train.output_dir = dataloader.evaluator.output_dir = "./output/dino_r50_dc5_4scale_12ep"
