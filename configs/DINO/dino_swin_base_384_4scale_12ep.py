"""DINO with a Swin-B pretrained on ImageNet-22k, with windows of size 12, trained for 12 epochs of COCO."""

from ..common.data.coco_detr import dataloader
from ..common.detr import lr_multiplier_12ep as lr_multiplier
from ..common.detr import optimizer, train
from .models.dino_r50 import model
from .models.transformers import use_swin

use_swin(
    model,
    embed_dim=128,
    depths=[2, 2, 18, 2],
    num_heads=[4, 8, 16, 32],
    window_size=12,
    pretrain_img_size=384,
    drop_path_rate=0.2,
)

train.init_checkpoint = "/path/to/swin_base_patch4_window12_384_22k.pth"
train.output_dir = dataloader.evaluator.output_dir = "./output/dino_swin_base_384_4scale_12ep"
train.max_iter = 90000
