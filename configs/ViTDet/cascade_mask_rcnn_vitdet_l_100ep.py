"""Like the recipe with ViT-B, but with a ViT-L."""

from .cascade_mask_rcnn_vitdet_b_100ep import dataloader, lr_multiplier, model, optimizer, train
from .common.vit import use_vit_large

use_vit_large(model, optimizer, train)
