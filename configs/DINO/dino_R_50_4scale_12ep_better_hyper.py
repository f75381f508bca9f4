"""Like dino_R_50_4scale_12ep.py, with nothing frozen, more denoising queries and a higher class weight."""

from .dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.freeze_at = -1
model.dn_number = 300
for name in list(model.criterion.weight_dict):
    if name.startswith("loss_class") and "_dn" not in name:
        model.criterion.weight_dict[name] = 2.0

train.output_dir = "./output/dino_r50_4scale_12ep_better_hyper"
