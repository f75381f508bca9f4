"""FCOS with ResNet-18 on generated images of circles, squares and triangles.

It needs no dataset, and trains from random weights on two CPU cores in a few minutes. It is a small lazy
config to start with.
"""

from fvcore.common.param_scheduler import MultiStepParamScheduler

from detlib.config import LazyCall as L
from detlib.solver import WarmupParamScheduler

from ..common.data.coco import dataloader
from ..common.models.fcos import model
from ..common.optim import SGD as optimizer
from ..common.train import train

model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "BN"
model.backbone.bottom_up.stages.depth = 18
model.backbone.bottom_up.freeze_at = 0
model.backbone.update(out_channels=64, norm="GN")
model.backbone.top_block.update(in_channels=64, in_feature="p5")
model.head.conv_dims = [64, 64]
for level in model.head.input_shape:
    level.channels = 64
model.num_classes = 3
# BGR images in [0, 255].
model.update(pixel_mean=[103.53, 116.28, 123.675], pixel_std=[57.375, 57.12, 58.395])

dataloader.train.dataset.names = "shapes:train"
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations[0].update(short_edge_length=(128,), max_size=192)
dataloader.train.update(total_batch_size=4, num_workers=1)
dataloader.test.dataset.names = "shapes:val"
dataloader.test.mapper.augmentations[0].update(short_edge_length=128, max_size=192)
dataloader.test.num_workers = 1
dataloader.evaluator.output_dir = "${train.output_dir}/inference"

optimizer.lr = 0.01
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[640, 800]),
    warmup_length=50 / 800,
    warmup_factor=0.001,
)
train.update(max_iter=800, eval_period=0, device="auto", output_dir="./output/fcos_R_18_FPN_shapes", seed=1)
train.checkpointer.update(period=5000)
