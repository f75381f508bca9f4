"""Small models of every architecture, and batches with every key they may read."""

import torch

from detlib.modeling import FCOS, FPN, Backbone, MViT, SimpleFeaturePyramid, SwinTransformer, ViT, build_model
from detlib.modeling.backbone.fpn import LastLevelMaxPool
from detlib.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from detlib.modeling.meta_arch.fcos import FCOSHead
from detlib.structures import Boxes, Instances, Keypoints
from tests.builders import (
    BOTTLENECKS,
    FAST_RCNN,
    FASTER_RCNN,
    MASK_RCNN,
    NUM_CLASSES,
    ROTATED,
    RPN,
    ground_truth,
    random_image,
    rotated_ground_truth,
    small_config,
)

HEIGHT, WIDTH = 64, 96


INSTANCES = "COCO-InstanceSegmentation"


YAML = {
    "faster_rcnn": (FASTER_RCNN, {}),
    "mask_rcnn": (MASK_RCNN, {}),
    "giou": (f"{INSTANCES}/mask_rcnn_R_50_FPN_1x_giou.yaml", {}),
    "class_agnostic": ("Misc/mask_rcnn_R_50_FPN_1x_cls_agnostic.yaml", {}),
    "dc5": (f"{INSTANCES}/mask_rcnn_R_50_DC5_1x.yaml", BOTTLENECKS),
    "deformable": ("Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml", BOTTLENECKS),
    "modulated": (
        "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml",
        BOTTLENECKS | {"MODEL__RESNETS__DEFORM_MODULATED": True},
    ),
    "syncbn": (
        "Misc/mask_rcnn_R_50_FPN_3x_syncbn.yaml",
        {"MODEL__RESNETS__NORM": "SyncBN", "MODEL__ROI_BOX_HEAD__CONV_DIM": 16},
    ),
    "gn": (
        "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml",
        {"MODEL__ROI_BOX_HEAD__CONV_DIM": 32, "MODEL__ROI_MASK_HEAD__CONV_DIM": 32},
    ),
    "frozen": (
        MASK_RCNN,
        {"MODEL__RESNETS__NORM": "FrozenBN", "MODEL__BACKBONE__FREEZE_AT": 2},
    ),
    "sigmoid": (FASTER_RCNN, {"MODEL__ROI_BOX_HEAD__USE_SIGMOID_CE": True}),
    "rpn": (RPN, {}),
    "rpn_c4": ("COCO-Detection/rpn_R_50_C4_1x.yaml", BOTTLENECKS),
    "fast_rcnn": (FAST_RCNN, {}),
    "c4": (f"{INSTANCES}/mask_rcnn_R_50_C4_1x.yaml", BOTTLENECKS),
    "keypoint": (
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
        {"MODEL__ROI_KEYPOINT_HEAD__CONV_DIMS": (16, 16)},
    ),
    "cascade": ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", {}),
    "retinanet": ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", {"MODEL__RETINANET__PRIOR_PROB": 0.3}),
    "retinanet_bn": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        {"MODEL__RETINANET__PRIOR_PROB": 0.3, "MODEL__RETINANET__NORM": "BN"},
    ),
    "semantic": ("Misc/semantic_R_50_FPN_1x.yaml", {"MODEL__SEM_SEG_HEAD__CONVS_DIM": 32}),
    "panoptic": (
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml",
        {"MODEL__SEM_SEG_HEAD__CONVS_DIM": 32},
    ),
    "panoptic_cascade": (
        "Misc/panoptic_fpn_R_101_dconv_cascade_gn_3x.yaml",
        BOTTLENECKS | {"MODEL__SEM_SEG_HEAD__CONVS_DIM": 32, "MODEL__ROI_MASK_HEAD__CONV_DIM": 32},
    ),
    "rotated": (FASTER_RCNN, ROTATED),
}


def pyramid_on(bottom_up: Backbone) -> FPN:
    return FPN(bottom_up, list(bottom_up.output_shape()), 32, top_block=LastLevelMaxPool())


def regnet(se_ratio: float) -> Backbone:
    stages = RegNet(
        stem_class=SimpleStem,
        stem_width=16,
        block_class=ResBottleneckBlock,
        depth=5,
        w_a=16.0,
        w_0=16,
        w_m=1.5,
        group_width=8,
        se_ratio=se_ratio,
        norm="BN",
        out_features=["s1", "s2", "s3", "s4"],
    )
    return pyramid_on(stages)


def vit() -> Backbone:
    net = ViT(
        img_size=96,
        embed_dim=32,
        depth=3,
        num_heads=2,
        window_size=4,
        window_block_indexes=(0, 1),
        residual_block_indexes=(1,),
        use_rel_pos=True,
    )
    scales = (4.0, 2.0, 1.0, 0.5)
    return SimpleFeaturePyramid(
        net, "last_feat", 32, scales, top_block=LastLevelMaxPool(), norm="LN", square_pad=96
    )


def swin() -> Backbone:
    return pyramid_on(
        SwinTransformer(
            embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=4, drop_path_rate=0.0
        )
    )


def mvit() -> Backbone:
    return pyramid_on(
        MViT(img_size=96, embed_dim=16, depth=5, last_block_indexes=(0, 1, 2, 4), adaptive_window_size=8)
    )


# Backbones that only lazy configs have; they replace the backbone of a Mask R-CNN.
BACKBONES = {
    "regnetx": lambda: regnet(se_ratio=0.0),
    "regnety": lambda: regnet(se_ratio=0.25),
    "vit": vit,
    "swin": swin,
    "mvit": mvit,
}


ARCHITECTURES = [*YAML, *BACKBONES, "fcos"]


def fcos(backbone: Backbone) -> FCOS:
    features = ["p2", "p3", "p4", "p5"]
    shapes = [backbone.output_shape()[name] for name in features]
    return FCOS(
        backbone=backbone,
        head=FCOSHead(input_shape=shapes, num_classes=NUM_CLASSES, conv_dims=[32], norm="GN", prior_prob=0.3),
        head_in_features=features,
        num_classes=NUM_CLASSES,
        test_score_thresh=0.0,
        pixel_mean=[103.53, 116.28, 123.675],
        pixel_std=[57.375, 57.12, 58.395],
    )


def build_architecture(name: str, **overrides) -> torch.nn.Module:
    """Return the model `name` of `ARCHITECTURES`; `overrides` are config keys with "__" for the dots."""
    torch.manual_seed(0)
    config, own = YAML.get(name, (MASK_RCNN, {}))
    model = build_model(small_config(config, **{**own, **overrides}))
    if name in BACKBONES:
        model.backbone = BACKBONES[name]()
    return fcos(model.backbone) if name == "fcos" else model


def objects(name: str, is_empty: bool) -> Instances:
    """Return ground truth with masks and keypoints; rotated boxes and classes for "rotated"."""
    if name == "rotated":
        return rotated_ground_truth(boxes=()) if is_empty else rotated_ground_truth()
    out = ground_truth(boxes=()) if is_empty else ground_truth()
    points = torch.rand(len(out), 17, 3, generator=torch.Generator().manual_seed(0))
    boxes = out.gt_boxes.tensor[:, None]
    points[..., :2] = boxes[..., :2] + points[..., :2] * (boxes[..., 2:] - boxes[..., :2])
    points[..., 2] = 2  # visible
    out.gt_keypoints = Keypoints(points)
    return out


def architecture_batch(name: str, empty: tuple[bool, ...] = (False, False)) -> list[dict]:
    """Return one dict per image with every key a model may read; those marked empty have no objects."""
    regions = torch.tensor([[6.0, 6, 42, 38], [0, 0, 20, 30], [32, 20, 88, 60], [50, 5, 90, 25]])
    stripes = torch.arange(HEIGHT)[:, None].expand(HEIGHT, WIDTH) // 16
    return [
        {
            "image": random_image(HEIGHT, WIDTH, seed=seed),
            "instances": objects(name, is_empty),
            "proposals": Instances(
                (HEIGHT, WIDTH), proposal_boxes=Boxes(regions), objectness_logits=torch.arange(4.0)
            ),
            "sem_seg": torch.full_like(stripes, 255) if is_empty else stripes,
        }
        for seed, is_empty in enumerate(empty)
    ]


# So many that all are used and nothing is sampled at random.
ALL_SAMPLED = {"MODEL__RPN__BATCH_SIZE_PER_IMAGE": 100_000, "MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE": 10_000}
