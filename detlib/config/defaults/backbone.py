"""Keys of backbones, within MODEL: BACKBONE, RESNETS, FPN."""

BACKBONE = {
    "BACKBONE": {
        # A function or class of BACKBONE_REGISTRY.
        "NAME": "build_resnet_backbone",
        # Stages that do not train: 0 none, 1 the stem, 2 the stem and res2, ... 5 all. Their BatchNorm is
        # frozen too.
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
