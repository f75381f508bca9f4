"""Every config key with its default, but for those of `detlib.config.run_options`.

Lengths are in pixels of the image that enters the model (after resizing) unless a comment says otherwise. IoU
thresholds, scores and fractions are between 0 and 1.
"""

from typing import Any

from detlib.config.cfg_node import CfgNode
from detlib.config.run_options import yaml_defaults

__all__ = ["_C"]

# Keys of the run as a whole.
_RUN = {
    # Version of the names of the keys: raised when a key changes, see detlib.config.compat.
    "VERSION": 2,
    # Precision of float32 matrix products, for torch.set_float32_matmul_precision: "", "highest", "high",
    # "medium". "" leaves torch's own setting.
    "FLOAT32_PRECISION": "",
    # A number that code can read through `global_cfg` in short experiments; code that stays should not use
    # it.
    "GLOBAL": {"HACK": 1.0},
}

# Keys of data sets, loading and augmentation: DATASETS, DATALOADER, INPUT.
_DATA = {
    "DATASETS": {
        # Registered names or dataset URIs such as "dir:PATH@train"; docs/data.md lists them. Several are
        # concatenated for training and evaluated one by one.
        "TRAIN": (),
        "TEST": (),
        # With MODEL.LOAD_PROPOSALS: files with proposals, one for each data set of TRAIN and TEST, and how
        # many of the best of each image are used.
        "PROPOSAL_FILES_TRAIN": (),
        "PROPOSAL_FILES_TEST": (),
        "PRECOMPUTED_PROPOSAL_TOPK_TRAIN": 2000,
        "PRECOMPUTED_PROPOSAL_TOPK_TEST": 1000,
    },
    "DATALOADER": {
        # Worker processes of each training or test process; 0 loads in the process itself.
        "NUM_WORKERS": 4,
        # Whether a batch holds images of one orientation only (width > height, or not), which saves
        # padding.
        "ASPECT_RATIO_GROUPING": True,
        # Whether images without a usable annotation are left out of training.
        "FILTER_EMPTY_ANNOTATIONS": True,
        # How images are drawn: TrainingSampler (all, shuffled), RepeatFactorTrainingSampler (images with
        # rare categories more often), RandomSubsetTrainingSampler, ClassAwareTrainingSampler (each category
        # equally often), MultiDatasetTrainingSampler (each data set of DATASETS.TRAIN by its weight).
        "SAMPLER_TRAIN": "TrainingSampler",
        # For MultiDatasetTrainingSampler: a weight for each data set; () for equal ones.
        "DATASET_WEIGHTS": (),
        # For RepeatFactorTrainingSampler: categories in a smaller fraction of the images than this are
        # repeated, by threshold / fraction, or the square root of that (as in LVIS,
        # https://arxiv.org/abs/1908.03195).
        "REPEAT_THRESHOLD": 0.0,
        "REPEAT_SQRT": True,
    },
    "INPUT": {
        # Order of the channels the model gets: "BGR" or "RGB" (or another mode of PIL).
        "FORMAT": "BGR",
        # What decodes images: "pil", or "opencv", which is faster for JPEG (for RGB and BGR only).
        "DECODER": "pil",
        # The shorter side in training: one of these lengths ("choice"), or any length between two ("range").
        "MIN_SIZE_TRAIN": (800,),
        "MIN_SIZE_TRAIN_SAMPLING": "choice",
        # The longer side is at most this long; the shorter side gives way.
        "MAX_SIZE_TRAIN": 1333,
        # The same in testing. MIN_SIZE_TEST 0 leaves images at their size.
        "MIN_SIZE_TEST": 800,
        "MAX_SIZE_TEST": 1333,
        # Flips half of the training images: "horizontal", "vertical", "none".
        "RANDOM_FLIP": "horizontal",
        # Random crops in training. SIZE is (height, width), and TYPE says of what:
        # "relative" fractions of the image; "relative_range" fractions drawn between SIZE and 1;
        # "absolute" pixels; "absolute_range" pixels drawn between SIZE[0] and SIZE[1].
        "CROP": {"ENABLED": False, "TYPE": "relative_range", "SIZE": [0.9, 0.9]},
        # Large scale jitter, instead of MIN_SIZE_TRAIN and MAX_SIZE_TRAIN: the image is fitted into SIZE
        # (height, width) times a factor from SCALE, and cropped or padded to SIZE
        # (https://arxiv.org/abs/2012.07177).
        "LSJ": {"ENABLED": False, "SCALE": [0.1, 2.0], "SIZE": [1024, 1024]},
        # Random colors in training, each drawn from [1 - x, 1 + x] (HUE: [-x, x] of the circle, x <= 0.5).
        "COLOR_JITTER": {"BRIGHTNESS": 0.0, "CONTRAST": 0.0, "SATURATION": 0.0, "HUE": 0.0},
        # Probability that objects of another image are pasted into a training image (Simple Copy-Paste,
        # https://arxiv.org/abs/2012.07177; made for LSJ). With masks, MASK_FORMAT must be "bitmask".
        "COPY_PASTE": {"PROB": 0.0},
        # Probability that a training image is put together of four, on SIZE (height, width) pixels, before
        # it is augmented.
        "MOSAIC": {"PROB": 0.0, "SIZE": [640, 640]},
        # How masks are held: "polygon" (small, exact under scaling) or "bitmask" (needed for RLE
        # annotations).
        "MASK_FORMAT": "polygon",
    },
}

# Keys of backbones, within MODEL: BACKBONE, RESNETS, TIMM, TORCHVISION, FPN.
_BACKBONE = {
    "BACKBONE": {
        # A function or class of BACKBONE_REGISTRY.
        "NAME": "build_resnet_backbone",
        # Stages that do not train: 0 none, 1 the stem, 2 the stem and res2, ... 5 all. Their BatchNorm is
        # frozen too. Networks of timm and torchvision train all of theirs.
        "FREEZE_AT": 2,
    },
    "RESNETS": {
        # 18, 34, 50, 101 or 152 layers. 18 and 34 need RES2_OUT_CHANNELS 64.
        "DEPTH": 50,
        # Which outputs others may use: "stem", "res2" (stride 4) to "res5" (stride 32).
        "OUT_FEATURES": ["res4"],
        # Normalisation: "FrozenBN", "BN", "SyncBN", "GN", "LN", or "" for none.
        "NORM": "FrozenBN",
        # Channels of the stem and of res2; each later stage has twice as many as the one before.
        "STEM_OUT_CHANNELS": 64,
        "RES2_OUT_CHANNELS": 256,
        # Groups of the 3x3 convolution and channels of each in res2: 1 and 64 in ResNet, 32 and 8 in ResNeXt
        # 32x8d.
        "NUM_GROUPS": 1,
        "WIDTH_PER_GROUP": 64,
        # Which convolution of a bottleneck has the stride: the first 1x1 (weights of MSRA and Caffe2) or the
        # 3x3 (weights of torchvision and ResNeXt).
        "STRIDE_IN_1X1": True,
        # Dilation in res5: 2 keeps it at stride 16 (DC5 models).
        "RES5_DILATION": 1,
        # Deformable convolutions, for each of res2 to res5; MODULATED adds the masks of version 2.
        "DEFORM_ON_PER_STAGE": [False, False, False, False],
        "DEFORM_MODULATED": False,
        "DEFORM_NUM_GROUPS": 1,
    },
    # A network of timm, for BACKBONE.NAME "build_timm_backbone", "build_timm_fpn_backbone" and
    # "build_retinanet_timm_fpn_backbone". Its weights want INPUT.FORMAT "RGB", PIXEL_MEAN [123.675, 116.28,
    # 103.53] and PIXEL_STD [58.395, 57.12, 57.375] unless its page says otherwise.
    "TIMM": {
        # One of timm.list_models(), if need be with the tag of its weights: "resnet50.a1_in1k".
        "MODEL_NAME": "resnet50",
        # Whether to start from timm's weights, which come over the network unless they are in its cache.
        "PRETRAINED": False,
        # A file of timm's weights for this network, to start from without network. "" for none.
        "CHECKPOINT_PATH": "",
        # Which of its features to use, by number; number 1 is called "p1". Of a ResNet 1 has stride 4 and 4
        # has 32, of a ConvNeXt or Swin transformer 0 has 4 and 3 has 32.
        "OUT_INDICES": [1, 2, 3, 4],
        # "" for the network's own norms, "FrozenBN" or "SyncBN" to convert its batch norms; others are handed
        # to timm, whose ResNets take them.
        "NORM": "",
    },
    # A network of torchvision, for BACKBONE.NAME "build_torchvision_backbone",
    # "build_torchvision_fpn_backbone" and "build_retinanet_torchvision_fpn_backbone". Its weights want
    # images as those of timm do.
    "TORCHVISION": {
        # One of torchvision.models.list_models(torchvision.models).
        "MODEL_NAME": "resnet50",
        # Whether to start from torchvision's weights, which come over the network unless they are cached.
        "PRETRAINED": False,
        # Whose outputs to use, as torchvision's get_graph_node_names calls them, and what each is called
        # here.
        "RETURN_NODES": ["layer1", "layer2", "layer3", "layer4"],
        "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    },
    # Feature Pyramid Network, https://arxiv.org/abs/1612.03144.
    "FPN": {
        # Outputs of the bottom-up backbone that it builds on; "p2" comes from the one of stride 4, and so on.
        "IN_FEATURES": [],
        "OUT_CHANNELS": 256,
        # Normalisation as in RESNETS.NORM.
        "NORM": "",
        # How lateral and top-down features meet: "sum" or "avg".
        "FUSE_TYPE": "sum",
    },
}

# Keys of anchors and proposals, within MODEL: ANCHOR_GENERATOR, PROPOSAL_GENERATOR, RPN.
_PROPOSALS = {
    "ANCHOR_GENERATOR": {
        # A class of ANCHOR_GENERATOR_REGISTRY: DefaultAnchorGenerator or RotatedAnchorGenerator.
        "NAME": "DefaultAnchorGenerator",
        # Square roots of the areas of anchors in pixels: one list for each feature map, or one list for all
        # of them.
        "SIZES": [[32, 64, 128, 256, 512]],
        # Height over width of anchors; lists as in SIZES. Each size comes with each ratio.
        "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        # Degrees, counter-clockwise, for rotated anchors; lists as in SIZES.
        "ANGLES": [[-90, 0, 90]],
        # Where in its cell of the feature map an anchor has its center, as a fraction of the stride: 0 is the
        # corner, as most published models have it, 0.5 the middle.
        "OFFSET": 0.0,
    },
    "PROPOSAL_GENERATOR": {
        # A class of PROPOSAL_GENERATOR_REGISTRY: RPN, RRPN, or "PrecomputedProposals" for none.
        "NAME": "RPN",
        # Proposals with a side shorter than this many pixels are dropped, those of length 0 always.
        "MIN_SIZE": 0,
    },
    # Region Proposal Network, https://arxiv.org/abs/1506.01497.
    "RPN": {
        # A class of RPN_HEAD_REGISTRY, and the feature maps it looks at.
        "HEAD_NAME": "StandardRPNHead",
        "IN_FEATURES": ["res4"],
        # Output channels of the head's 3x3 convolutions; -1: as many as come in.
        "CONV_DIMS": [-1],
        # Anchors with an IoU below the first threshold are background (label 0), above the second foreground
        # (1); between them they are ignored (-1).
        "IOU_THRESHOLDS": [0.3, 0.7],
        "IOU_LABELS": [0, -1, 1],
        # In training, anchors that reach further than this many pixels out of the image are ignored; -1:
        # none.
        "BOUNDARY_THRESH": -1,
        # Anchors of each image that enter the loss, and at most which fraction of them is foreground.
        "BATCH_SIZE_PER_IMAGE": 256,
        "POSITIVE_FRACTION": 0.5,
        # Weights of (dx, dy, dw, dh) in the regression targets.
        "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
        # "smooth_l1", "giou", "diou" or "ciou"; BETA is where smooth L1 goes from square to straight, 0 is
        # plain L1.
        "BBOX_REG_LOSS_TYPE": "smooth_l1",
        "SMOOTH_L1_BETA": 0.0,
        # Factors of the regression loss, and of both losses of the RPN.
        "BBOX_REG_LOSS_WEIGHT": 1.0,
        "LOSS_WEIGHT": 1.0,
        # Candidates before NMS: the best of each feature map. After NMS: the best of each image, over all
        # maps.
        "PRE_NMS_TOPK_TRAIN": 12000,
        "PRE_NMS_TOPK_TEST": 6000,
        "POST_NMS_TOPK_TRAIN": 2000,
        "POST_NMS_TOPK_TEST": 1000,
        # Of two proposals with a higher IoU than this the one with the lower score is dropped.
        "NMS_THRESH": 0.7,
    },
}

# Keys of the second stage of R-CNN models, within MODEL: ROI_HEADS and one section for each head.
_ROI_HEADS = {
    "ROI_HEADS": {
        # A class of ROI_HEADS_REGISTRY: Res5ROIHeads (C4), StandardROIHeads, CascadeROIHeads, RROIHeads.
        "NAME": "Res5ROIHeads",
        # Categories, background not counted.
        "NUM_CLASSES": 80,
        # Feature maps that regions are pooled from. With several, the size of a region decides which.
        "IN_FEATURES": ["res4"],
        # Proposals with an IoU of at least the threshold are foreground (label 1), the others background (0).
        "IOU_THRESHOLDS": [0.5],
        "IOU_LABELS": [0, 1],
        # Proposals of each image that enter the loss, and at most which fraction of them is foreground.
        "BATCH_SIZE_PER_IMAGE": 512,
        "POSITIVE_FRACTION": 0.25,
        # Whether ground truth joins the proposals in training, which guarantees some foreground.
        "PROPOSAL_APPEND_GT": True,
        # Detections below this score are dropped, then those with a higher IoU than NMS_THRESH_TEST with a
        # better one of their class. The COCO metric gains from a low score; images want a higher one.
        "SCORE_THRESH_TEST": 0.05,
        "NMS_THRESH_TEST": 0.5,
    },
    "ROI_BOX_HEAD": {
        # A class of ROI_BOX_HEAD_REGISTRY such as FastRCNNConvFCHead: NUM_CONV 3x3 convolutions of CONV_DIM
        # channels, then NUM_FC linear layers of FC_DIM.
        "NAME": "",
        "NUM_CONV": 0,
        "CONV_DIM": 256,
        "NUM_FC": 0,
        "FC_DIM": 1024,
        # Normalisation of the convolutions: "", "GN", "SyncBN", ...
        "NORM": "",
        # Side of the pooled square in cells; samples a cell along each side (0: as many as it has pixels);
        # and the pooling: ROIAlignV2 (half-pixel exact), ROIAlign (older), ROIPool, ROIAlignRotated.
        "POOLER_RESOLUTION": 14,
        "POOLER_SAMPLING_RATIO": 0,
        "POOLER_TYPE": "ROIAlignV2",
        # One box for all classes in place of one for each.
        "CLS_AGNOSTIC_BBOX_REG": False,
        # Weights of (dx, dy, dw, dh) in the regression targets.
        "BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
        # As in RPN.
        "BBOX_REG_LOSS_TYPE": "smooth_l1",
        "BBOX_REG_LOSS_WEIGHT": 1.0,
        "SMOOTH_L1_BETA": 0.0,
        # Whether later heads train on the boxes that this one predicts, not on the proposals.
        "TRAIN_ON_PRED_BOXES": False,
        # Sigmoid (one yes or no for each class) in place of softmax cross entropy.
        "USE_SIGMOID_CE": False,
        # Federated loss of CenterNet2 (https://arxiv.org/abs/2103.07461), for LVIS: classes in each loss, and
        # the power of the number of images of a class by which the others are drawn. Needs USE_SIGMOID_CE.
        "USE_FED_LOSS": False,
        "FED_LOSS_NUM_CLASSES": 50,
        "FED_LOSS_FREQ_WEIGHT_POWER": 0.5,
    },
    # Cascade R-CNN, https://arxiv.org/abs/1712.00726; the first stage has the IoU of
    # ROI_HEADS.IOU_THRESHOLDS.
    "ROI_BOX_CASCADE_HEAD": {
        # For each stage: its foreground threshold and its regression weights.
        "IOUS": (0.5, 0.6, 0.7),
        "BBOX_REG_WEIGHTS": (
            (10.0, 10.0, 5.0, 5.0),
            (20.0, 20.0, 10.0, 10.0),
            (30.0, 30.0, 15.0, 15.0),
        ),
    },
    "ROI_MASK_HEAD": {
        # A class of ROI_MASK_HEAD_REGISTRY: NUM_CONV 3x3 convolutions of CONV_DIM channels before the
        # upsampling.
        "NAME": "MaskRCNNConvUpsampleHead",
        "NUM_CONV": 0,
        "CONV_DIM": 256,
        "NORM": "",
        # As in ROI_BOX_HEAD. The predicted mask is twice as large as POOLER_RESOLUTION.
        "POOLER_RESOLUTION": 14,
        "POOLER_SAMPLING_RATIO": 0,
        "POOLER_TYPE": "ROIAlignV2",
        # One mask for all classes in place of one for each.
        "CLS_AGNOSTIC_MASK": False,
    },
    "ROI_KEYPOINT_HEAD": {
        # A class of ROI_KEYPOINT_HEAD_REGISTRY, with 3x3 convolutions of these channels.
        "NAME": "KRCNNConvDeconvUpsampleHead",
        "CONV_DIMS": (512, 512, 512, 512, 512, 512, 512, 512),
        # Keypoints of an instance; 17 in COCO.
        "NUM_KEYPOINTS": 17,
        # As in ROI_BOX_HEAD.
        "POOLER_RESOLUTION": 14,
        "POOLER_SAMPLING_RATIO": 0,
        "POOLER_TYPE": "ROIAlignV2",
        # Training images with fewer visible keypoints are left out.
        "MIN_KEYPOINTS_PER_IMAGE": 1,
        # Whether the loss is divided by the visible keypoints, or by as many as a full batch could have.
        "NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": True,
        "LOSS_WEIGHT": 1.0,
    },
}

# Keys of one-stage and segmentation models, within MODEL: RETINANET, SEM_SEG_HEAD, PANOPTIC_FPN.
_DENSE_HEADS = {
    # RetinaNet, https://arxiv.org/abs/1708.02002.
    "RETINANET": {
        # Categories, background not counted.
        "NUM_CLASSES": 80,
        "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
        # Convolutions before the predictions, and their normalisation; "BN" and "SyncBN" keep apart the
        # levels.
        "NUM_CONVS": 4,
        "NORM": "",
        # Anchors with an IoU below the first threshold are background (label 0), above the second foreground
        # (1); between them they are ignored (-1).
        "IOU_THRESHOLDS": [0.4, 0.5],
        "IOU_LABELS": [0, -1, 1],
        # Score of every anchor at the start: the bias of the classification is set so.
        "PRIOR_PROB": 0.01,
        "FOCAL_LOSS_ALPHA": 0.25,
        "FOCAL_LOSS_GAMMA": 2.0,
        # Weights of (dx, dy, dw, dh) in the regression targets, and the loss as in RPN.
        "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
        "BBOX_REG_LOSS_TYPE": "smooth_l1",
        "SMOOTH_L1_LOSS_BETA": 0.1,
        # Candidates: the best of each level, with at least this score; then NMS within each class.
        "TOPK_CANDIDATES_TEST": 1000,
        "SCORE_THRESH_TEST": 0.05,
        "NMS_THRESH_TEST": 0.5,
    },
    # Semantic segmentation on FPN, https://arxiv.org/abs/1901.02446.
    "SEM_SEG_HEAD": {
        # A class of SEM_SEG_HEADS_REGISTRY, and the feature maps it looks at.
        "NAME": "SemSegFPNHead",
        "IN_FEATURES": ["p2", "p3", "p4", "p5"],
        # Categories, and the value of pixels that have none and enter no loss.
        "NUM_CLASSES": 54,
        "IGNORE_VALUE": 255,
        # Channels of the convolutions, their normalisation, and the stride at which the maps are added up.
        "CONVS_DIM": 128,
        "NORM": "GN",
        "COMMON_STRIDE": 4,
        "LOSS_WEIGHT": 1.0,
    },
    # Panoptic FPN, same paper.
    "PANOPTIC_FPN": {
        # Factor of all losses of detection and masks, against that of semantic segmentation.
        "INSTANCE_LOSS_WEIGHT": 1.0,
        # Merging instances and stuff into one image. By falling score, instances below the confidence are
        # dropped, and those of which a larger fraction than the overlap is covered already; stuff of fewer
        # pixels goes as well.
        "COMBINE": {
            "ENABLED": True,
            "INSTANCES_CONFIDENCE_THRESH": 0.5,
            "OVERLAP_THRESH": 0.5,
            "STUFF_AREA_LIMIT": 4096,
        },
    },
}

# Keys of the optimiser and its schedule: SOLVER. Iterations count optimiser steps from 0.
_SOLVER = {
    # With N > 0 the config is meant for N processes: started with another number, batch, learning rate and
    # schedule are scaled to it (see DefaultTrainer.auto_scale_workers). 0: never.
    "REFERENCE_WORLD_SIZE": 0,
    # A name of detlib.solver: WarmupMultiStepLR, WarmupCosineLR, WarmupStepWithFixedGammaLR.
    "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "BASE_LR": 0.001,
    # Where WarmupCosineLR ends.
    "BASE_LR_END": 0.0,
    # At these iterations the rate is multiplied by GAMMA (WarmupMultiStepLR).
    "STEPS": (30000,),
    "GAMMA": 0.1,
    # How often WarmupStepWithFixedGammaLR multiplies by GAMMA, evenly over the run.
    "NUM_DECAYS": 3,
    # The rate rises from BASE_LR * WARMUP_FACTOR within WARMUP_ITERS iterations: "linear", or "constant" and
    # then a jump.
    "WARMUP_FACTOR": 1.0 / 1000,
    "WARMUP_ITERS": 1000,
    "WARMUP_METHOD": "linear",
    # Whether the schedule's whole course is squeezed into what the warm-up leaves, or the warm-up covers its
    # start.
    "RESCALE_INTERVAL": False,
    # "SGD", with momentum, or "AdamW".
    "OPTIMIZER": "SGD",
    # AdamW's decay of the averages of the gradient and of its square.
    "BETAS": (0.9, 0.999),
    # Of stochastic gradient descent.
    "MOMENTUM": 0.9,
    "NESTEROV": False,
    # Weight decay in general, of normalisation layers, and of biases (None: as in general).
    "WEIGHT_DECAY": 0.0001,
    "WEIGHT_DECAY_NORM": 0.0,
    "WEIGHT_DECAY_BIAS": None,
    # Factor of the learning rate of biases.
    "BIAS_LR_FACTOR": 1.0,
    # Factors of the learning rate by parameter name, as [pattern, factor] with * and ?:
    # [["backbone.*", 0.1]]. The first pattern that fits counts.
    "LR_FACTORS": [],
    # Factor of the learning rate from one block of a plain ViT backbone to the one below it.
    "LAYER_DECAY": 1.0,
    # Gradients of each parameter: "value" cuts every element to +-CLIP_VALUE, "norm" scales the NORM_TYPE
    # norm down to it, "full_model" the norm of all parameters together.
    "CLIP_GRADIENTS": {
        "ENABLED": False,
        "CLIP_TYPE": "value",
        "CLIP_VALUE": 1.0,
        "NORM_TYPE": 2.0,
    },
}

# Keys of evaluation: TEST.
_TEST = {
    # Detections kept for each image, best first.
    "DETECTIONS_PER_IMAGE": 100,
    # Results that a run must reach, as [task, metric, value, tolerance]: [["bbox", "AP", 38.5, 0.2]]. Used by
    # tests.
    "EXPECTED_RESULTS": [],
    # Width of each keypoint in the keypoint metric; []: those of COCO, which has 17.
    "KEYPOINT_OKS_SIGMAS": [],
    # Test-time augmentation: shorter sides, the limit of the longer side, and whether each is flipped too.
    "AUG": {
        "ENABLED": False,
        "MIN_SIZES": (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
        "MAX_SIZE": 4000,
        "FLIP": True,
    },
}

_MODEL = {
    # Which model class of META_ARCH_REGISTRY to build: GeneralizedRCNN, ProposalNetwork, RetinaNet,
    # SemanticSegmentor, PanopticFPN.
    "META_ARCHITECTURE": "GeneralizedRCNN",
    # Whether R-CNN models predict masks, and whether they predict keypoints.
    "MASK_ON": False,
    "KEYPOINT_ON": False,
    # Whether to read proposals from files (DATASETS.PROPOSAL_FILES_*) in place of computing them.
    "LOAD_PROPOSALS": False,
    # What is subtracted from each channel and what it is divided by, in the order of INPUT.FORMAT, on the
    # 0..255 scale. The defaults are ImageNet's means in BGR; weights converted from Caffe2 have their
    # deviations inside and need ones, weights of torchvision need [57.375, 57.120, 58.395] (BGR) or its
    # reverse (RGB).
    "PIXEL_MEAN": [103.530, 116.280, 123.675],
    "PIXEL_STD": [1.0, 1.0, 1.0],
    **_BACKBONE,
    **_PROPOSALS,
    **_ROI_HEADS,
    **_DENSE_HEADS,
}

_DEFAULTS = {**_RUN, **_DATA, "MODEL": _MODEL, "SOLVER": _SOLVER, "TEST": _TEST}
# The options of a training run (OUTPUT_DIR, SOLVER.MAX_ITER, TRAIN.* and others) are declared elsewhere.
for _key, _default in yaml_defaults().items():
    *_parents, _name = _key.split(".")
    _node: dict[str, Any] = _DEFAULTS
    for _parent in _parents:
        _node = _node.setdefault(_parent, {})
    _node[_name] = _default

_C = CfgNode(_DEFAULTS)
