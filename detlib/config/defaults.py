"""Config keys and their defaults, except for the options in `detlib.config.run_options`.

Lengths are in pixels of the resized image, which is the model's input, unless a comment states otherwise. IoU
thresholds, scores and fractions are in [0, 1].
"""

from typing import Any

from detlib.config.cfg_node import CfgNode
from detlib.config.run_options import yaml_defaults

__all__ = ["_C"]

# Keys of the run in general.
_RUN = {
    # Version of the key names. It is incremented when a key changes; see detlib.config.compat.
    "VERSION": 2,
    # Precision of float32 matrix products, for torch.set_float32_matmul_precision: "", "highest", "high",
    # "medium". "" keeps PyTorch's setting.
    "FLOAT32_PRECISION": "",
    # A number that code can read from `global_cfg` in short experiments. Permanent code should not use it.
    "GLOBAL": {"HACK": 1.0},
}

# Keys of datasets, loading and augmentation: DATASETS, DATALOADER, INPUT.
_DATA = {
    "DATASETS": {
        # Registered names or dataset URIs such as "dir:PATH@train"; docs/data.md lists them. Multiple
        # datasets are concatenated for training and evaluated one by one.
        "TRAIN": (),
        "TEST": (),
        # With MODEL.LOAD_PROPOSALS: proposal files, one for each dataset of TRAIN and TEST, and the number of
        # top-scoring proposals of each image that are used.
        "PROPOSAL_FILES_TRAIN": (),
        "PROPOSAL_FILES_TEST": (),
        "PRECOMPUTED_PROPOSAL_TOPK_TRAIN": 2000,
        "PRECOMPUTED_PROPOSAL_TOPK_TEST": 1000,
    },
    "DATALOADER": {
        # Worker processes of each training or test process; 0 loads in that process itself.
        "NUM_WORKERS": 4,
        # Whether all images of a batch have the same orientation (landscape or portrait), which saves
        # padding.
        "ASPECT_RATIO_GROUPING": True,
        # Whether images without a valid annotation are excluded from training.
        "FILTER_EMPTY_ANNOTATIONS": True,
        # How images are sampled: TrainingSampler (all, shuffled), RepeatFactorTrainingSampler (images with
        # rare categories more often), RandomSubsetTrainingSampler, ClassAwareTrainingSampler (each category
        # equally often), MultiDatasetTrainingSampler (each dataset of DATASETS.TRAIN by its weight).
        "SAMPLER_TRAIN": "TrainingSampler",
        # For MultiDatasetTrainingSampler: a weight for each dataset; () for equal weights.
        "DATASET_WEIGHTS": (),
        # For RepeatFactorTrainingSampler: categories that appear in a smaller fraction of the images than
        # this threshold are repeated threshold / fraction times, or the square root of it with REPEAT_SQRT
        # (as in LVIS, https://arxiv.org/abs/1908.03195).
        "REPEAT_THRESHOLD": 0.0,
        "REPEAT_SQRT": True,
    },
    "INPUT": {
        # Channel order of the model's input: "BGR" or "RGB" (or another mode of PIL).
        "FORMAT": "BGR",
        # Image decoder: "pil", or "opencv", which is faster for JPEG (only for RGB and BGR).
        "DECODER": "pil",
        # The shorter side in training: one of these lengths ("choice"), or any length between two ("range").
        "MIN_SIZE_TRAIN": (800,),
        "MIN_SIZE_TRAIN_SAMPLING": "choice",
        # Maximum length of the longer side. It takes precedence over the length of the shorter side.
        "MAX_SIZE_TRAIN": 1333,
        # The same for testing. MIN_SIZE_TEST 0 keeps the original size.
        "MIN_SIZE_TEST": 800,
        "MAX_SIZE_TEST": 1333,
        # Random flip of half of the training images: "horizontal", "vertical", "none".
        "RANDOM_FLIP": "horizontal",
        # Random crop in training. The meaning of SIZE (height, width) depends on TYPE:
        # "relative": fractions of the image; "relative_range": fractions drawn between SIZE and 1;
        # "absolute": pixels; "absolute_range": pixels drawn between SIZE[0] and SIZE[1].
        "CROP": {"ENABLED": False, "TYPE": "relative_range", "SIZE": [0.9, 0.9]},
        # Large-scale jitter, instead of MIN_SIZE_TRAIN and MAX_SIZE_TRAIN: the image is resized to fit into
        # SIZE (height, width) times a random factor in SCALE, and cropped or padded to SIZE
        # (https://arxiv.org/abs/2012.07177).
        "LSJ": {"ENABLED": False, "SCALE": [0.1, 2.0], "SIZE": [1024, 1024]},
        # Color jitter in training. Factors are drawn from [1 - x, 1 + x]; HUE is shifted by [-x, x] of the
        # color circle, x <= 0.5.
        "COLOR_JITTER": {"BRIGHTNESS": 0.0, "CONTRAST": 0.0, "SATURATION": 0.0, "HUE": 0.0},
        # Probability that objects of another image are pasted into a training image (Simple Copy-Paste,
        # https://arxiv.org/abs/2012.07177; meant for LSJ). With masks, MASK_FORMAT must be "bitmask".
        "COPY_PASTE": {"PROB": 0.0},
        # Probability that a training image is a mosaic of four images, of SIZE (height, width) in pixels. It
        # is built before augmentation.
        "MOSAIC": {"PROB": 0.0, "SIZE": [640, 640]},
        # Representation of masks: "polygon" (small, exact under scaling) or "bitmask" (required for RLE
        # annotations).
        "MASK_FORMAT": "polygon",
    },
}

# Keys of backbones, in MODEL: BACKBONE, RESNETS, TIMM, TORCHVISION, FPN.
_BACKBONE = {
    "BACKBONE": {
        # A function or class of BACKBONE_REGISTRY.
        "NAME": "build_resnet_backbone",
        # Number of frozen stages: 0 none, 1 the stem, 2 the stem and res2, ... 5 all. Their BatchNorm is
        # frozen too. This has no effect on networks of timm and torchvision.
        "FREEZE_AT": 2,
    },
    "RESNETS": {
        # 18, 34, 50, 101 or 152 layers. 18 and 34 require RES2_OUT_CHANNELS 64.
        "DEPTH": 50,
        # Output feature maps: "stem", "res2" (stride 4) to "res5" (stride 32).
        "OUT_FEATURES": ["res4"],
        # Normalization: "FrozenBN", "BN", "SyncBN", "GN", "LN", or "" for none.
        "NORM": "FrozenBN",
        # Output channels of the stem and of res2. Each later stage doubles the number of channels.
        "STEM_OUT_CHANNELS": 64,
        "RES2_OUT_CHANNELS": 256,
        # Groups of the 3x3 convolution and channels per group in res2: 1 and 64 in ResNet, 32 and 8 in
        # ResNeXt 32x8d.
        "NUM_GROUPS": 1,
        "WIDTH_PER_GROUP": 64,
        # Whether the stride of a bottleneck is in its first 1x1 convolution (weights of MSRA and Caffe2) or
        # in the 3x3 convolution (weights of torchvision and ResNeXt).
        "STRIDE_IN_1X1": True,
        # Dilation in res5; 2 keeps res5 at stride 16 (DC5 models).
        "RES5_DILATION": 1,
        # Deformable convolutions in each of res2 to res5. MODULATED adds the modulation masks of DCNv2.
        "DEFORM_ON_PER_STAGE": [False, False, False, False],
        "DEFORM_MODULATED": False,
        "DEFORM_NUM_GROUPS": 1,
    },
    # A network of timm, for BACKBONE.NAME "build_timm_backbone", "build_timm_fpn_backbone" and
    # "build_retinanet_timm_fpn_backbone". Its weights expect INPUT.FORMAT "RGB", PIXEL_MEAN [123.675, 116.28,
    # 103.53] and PIXEL_STD [58.395, 57.12, 57.375], unless its model card states otherwise.
    "TIMM": {
        # A name in timm.list_models(), optionally with the tag of its weights: "resnet50.a1_in1k".
        "MODEL_NAME": "resnet50",
        # Whether to start from timm's weights, which are downloaded unless they are cached.
        "PRETRAINED": False,
        # A file with timm's weights for this network, to start from without a download. "" for none.
        "CHECKPOINT_PATH": "",
        # Indices of the output feature maps; index 1 is named "p1". In a ResNet, index 1 has stride 4 and
        # index 4 has stride 32. In a ConvNeXt or Swin transformer, index 0 has stride 4 and index 3 has
        # stride 32.
        "OUT_INDICES": [1, 2, 3, 4],
        # "" keeps the normalization layers of the network, "FrozenBN" or "SyncBN" converts its batch norms.
        # Other values are passed to timm, which supports them for ResNets.
        "NORM": "",
    },
    # A network of torchvision, for BACKBONE.NAME "build_torchvision_backbone",
    # "build_torchvision_fpn_backbone" and "build_retinanet_torchvision_fpn_backbone". Its weights expect the
    # same images as those of timm.
    "TORCHVISION": {
        # A name in torchvision.models.list_models(torchvision.models).
        "MODEL_NAME": "resnet50",
        # Whether to start from torchvision's weights, which are downloaded unless they are cached.
        "PRETRAINED": False,
        # Nodes that the output feature maps come from, by their names in torchvision's get_graph_node_names,
        # and the names of the feature maps.
        "RETURN_NODES": ["layer1", "layer2", "layer3", "layer4"],
        "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    },
    # Feature Pyramid Network, https://arxiv.org/abs/1612.03144.
    "FPN": {
        # Input feature maps from the bottom-up backbone. "p2" is built from the one of stride 4, and so on.
        "IN_FEATURES": [],
        "OUT_CHANNELS": 256,
        # Normalization as in RESNETS.NORM.
        "NORM": "",
        # How lateral and top-down features are combined: "sum" or "avg".
        "FUSE_TYPE": "sum",
    },
}

# Keys of anchors and proposals, in MODEL: ANCHOR_GENERATOR, PROPOSAL_GENERATOR, RPN.
_PROPOSALS = {
    "ANCHOR_GENERATOR": {
        # A class of ANCHOR_GENERATOR_REGISTRY: DefaultAnchorGenerator or RotatedAnchorGenerator.
        "NAME": "DefaultAnchorGenerator",
        # Square root of the anchor area in pixels: one list for each feature map, or one list for all of
        # them.
        "SIZES": [[32, 64, 128, 256, 512]],
        # Ratio of height to width, as lists like SIZES. Each size is combined with each ratio.
        "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        # Angles of rotated anchors in degrees, counter-clockwise, as lists like SIZES.
        "ANGLES": [[-90, 0, 90]],
        # Offset of the anchor center in its cell of the feature map, as a fraction of the stride: 0 is the
        # top left corner, which most published models use, 0.5 the center of the cell.
        "OFFSET": 0.0,
    },
    "PROPOSAL_GENERATOR": {
        # A class of PROPOSAL_GENERATOR_REGISTRY (RPN, RRPN), or "PrecomputedProposals" for none.
        "NAME": "RPN",
        # Proposals with a side shorter than this many pixels are dropped. Empty ones are always dropped.
        "MIN_SIZE": 0,
    },
    # Region Proposal Network, https://arxiv.org/abs/1506.01497.
    "RPN": {
        # A class of RPN_HEAD_REGISTRY, and its input feature maps.
        "HEAD_NAME": "StandardRPNHead",
        "IN_FEATURES": ["res4"],
        # Output channels of the head's 3x3 convolutions; -1 keeps the number of input channels.
        "CONV_DIMS": [-1],
        # Anchors with an IoU below the first threshold are background (label 0), those above the second are
        # foreground (1), and those in between are ignored (-1).
        "IOU_THRESHOLDS": [0.3, 0.7],
        "IOU_LABELS": [0, -1, 1],
        # In training, anchors that extend beyond the image by more than this many pixels are ignored; -1
        # ignores none.
        "BOUNDARY_THRESH": -1,
        # Number of anchors per image in the loss, and the maximum fraction of foreground among them.
        "BATCH_SIZE_PER_IMAGE": 256,
        "POSITIVE_FRACTION": 0.5,
        # Weights of (dx, dy, dw, dh) in the regression targets.
        "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
        # "smooth_l1", "giou", "diou" or "ciou". BETA is the error at which smooth L1 changes from quadratic
        # to linear; 0 is plain L1.
        "BBOX_REG_LOSS_TYPE": "smooth_l1",
        "SMOOTH_L1_BETA": 0.0,
        # Weight of the regression loss, and of both losses of the RPN.
        "BBOX_REG_LOSS_WEIGHT": 1.0,
        "LOSS_WEIGHT": 1.0,
        # Number of top-scoring proposals of each feature map before NMS, and of each image after NMS.
        "PRE_NMS_TOPK_TRAIN": 12000,
        "PRE_NMS_TOPK_TEST": 6000,
        "POST_NMS_TOPK_TRAIN": 2000,
        "POST_NMS_TOPK_TEST": 1000,
        # IoU threshold of NMS: of two proposals with a higher IoU, the one with the lower score is dropped.
        "NMS_THRESH": 0.7,
    },
}

# Keys of the second stage of R-CNN models, in MODEL: ROI_HEADS and one section for each head.
_ROI_HEADS = {
    "ROI_HEADS": {
        # A class of ROI_HEADS_REGISTRY: Res5ROIHeads (C4), StandardROIHeads, CascadeROIHeads, RROIHeads.
        "NAME": "Res5ROIHeads",
        # Number of categories, without background.
        "NUM_CLASSES": 80,
        # Feature maps to pool regions from. With more than one, the level depends on the size of the region.
        "IN_FEATURES": ["res4"],
        # Proposals with an IoU of at least the threshold are foreground (label 1), the others background (0).
        "IOU_THRESHOLDS": [0.5],
        "IOU_LABELS": [0, 1],
        # Number of proposals per image in the loss, and the maximum fraction of foreground among them.
        "BATCH_SIZE_PER_IMAGE": 512,
        "POSITIVE_FRACTION": 0.25,
        # Whether ground truth boxes are added to the proposals in training, so that there is some foreground.
        "PROPOSAL_APPEND_GT": True,
        # Detections with a lower score are dropped. Then NMS drops those with a higher IoU than
        # NMS_THRESH_TEST with a higher-scoring detection of the same class. A low score threshold improves
        # COCO AP; use a higher one for visualization.
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
        # Normalization of the convolutions: "", "GN", "SyncBN", ...
        "NORM": "",
        # Height and width of the pooled features; sampling points per bin along each side (0: adapted to the
        # size of the bin); and the pooling: ROIAlignV2 (half-pixel exact), ROIAlign (older), ROIPool,
        # ROIAlignRotated.
        "POOLER_RESOLUTION": 14,
        "POOLER_SAMPLING_RATIO": 0,
        "POOLER_TYPE": "ROIAlignV2",
        # Whether to predict one box for all classes instead of one per class.
        "CLS_AGNOSTIC_BBOX_REG": False,
        # Weights of (dx, dy, dw, dh) in the regression targets.
        "BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
        # As in RPN.
        "BBOX_REG_LOSS_TYPE": "smooth_l1",
        "BBOX_REG_LOSS_WEIGHT": 1.0,
        "SMOOTH_L1_BETA": 0.0,
        # Whether mask and keypoint heads train on the boxes that this head predicts, instead of the
        # proposals.
        "TRAIN_ON_PRED_BOXES": False,
        # Whether to use binary cross entropy per class (sigmoid) instead of softmax cross entropy.
        "USE_SIGMOID_CE": False,
        # Federated loss of CenterNet2 (https://arxiv.org/abs/2103.07461), for LVIS. FED_LOSS_NUM_CLASSES is
        # the number of classes in each loss. Negative classes are sampled with probability proportional to
        # their number of images to the power of FED_LOSS_FREQ_WEIGHT_POWER. Requires USE_SIGMOID_CE.
        "USE_FED_LOSS": False,
        "FED_LOSS_NUM_CLASSES": 50,
        "FED_LOSS_FREQ_WEIGHT_POWER": 0.5,
    },
    # Cascade R-CNN, https://arxiv.org/abs/1712.00726. The IoU of the first stage must be
    # ROI_HEADS.IOU_THRESHOLDS.
    "ROI_BOX_CASCADE_HEAD": {
        # Foreground IoU threshold and regression weights of each stage.
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
        # As in ROI_BOX_HEAD. The side of the predicted mask is twice POOLER_RESOLUTION.
        "POOLER_RESOLUTION": 14,
        "POOLER_SAMPLING_RATIO": 0,
        "POOLER_TYPE": "ROIAlignV2",
        # Whether to predict one mask for all classes instead of one per class.
        "CLS_AGNOSTIC_MASK": False,
    },
    "ROI_KEYPOINT_HEAD": {
        # A class of ROI_KEYPOINT_HEAD_REGISTRY, with 3x3 convolutions of these channels.
        "NAME": "KRCNNConvDeconvUpsampleHead",
        "CONV_DIMS": (512, 512, 512, 512, 512, 512, 512, 512),
        # Number of keypoints of an instance; 17 in COCO.
        "NUM_KEYPOINTS": 17,
        # As in ROI_BOX_HEAD.
        "POOLER_RESOLUTION": 14,
        "POOLER_SAMPLING_RATIO": 0,
        "POOLER_TYPE": "ROIAlignV2",
        # Training images with fewer visible keypoints are excluded.
        "MIN_KEYPOINTS_PER_IMAGE": 1,
        # Whether the loss is normalized by the number of visible keypoints, or by the number of keypoints
        # that a full batch could have.
        "NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": True,
        "LOSS_WEIGHT": 1.0,
    },
}

# Keys of one-stage and segmentation models, in MODEL: RETINANET, SEM_SEG_HEAD, PANOPTIC_FPN.
_DENSE_HEADS = {
    # RetinaNet, https://arxiv.org/abs/1708.02002.
    "RETINANET": {
        # Number of categories, without background.
        "NUM_CLASSES": 80,
        "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
        # Number of convolutions before the predictions, and their normalization. "BN" and "SyncBN" have
        # separate layers for each level.
        "NUM_CONVS": 4,
        "NORM": "",
        # Anchors with an IoU below the first threshold are background (label 0), those above the second are
        # foreground (1), and those in between are ignored (-1).
        "IOU_THRESHOLDS": [0.4, 0.5],
        "IOU_LABELS": [0, -1, 1],
        # Initial score of every anchor, by which the bias of the classifier is initialized.
        "PRIOR_PROB": 0.01,
        "FOCAL_LOSS_ALPHA": 0.25,
        "FOCAL_LOSS_GAMMA": 2.0,
        # Weights of (dx, dy, dw, dh) in the regression targets, and the loss as in RPN.
        "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
        "BBOX_REG_LOSS_TYPE": "smooth_l1",
        "SMOOTH_L1_LOSS_BETA": 0.1,
        # Number of top-scoring candidates of each level, their minimum score, and the IoU threshold of NMS in
        # each class.
        "TOPK_CANDIDATES_TEST": 1000,
        "SCORE_THRESH_TEST": 0.05,
        "NMS_THRESH_TEST": 0.5,
    },
    # Semantic segmentation on FPN, https://arxiv.org/abs/1901.02446.
    "SEM_SEG_HEAD": {
        # A class of SEM_SEG_HEADS_REGISTRY, and its input feature maps.
        "NAME": "SemSegFPNHead",
        "IN_FEATURES": ["p2", "p3", "p4", "p5"],
        # Number of categories, and the label of pixels without a category, which the loss ignores.
        "NUM_CLASSES": 54,
        "IGNORE_VALUE": 255,
        # Channels of the convolutions, their normalization, and the stride at which the feature maps are
        # summed.
        "CONVS_DIM": 128,
        "NORM": "GN",
        "COMMON_STRIDE": 4,
        "LOSS_WEIGHT": 1.0,
    },
    # Panoptic FPN, same paper.
    "PANOPTIC_FPN": {
        # Weight of all detection and mask losses, relative to that of semantic segmentation.
        "INSTANCE_LOSS_WEIGHT": 1.0,
        # Merging of instances and stuff into one panoptic segmentation. Instances are added in descending
        # score order. Those with a score below INSTANCES_CONFIDENCE_THRESH are dropped, as are those with
        # more than OVERLAP_THRESH of their area already covered. Stuff segments of fewer than
        # STUFF_AREA_LIMIT pixels are dropped as well.
        "COMBINE": {
            "ENABLED": True,
            "INSTANCES_CONFIDENCE_THRESH": 0.5,
            "OVERLAP_THRESH": 0.5,
            "STUFF_AREA_LIMIT": 4096,
        },
    },
}

# Keys of the optimizer and its schedule: SOLVER. Iterations are optimizer steps, counted from 0.
_SOLVER = {
    # The number of processes that the config is meant for. With another number, batch size, learning rate and
    # schedule are scaled (see DefaultTrainer.auto_scale_workers). 0 disables scaling.
    "REFERENCE_WORLD_SIZE": 0,
    # A scheduler of detlib.solver: WarmupMultiStepLR, WarmupCosineLR, WarmupStepWithFixedGammaLR.
    "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "BASE_LR": 0.001,
    # Final learning rate of WarmupCosineLR.
    "BASE_LR_END": 0.0,
    # Iterations at which WarmupMultiStepLR multiplies the learning rate by GAMMA.
    "STEPS": (30000,),
    "GAMMA": 0.1,
    # Number of times that WarmupStepWithFixedGammaLR multiplies by GAMMA, evenly spaced over the run.
    "NUM_DECAYS": 3,
    # Warmup: the learning rate starts at BASE_LR * WARMUP_FACTOR. In WARMUP_ITERS iterations it increases
    # linearly ("linear"), or stays constant and then jumps ("constant").
    "WARMUP_FACTOR": 1.0 / 1000,
    "WARMUP_ITERS": 1000,
    "WARMUP_METHOD": "linear",
    # Whether the schedule is rescaled to the iterations after the warmup. Otherwise the warmup replaces its
    # start.
    "RESCALE_INTERVAL": False,
    # "SGD", with momentum, or "AdamW".
    "OPTIMIZER": "SGD",
    # AdamW's decay rates of the running averages of the gradient and its square.
    "BETAS": (0.9, 0.999),
    # For SGD.
    "MOMENTUM": 0.9,
    "NESTEROV": False,
    # Weight decay in general, of normalization layers, and of biases (None: WEIGHT_DECAY).
    "WEIGHT_DECAY": 0.0001,
    "WEIGHT_DECAY_NORM": 0.0,
    "WEIGHT_DECAY_BIAS": None,
    # Learning rate factor of biases.
    "BIAS_LR_FACTOR": 1.0,
    # Learning rate factors by parameter name, as [pattern, factor] with the wildcards * and ?:
    # [["backbone.*", 0.1]]. The first matching pattern is used.
    "LR_FACTORS": [],
    # Learning rate factor between consecutive blocks of a plain ViT backbone, from the last to the first.
    "LAYER_DECAY": 1.0,
    # Gradient clipping: "value" clips each element to +-CLIP_VALUE, "norm" scales the gradient of each
    # parameter to a NORM_TYPE norm of at most CLIP_VALUE, "full_model" does so for all parameters together.
    "CLIP_GRADIENTS": {
        "ENABLED": False,
        "CLIP_TYPE": "value",
        "CLIP_VALUE": 1.0,
        "NORM_TYPE": 2.0,
    },
}

# Keys of evaluation: TEST.
_TEST = {
    # Maximum number of detections per image, in descending score order.
    "DETECTIONS_PER_IMAGE": 100,
    # Results that a run must reach, as [task, metric, value, tolerance]: [["bbox", "AP", 38.5, 0.2]]. Used by
    # tests.
    "EXPECTED_RESULTS": [],
    # OKS sigma of each keypoint in the keypoint metric; [] for those of COCO's 17 keypoints.
    "KEYPOINT_OKS_SIGMAS": [],
    # Test-time augmentation: lengths of the shorter side, the maximum length of the longer side, and whether
    # flipped images are added.
    "AUG": {
        "ENABLED": False,
        "MIN_SIZES": (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
        "MAX_SIZE": 4000,
        "FLIP": True,
    },
}

_MODEL = {
    # The model, a class of META_ARCH_REGISTRY: GeneralizedRCNN, ProposalNetwork, RetinaNet,
    # SemanticSegmentor, PanopticFPN.
    "META_ARCHITECTURE": "GeneralizedRCNN",
    # Whether R-CNN models predict masks, and whether they predict keypoints.
    "MASK_ON": False,
    "KEYPOINT_ON": False,
    # Whether to read proposals from files (DATASETS.PROPOSAL_FILES_*) instead of computing them.
    "LOAD_PROPOSALS": False,
    # Mean and standard deviation of each channel, in the order of INPUT.FORMAT, for pixels in [0, 255]. The
    # default mean is ImageNet's, in BGR. Weights converted from Caffe2 include the division by the standard
    # deviation and need a PIXEL_STD of ones. Weights of torchvision need [57.375, 57.120, 58.395] (BGR) or
    # its reverse (RGB).
    "PIXEL_MEAN": [103.530, 116.280, 123.675],
    "PIXEL_STD": [1.0, 1.0, 1.0],
    **_BACKBONE,
    **_PROPOSALS,
    **_ROI_HEADS,
    **_DENSE_HEADS,
}

_DEFAULTS = {**_RUN, **_DATA, "MODEL": _MODEL, "SOLVER": _SOLVER, "TEST": _TEST}
# Add the options of a training run (OUTPUT_DIR, SOLVER.MAX_ITER, TRAIN.* etc.) from
# detlib.config.run_options.
for _key, _default in yaml_defaults().items():
    *_parents, _name = _key.split(".")
    _node: dict[str, Any] = _DEFAULTS
    for _parent in _parents:
        _node = _node.setdefault(_parent, {})
    _node[_name] = _default

_C = CfgNode(_DEFAULTS)
