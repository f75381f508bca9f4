"""Like dino_R_50_4scale_12ep.py, with a trainable stem."""

from .dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.freeze_at = -1

train.output_dir = "./output/dino_r50_4scale_12ep_no_frozen_backbone"
