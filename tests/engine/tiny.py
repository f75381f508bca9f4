"""A config whose training steps take a fraction of a second on one core."""

from detlib.config import CfgNode, get_cfg


def tiny_cfg(output_dir, **overrides) -> CfgNode:
    """Mask R-CNN with small heads on generated pictures of 64 x 64, two a batch.

    Args:
        output_dir: OUTPUT_DIR.
        **overrides: config keys with "__" for the dots.
    """
    cfg = get_cfg()
    cfg.merge_from_file("configs/Quickstart/mask_rcnn_R_18_FPN_shapes.yaml")
    cfg.OUTPUT_DIR = str(output_dir)
    cfg.SEED = 3
    cfg.VERSION = 2
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.DATASETS.TRAIN = ("shapes:train?num=8&size=64",)
    cfg.DATASETS.TEST = ("shapes:val?num=4&size=64",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.MAX_ITER = 2
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.WARMUP_ITERS = 0
    for key, value in overrides.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg
