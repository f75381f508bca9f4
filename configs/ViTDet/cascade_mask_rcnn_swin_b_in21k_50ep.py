"""Cascade Mask R-CNN with a Swin-B pretrained on ImageNet-21k, trained for 50 epochs."""

from detlib.config import LazyCall as L
from detlib.modeling import SwinTransformer

from ..common.coco_schedule import steps
from ..common.models.cascade_rcnn import model
from ..common.models.edits import deepen_heads, use_rgb
from ..common.optim import AdamW as optimizer
from ..common.train import train
from .common.coco_loader_lsj import dataloader

use_rgb(model)
deepen_heads(model, norm="LN")
model.backbone.bottom_up = L(SwinTransformer)(
    depths=[2, 2, 18, 2], drop_path_rate=0.4, embed_dim=128, num_heads=[4, 8, 16, 32]
)
model.backbone.in_features = ("p0", "p1", "p2", "p3")
model.backbone.norm = "LN"
model.backbone.square_pad = 1024

train.amp.enabled = True
train.ddp.fp16_compression = True
train.init_checkpoint = "detectron2://ImageNetPretrained/swin/swin_base_patch4_window7_224_22k.pth"
train.max_iter = 92187
lr_multiplier = steps([81944, 88773], train.max_iter, warmup_length=250 / 184375)

optimizer.params.overrides = {"relative_position_bias_table": {"weight_decay": 0.0}}
optimizer.lr = 4e-5
optimizer.weight_decay = 0.05
