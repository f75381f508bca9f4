"""DINO with a plain ViT-B pretrained by MAE and four scales, trained for 12 epochs of COCO at 1024 pixels."""

from functools import partial

from detlib.modeling import get_vit_lr_decay_rate

from ..common.detr import lr_multiplier_12ep as lr_multiplier
from ..common.detr import optimizer, train
from ..ViTDet.common.coco_loader_lsj import dataloader
from .models.dino_r50 import model
from .models.transformers import use_vit

use_vit(model, embed_dim=768, depth=12, num_heads=12, drop_path_rate=0.1)

dataloader.train.total_batch_size = 16

optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=12, lr_decay_rate=0.7)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}

train.init_checkpoint = (
    "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
)
train.amp.enabled = True
train.output_dir = dataloader.evaluator.output_dir = "./output/dino_vitdet_base_4scale_12ep"
train.max_iter = 90000
