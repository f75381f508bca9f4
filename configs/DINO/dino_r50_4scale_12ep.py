"""An alias of dino_R_50_4scale_12ep.py."""

from .dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train
