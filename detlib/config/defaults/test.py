"""Keys of evaluation: TEST."""

TEST = {
    # Iterations between evaluations in training; 0: only at its end.
    "EVAL_PERIOD": 0,
    # Epochs, passes over the training data, between evaluations, if that is above 0.
    "EVAL_EPOCHS": 0.0,
    # Data sets with annotations on which each evaluation takes the losses too, as "val/loss_cls" and the
    # like.
    "VAL_LOSS": (),
    # Detections kept for each picture, best first.
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
    # Whether the statistics of BatchNorm are taken anew before each evaluation, over this many training
    # batches.
    "PRECISE_BN": {"ENABLED": False, "NUM_ITER": 200},
}
