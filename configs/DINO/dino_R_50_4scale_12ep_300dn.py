"""Like dino_R_50_4scale_12ep.py, with three times as many denoising queries."""

from .dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.dn_number = 300
