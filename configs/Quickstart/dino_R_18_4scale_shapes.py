"""DINO with ResNet-18 on generated images of circles, squares and triangles.

It needs no dataset, and trains from random weights on two CPU cores. It has group norm, no frozen parameters,
three narrow layers and 100 queries.
"""

from ..DINO.dino_R_50_4scale_12ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.stem.norm = model.backbone.stages.norm = "GN"
model.backbone.stages.depth = 18
model.backbone.freeze_at = 0
for name, channels in (("res3", 128), ("res4", 256), ("res5", 512)):
    model.neck.input_shapes[name].channels = channels
model.transformer.encoder.update(embed_dim=128, feedforward_dim=512, num_layers=3)
model.transformer.decoder.update(embed_dim=128, feedforward_dim=512, num_layers=3)
model.position_embedding.num_pos_feats = 64
model.neck.out_channels = model.neck.norm_layer.num_channels = 128
model.update(embed_dim=128, num_classes=3, num_queries=100, dn_number=25)

dataloader.train.dataset.names = "shapes:train"
dataloader.train.mapper.augmentation[1].update(short_edge_length=(256,), max_size=384)
dataloader.train.mapper.augmentation_with_crop = None
dataloader.train.update(total_batch_size=2, num_workers=1)
dataloader.test.dataset.names = "shapes:val"
dataloader.test.mapper.augmentation[0].update(short_edge_length=256, max_size=384)
dataloader.test.num_workers = 1

# Since the backbone starts from random weights, it has the same learning rate as the other parts.
optimizer.params.lr_factor_func.keywords["factor"] = 1.0
optimizer.lr = 4e-4
lr_multiplier.scheduler.milestones = [640, 800]
lr_multiplier.warmup_length = 20 / 800
train.update(max_iter=800, eval_period=0, init_checkpoint="", seed=1)
train.output_dir = dataloader.evaluator.output_dir = "./output/dino_R_18_4scale_shapes"
