"""DINO with a ResNet-50 of torchvision and four scales, trained for 12 epochs of COCO."""

from detlib.config import LazyCall as L
from detlib.modeling.backbone import TorchvisionBackbone

from .dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(TorchvisionBackbone)(
    model_name="resnet50",
    pretrained=True,
    return_nodes={"layer2": "res3", "layer3": "res4", "layer4": "res5"},
)

train.init_checkpoint = ""
train.output_dir = dataloader.evaluator.output_dir = "./output/dino_torchvision_resnet50_4scale_12ep"
