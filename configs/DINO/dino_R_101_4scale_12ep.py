"""DINO with a ResNet-101 and four scales, trained for 12 epochs of COCO."""

from .dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.stages.depth = 101

train.init_checkpoint = "/path/to/r101.pkl"
train.output_dir = "./output/dino_r101_4scale_12ep"
