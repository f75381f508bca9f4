"""DINO with a ConvNeXt-Base of timm, pretrained on ImageNet-22k, trained for 12 epochs of COCO."""

from detlib.config import LazyCall as L
from detlib.layers import ShapeSpec
from detlib.modeling.backbone import TimmBackbone

from .dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(TimmBackbone)(
    model_name="convnext_base.fb_in22k",
    features_only=True,
    pretrained=True,
    in_channels=3,
    out_indices=(1, 2, 3),
)
model.neck.input_shapes = {
    "p1": ShapeSpec(channels=256),
    "p2": ShapeSpec(channels=512),
    "p3": ShapeSpec(channels=1024),
}
model.neck.in_features = ["p1", "p2", "p3"]

train.init_checkpoint = ""
train.output_dir = dataloader.evaluator.output_dir = "./output/dino_timm_convnext_base_4scale_12ep"
