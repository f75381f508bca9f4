"""DETR with a ResNet-101, trained for 300 epochs of COCO."""

from .detr_R_50_300ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.stages.depth = 101

train.init_checkpoint = "/path/to/r101.pkl"
train.output_dir = dataloader.evaluator.output_dir = "./output/detr_r101_300ep"
