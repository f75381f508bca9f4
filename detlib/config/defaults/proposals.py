"""Keys of anchors and proposals, within MODEL: ANCHOR_GENERATOR, PROPOSAL_GENERATOR, RPN."""

PROPOSALS = {
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
        # Where in its cell of the feature map an anchor has its centre, as a fraction of the stride: 0 is the
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
        # In training, anchors that reach further than this many pixels out of the picture are ignored; -1:
        # none.
        "BOUNDARY_THRESH": -1,
        # Anchors of each picture that enter the loss, and at most which fraction of them is foreground.
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
        # Candidates before NMS: the best of each feature map. After NMS: the best of each picture, over all
        # maps.
        "PRE_NMS_TOPK_TRAIN": 12000,
        "PRE_NMS_TOPK_TEST": 6000,
        "POST_NMS_TOPK_TRAIN": 2000,
        "POST_NMS_TOPK_TEST": 1000,
        # Of two proposals with a higher IoU than this the one with the lower score is dropped.
        "NMS_THRESH": 0.7,
    },
}
