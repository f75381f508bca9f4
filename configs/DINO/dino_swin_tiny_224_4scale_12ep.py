"""DINO with a Swin-T, fine-tuned on ImageNet-1k after ImageNet-22k, trained for 12 epochs of COCO."""

from ..common.data.coco_detr import dataloader
from ..common.detr import lr_multiplier_12ep as lr_multiplier
from ..common.detr import optimizer, train
from .models.dino_r50 import model
from .models.transformers import use_swin

use_swin(
    model,
    embed_dim=96,
    depths=[2, 2, 6, 2],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    pretrain_img_size=224,
    drop_path_rate=0.1,
)

train.init_checkpoint = "/path/to/swin_tiny_patch4_window7_224_22kto1k_finetune.pth"
train.output_dir = "./output/dino_swin_tiny_224_4scale_12ep_22kto1k_finetune"
train.max_iter = 90000
