"""The model zoo: shipped configs and published models by their path below ``configs/``.

Example::

    from detlib import model_zoo

    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
    train = model_zoo.get_config("common/train.py").train
"""

from detlib.model_zoo.model_zoo import get, get_checkpoint_url, get_config, get_config_file

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]
