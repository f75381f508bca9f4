"""Keys of data sets, loading and augmentation: DATASETS, DATALOADER, INPUT."""

DATA = {
    "DATASETS": {
        # Names of registered data sets, or addresses such as "coco:ANNOTATIONS.json@IMAGES", "voc:DIR@SPLIT",
        # "shapes:train". Several are concatenated for training and evaluated one by one.
        "TRAIN": (),
        "TEST": (),
        # With MODEL.LOAD_PROPOSALS: files with proposals, one for each data set of TRAIN and TEST, and how
        # many of the best of each picture are used.
        "PROPOSAL_FILES_TRAIN": (),
        "PROPOSAL_FILES_TEST": (),
        "PRECOMPUTED_PROPOSAL_TOPK_TRAIN": 2000,
        "PRECOMPUTED_PROPOSAL_TOPK_TEST": 1000,
    },
    "DATALOADER": {
        # Worker processes of each training or test process; 0 loads in the process itself.
        "NUM_WORKERS": 4,
        # Whether a batch holds pictures of one orientation only (width > height, or not), which saves
        # padding.
        "ASPECT_RATIO_GROUPING": True,
        # Whether pictures without a usable annotation are left out of training.
        "FILTER_EMPTY_ANNOTATIONS": True,
        # How pictures are drawn: TrainingSampler (all, shuffled), RepeatFactorTrainingSampler (pictures with
        # rare categories more often), RandomSubsetTrainingSampler.
        "SAMPLER_TRAIN": "TrainingSampler",
        # For RepeatFactorTrainingSampler: categories in a smaller fraction of the pictures than this are
        # repeated, by threshold / fraction, or the square root of that (as in LVIS,
        # https://arxiv.org/abs/1908.03195).
        "REPEAT_THRESHOLD": 0.0,
        "REPEAT_SQRT": True,
    },
    "INPUT": {
        # Order of the channels the model gets: "BGR" or "RGB" (or another mode of PIL).
        "FORMAT": "BGR",
        # The shorter side in training: one of these lengths ("choice"), or any length between two ("range").
        "MIN_SIZE_TRAIN": (800,),
        "MIN_SIZE_TRAIN_SAMPLING": "choice",
        # The longer side is at most this long; the shorter side gives way.
        "MAX_SIZE_TRAIN": 1333,
        # The same in testing. MIN_SIZE_TEST 0 leaves pictures at their size.
        "MIN_SIZE_TEST": 800,
        "MAX_SIZE_TEST": 1333,
        # Flips half of the training pictures: "horizontal", "vertical", "none".
        "RANDOM_FLIP": "horizontal",
        # Random crops in training. SIZE is (height, width), and TYPE says of what:
        # "relative" fractions of the picture; "relative_range" fractions drawn between SIZE and 1;
        # "absolute" pixels; "absolute_range" pixels drawn between SIZE[0] and SIZE[1].
        "CROP": {"ENABLED": False, "TYPE": "relative_range", "SIZE": [0.9, 0.9]},
        # How masks are held: "polygon" (small, exact under scaling) or "bitmask" (needed for RLE
        # annotations).
        "MASK_FORMAT": "polygon",
    },
}
