"""Like the recipe with ViT-B, but with a ViT-L."""

from .common.vit import use_vit_large
from .mask_rcnn_vitdet_b_100ep import dataloader, lr_multiplier, model, optimizer, train

use_vit_large(model, optimizer, train)
