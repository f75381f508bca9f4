"""Small DETR, Deformable DETR and DINO models and batches for the tests."""

import torch
from torch import nn

from detlib.layers import PositionEmbeddingSine
from detlib.modeling import Backbone, ChannelMapper
from detlib.modeling.detr import (
    DETR,
    DINO,
    DeformableCriterion,
    DeformableDETR,
    DeformableDetrTransformer,
    DeformableDetrTransformerDecoder,
    DeformableDetrTransformerEncoder,
    DetrTransformer,
    DetrTransformerDecoder,
    DetrTransformerEncoder,
    DINOCriterion,
    DINOTransformer,
    DINOTransformerDecoder,
    DINOTransformerEncoder,
    HungarianMatcher,
    SetCriterion,
)
from detlib.structures import Boxes, Instances

DIM, NUM_CLASSES, NUM_QUERIES = 32, 3, 12
WEIGHTS = {"loss_class": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_bbox_dn": 7.0}


class TinyBackbone(Backbone):
    """A backbone with one convolution for each of the strides 8, 16 and 32."""

    def __init__(self):
        super().__init__()
        self._out_features = ["res3", "res4", "res5"]
        self._out_feature_channels = {"res3": 8, "res4": 12, "res5": 16}
        self._out_feature_strides = {"res3": 8, "res4": 16, "res5": 32}
        self.convs = nn.ModuleList(
            [nn.Conv2d(3, 8, 7, 8, 3), nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)]
        )

    def forward(self, x):
        out = {}
        for name, conv in zip(self._out_features, self.convs):
            x = conv(x).relu()
            out[name] = x
        return out


def neck(num_outs=4):
    return ChannelMapper(
        input_shapes=TinyBackbone().output_shape(),
        in_features=["res3", "res4", "res5"],
        out_channels=DIM,
        kernel_size=1,
        num_outs=num_outs,
        norm_layer=nn.GroupNorm(8, DIM),
    )


SIZES = dict(embed_dim=DIM, num_heads=4, feedforward_dim=48, num_layers=2, attn_dropout=0.0, ffn_dropout=0.0)
STATS = dict(pixel_mean=[120.0, 115.0, 105.0], pixel_std=[58.0, 57.0, 57.5])


def position_embedding(offset=-0.5):
    return PositionEmbeddingSine(DIM // 2, normalize=True, offset=offset)


def small_dino(
    learnt_init_query=True,
    num_proposals=None,
    look_forward_twice=True,
    two_stage_binary_cls=False,
    num_levels=4,
    **kwargs,
):
    torch.manual_seed(0)
    arguments = dict(num_queries=NUM_QUERIES, num_classes=NUM_CLASSES, embed_dim=DIM, dn_number=4, **STATS)
    arguments.update(
        backbone=TinyBackbone(),
        position_embedding=position_embedding(),
        neck=neck(num_levels),
        criterion=DINOCriterion(
            NUM_CLASSES, HungarianMatcher(2.0, 5.0, 2.0), WEIGHTS, two_stage_binary_cls=two_stage_binary_cls
        ),
    )
    arguments.update(kwargs)
    proposals = arguments["num_queries"] if num_proposals is None else num_proposals
    transformer = DINOTransformer(
        DINOTransformerEncoder(**SIZES, num_feature_levels=num_levels),
        DINOTransformerDecoder(
            **SIZES,
            num_feature_levels=num_levels,
            use_checkpoint=False,
            look_forward_twice=look_forward_twice,
        ),
        num_feature_levels=num_levels,
        two_stage_num_proposals=proposals,
        learnt_init_query=learnt_init_query,
    )
    return DINO(transformer=transformer, **arguments)


def small_deformable_detr(with_box_refine=False, as_two_stage=False, return_intermediate=True, **kwargs):
    torch.manual_seed(0)
    transformer = DeformableDetrTransformer(
        DeformableDetrTransformerEncoder(**SIZES),
        DeformableDetrTransformerDecoder(**SIZES, return_intermediate=return_intermediate),
        as_two_stage=as_two_stage,
        two_stage_num_proposals=NUM_QUERIES,
    )
    arguments = dict(num_queries=NUM_QUERIES, num_classes=NUM_CLASSES, embed_dim=DIM, **STATS)
    arguments.update(
        backbone=TinyBackbone(),
        position_embedding=position_embedding(),
        neck=neck(),
        criterion=DeformableCriterion(NUM_CLASSES, HungarianMatcher(2.0, 5.0, 2.0), WEIGHTS),
        with_box_refine=with_box_refine,
        as_two_stage=as_two_stage,
    )
    arguments.update(kwargs)
    return DeformableDETR(transformer=transformer, **arguments)


def small_detr(batch_first=False, **kwargs):
    torch.manual_seed(0)
    transformer = DetrTransformer(
        DetrTransformerEncoder(**SIZES, post_norm=False, batch_first=batch_first),
        DetrTransformerDecoder(**SIZES, batch_first=batch_first),
    )
    matcher = HungarianMatcher(1.0, 5.0, 2.0, cost_class_type="ce_cost")
    arguments = dict(num_queries=NUM_QUERIES, num_classes=NUM_CLASSES, embed_dim=DIM, **STATS)
    arguments.update(
        backbone=TinyBackbone(),
        in_features=["res5"],
        in_channels=16,
        position_embedding=position_embedding(0.0),
        criterion=SetCriterion(NUM_CLASSES, matcher, WEIGHTS, loss_class_type="ce_loss"),
    )
    arguments.update(kwargs)
    return DETR(transformer=transformer, **arguments)


MODELS = {
    "detr": small_detr,
    "deformable_detr": small_deformable_detr,
    "deformable_detr_refine": lambda **k: small_deformable_detr(with_box_refine=True, **k),
    "deformable_detr_two_stage": lambda **k: small_deformable_detr(True, True, **k),
    "dino": small_dino,
    "dino_without_learnt_queries": lambda **k: small_dino(learnt_init_query=False, **k),
}


def batch(counts=(3, 1), sizes=((64, 96), (80, 64)), seed=0):
    """Return a batch of images with `counts` objects; a count of None omits "instances"."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for count, (height, width) in zip(counts, sizes):
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        item = {"image": image, "height": 2 * height, "width": 2 * width}
        if count is not None:
            corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values
            boxes = corners.flatten(1) * torch.tensor([width, height, width, height])
            classes = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
            item["instances"] = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=classes)
        items.append(item)
    return items


def targets(counts=(3, 0, 1), seed=0, num_classes=NUM_CLASSES, dtype=torch.float32):
    """Return random targets, as `QueryDetector.prepare_targets` does."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for count in counts:
        corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values.to(dtype)
        center, size = corners.mean(1), corners[:, 1] - corners[:, 0]
        labels = torch.randint(0, num_classes, (count,), generator=generator)
        result.append({"labels": labels, "boxes": torch.cat([center, size], 1)})
    return result


def predictions(num_images=3, num_queries=6, num_logits=NUM_CLASSES, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_images, num_queries)
    logits = torch.randn(*shape, num_logits, generator=generator).to(dtype).requires_grad_()
    boxes = torch.rand(*shape, 4, generator=generator).to(dtype).mul(0.8).add(0.1).requires_grad_()
    return {"pred_logits": logits, "pred_boxes": boxes}
