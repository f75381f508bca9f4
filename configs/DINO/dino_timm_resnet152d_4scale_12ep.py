"""DINO with a ResNet-152-D of timm and four scales, starting at stride 4, trained for 12 epochs of COCO."""

from detlib.config import LazyCall as L
from detlib.layers import FrozenBatchNorm2d, ShapeSpec
from detlib.modeling.backbone import TimmBackbone

from .dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(TimmBackbone)(
    model_name="resnet152d",
    features_only=True,
    pretrained=True,
    in_channels=3,
    out_indices=(1, 2, 3),
    norm_layer=FrozenBatchNorm2d,
)
model.neck.input_shapes = {
    "p1": ShapeSpec(channels=256),
    "p2": ShapeSpec(channels=512),
    "p3": ShapeSpec(channels=1024),
}
model.neck.in_features = ["p1", "p2", "p3"]

train.init_checkpoint = ""
train.output_dir = dataloader.evaluator.output_dir = "./output/dino_timm_resnet152d_4scale_12ep"
