"""Keys of backbones, within MODEL: BACKBONE, RESNETS, TIMM, TORCHVISION, FPN."""

BACKBONE = {
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
    # pictures as those of timm do.
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
