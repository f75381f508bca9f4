"""Keys of data sets, loading and augmentation: DATASETS, DATALOADER, INPUT."""

DATA = {
    "DATASETS": {
        # Registered names or dataset URIs such as "dir:PATH@train"; docs/data.md lists them. Several are
        # concatenated for training and evaluated one by one.
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
        # rare categories more often), RandomSubsetTrainingSampler, ClassAwareTrainingSampler (each category
        # equally often), MultiDatasetTrainingSampler (each data set of DATASETS.TRAIN by its weight).
        "SAMPLER_TRAIN": "TrainingSampler",
        # For MultiDatasetTrainingSampler: a weight for each data set; () for equal ones.
        "DATASET_WEIGHTS": (),
        # For RepeatFactorTrainingSampler: categories in a smaller fraction of the pictures than this are
        # repeated, by threshold / fraction, or the square root of that (as in LVIS,
        # https://arxiv.org/abs/1908.03195).
        "REPEAT_THRESHOLD": 0.0,
        "REPEAT_SQRT": True,
    },
    "INPUT": {
        # Order of the channels the model gets: "BGR" or "RGB" (or another mode of PIL).
        "FORMAT": "BGR",
        # What decodes pictures: "pil", or "opencv", which is faster for JPEG (for RGB and BGR only).
        "DECODER": "pil",
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
        # Large scale jitter, instead of MIN_SIZE_TRAIN and MAX_SIZE_TRAIN: the picture is fitted into SIZE
        # (height, width) times a factor from SCALE, and cropped or padded to SIZE
        # (https://arxiv.org/abs/2012.07177).
        "LSJ": {"ENABLED": False, "SCALE": [0.1, 2.0], "SIZE": [1024, 1024]},
        # Random colours in training, each drawn from [1 - x, 1 + x] (HUE: [-x, x] of the circle, x <= 0.5).
        "COLOR_JITTER": {"BRIGHTNESS": 0.0, "CONTRAST": 0.0, "SATURATION": 0.0, "HUE": 0.0},
        # Probability that objects of another picture are pasted into a training picture (Simple Copy-Paste,
        # https://arxiv.org/abs/2012.07177; made for LSJ). With masks, MASK_FORMAT must be "bitmask".
        "COPY_PASTE": {"PROB": 0.0},
        # Probability that a training picture is put together of four, on SIZE (height, width) pixels, before
        # it is augmented.
        "MOSAIC": {"PROB": 0.0, "SIZE": [640, 640]},
        # How masks are held: "polygon" (small, exact under scaling) or "bitmask" (needed for RLE
        # annotations).
        "MASK_FORMAT": "polygon",
    },
}
