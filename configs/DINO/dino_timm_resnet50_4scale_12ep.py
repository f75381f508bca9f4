"""DINO with a ResNet-50 of timm and four scales, trained for 12 epochs of COCO."""

from detlib.config import LazyCall as L
from detlib.layers import FrozenBatchNorm2d, ShapeSpec
from detlib.modeling.backbone import TimmBackbone

from .dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(TimmBackbone)(
    model_name="resnet50",
    features_only=True,
    pretrained=True,
    in_channels=3,
    out_indices=(2, 3, 4),
    norm_layer=FrozenBatchNorm2d,
)
model.neck.input_shapes = {
    "p2": ShapeSpec(channels=512),
    "p3": ShapeSpec(channels=1024),
    "p4": ShapeSpec(channels=2048),
}
model.neck.in_features = ["p2", "p3", "p4"]

train.init_checkpoint = ""
train.output_dir = dataloader.evaluator.output_dir = "./output/dino_timm_resnet50_4scale_12ep"
