"""Like the recipe with ViT-B, but with a ViT-H."""

from ..common.vit import use_vit_huge
from .mask_rcnn_vitdet_b_100ep import dataloader, lr_multiplier, model, optimizer, train

use_vit_huge(model, optimizer, train)
model.backbone.net.drop_path_rate = 0.4
optimizer.lr = 1e-4
