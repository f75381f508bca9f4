"""Keys of one-stage and segmentation models, within MODEL: RETINANET, SEM_SEG_HEAD, PANOPTIC_FPN."""

DENSE_HEADS = {
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
        # Merging instances and stuff into one picture. By falling score, instances below the confidence are
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
