"""DINO with a ResNet-50 and five scales, starting at stride 4, trained for 12 epochs of COCO."""

from detlib.layers import ShapeSpec

from .dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.out_features = ["res2", "res3", "res4", "res5"]
model.neck.input_shapes.res2 = ShapeSpec(channels=256)
model.neck.in_features = ["res2", "res3", "res4", "res5"]
model.neck.num_outs = 5
model.transformer.num_feature_levels = 5

train.output_dir = "./output/dino_r50_5scale_12ep"
