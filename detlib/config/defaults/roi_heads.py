"""Keys of the second stage of R-CNN models, within MODEL: ROI_HEADS and one section for each head."""

ROI_HEADS = {
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
        # Proposals of each picture that enter the loss, and at most which fraction of them is foreground.
        "BATCH_SIZE_PER_IMAGE": 512,
        "POSITIVE_FRACTION": 0.25,
        # Whether ground truth joins the proposals in training, which guarantees some foreground.
        "PROPOSAL_APPEND_GT": True,
        # Detections below this score are dropped, then those with a higher IoU than NMS_THRESH_TEST with a
        # better one of their class. The COCO metric gains from a low score; pictures want a higher one.
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
        # the power of the number of pictures of a class by which the others are drawn. Needs USE_SIGMOID_CE.
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
        # Training pictures with fewer visible keypoints are left out.
        "MIN_KEYPOINTS_PER_IMAGE": 1,
        # Whether the loss is divided by the visible keypoints, or by as many as a full batch could have.
        "NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": True,
        "LOSS_WEIGHT": 1.0,
    },
}
