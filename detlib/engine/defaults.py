"""What a training script needs by default: arguments, set-up, writers, the trainer and the predictor."""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from detlib.config import CfgNode, LazyConfig
from detlib.data import Metadata, MetadataCatalog
from detlib.data import transforms as T
from detlib.data.detection_utils import as_names
from detlib.engine.checks import set_num_classes
from detlib.engine.default_trainer import DefaultTrainer
from detlib.engine.distributed.ddp import create_ddp_model
from detlib.engine.distributed.slurm import add_slurm_arguments
from detlib.engine.ema import load_for_inference
from detlib.engine.options import RunSettings
from detlib.evaluation.test_time_augmentation import GeneralizedRCNNWithTTA
from detlib.modeling import build_model
from detlib.utils import comm
from detlib.utils.env import seed_all_rng
from detlib.utils.events import EventWriter
from detlib.utils.file_io import PathManager
from detlib.utils.logger import setup_logger
from detlib.utils.writers import build_writers

__all__ = [
    "DefaultPredictor",
    "DefaultTrainer",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "default_writers",
]

logger = logging.getLogger(__name__)

_EPILOG = """
Examples:

  on one GPU, or on the CPU if there is none:
    $ {program} --config-file configs/Quickstart/mask_rcnn_R_18_FPN_shapes.yaml

  on eight GPUs, with changes to the config:
    $ {program} --num-gpus 8 --config-file cfg.yaml MODEL.WEIGHTS model.pkl SOLVER.BASE_LR 0.01

  on two machines:
    (0)$ {program} --machine-rank 0 --num-machines 2 --dist-url tcp://HOST:PORT [...]
    (1)$ {program} --machine-rank 1 --num-machines 2 --dist-url tcp://HOST:PORT [...]

  by torchrun, on any number of machines, restarted after a failure:
    $ torchrun --nproc-per-node 8 --max-restarts 3 {program} --config-file cfg.yaml

  as a job of Slurm, requeued when its time is up:
    $ {program} --slurm --slurm-partition gpu --num-gpus 8 --config-file cfg.yaml
"""


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """The arguments that all training scripts share.

    Args:
        epilog: text below the list of arguments; None for some examples.
    """
    parser = argparse.ArgumentParser(
        epilog=_EPILOG.format(program=sys.argv[0]) if epilog is None else epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="the config, a .yaml file or a lazy .py one"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR, if there is one"
    )
    parser.add_argument("--eval-only", action="store_true", help="only evaluate MODEL.WEIGHTS")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        help="number of GPUs per machine; without any GPU, of processes on the CPU; torchrun knows it",
    )
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    parser.add_argument(
        "--dist-url",
        default="auto",
        help="where the processes meet, as tcp://HOST:PORT; on one machine 'auto' finds a free port",
    )
    add_slurm_arguments(parser)
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="changes to the config, at the end of the command: pairs KEY VALUE; path.to.key=value for .py",
    )
    return parser


def _save_config(cfg: CfgNode | Mapping[str, Any], path: str) -> None:
    if isinstance(cfg, CfgNode):
        with PathManager.open(path, "w") as f:
            f.write(cfg.dump())
    else:
        try:
            LazyConfig.save(cfg, path)
        except ValueError as e:  # lambdas and the like
            logger.warning("The config is not saved: %s", e)
            return
    logger.info("The full config is saved in %s", path)


def default_setup(cfg: CfgNode | Mapping[str, Any], args: Any) -> None:
    """Makes the output folder, starts the logs, writes down config and environment, and seeds.

    Args:
        cfg: the full config, of either kind; it is saved as ``config.yaml`` in OUTPUT_DIR or
            ``train.output_dir``. In a CfgNode, the numbers of classes are set from the training data, if
            nobody has set them (see `detlib.engine.checks.set_num_classes`).
        args: the command line, to be logged; its ``eval_only`` is looked at.
    """
    from detlib.utils.collect_env import collect_env_info  # slow to import, and needed nowhere else

    settings = RunSettings.from_config(cfg)
    output_dir = settings.output_dir
    if comm.is_main_process() and output_dir:
        PathManager.mkdirs(output_dir)
    rank = comm.get_rank()
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    logger = setup_logger(output_dir, distributed_rank=rank)
    logger.info("Process %d of %d", rank, comm.get_world_size())
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Command line arguments: %s", args)
    if isinstance(cfg, CfgNode):
        set_num_classes(cfg)
    if comm.is_main_process() and output_dir:
        _save_config(cfg, os.path.join(output_dir, "config.yaml"))
    # Every process needs its own seed, or all would draw the same augmentations.
    seed_all_rng(None if settings.seed < 0 else settings.seed + rank)
    if not getattr(args, "eval_only", False):
        # Pictures of all sizes are evaluated: measuring each anew would cost more than it gains.
        torch.backends.cudnn.benchmark = settings.cudnn_benchmark


def default_writers(
    output_dir: str,
    max_iter: int | None = None,
    names: Sequence[str] = ("console", "json", "tensorboard"),
    params: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[EventWriter]:
    """Writers for the terminal, for ``metrics.json`` and for TensorBoard, or others by name.

    Args:
        output_dir: folder of the files.
        max_iter: number of iterations in all, for the time left.
        names: some of "console", "json", "csv", "tensorboard", "wandb" and "mlflow".
        params: further arguments of a writer's class, by its name.

    Raises:
        ValueError: if a name is unknown.
        ImportError: if a writer's package is not installed, with the command that installs it.
    """
    return build_writers(names, output_dir, max_iter, params)


class DefaultPredictor:
    """Runs a config's model, with the config's weights, on one picture after the other.

    It loads MODEL.WEIGHTS onto MODEL.DEVICE, resizes by INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST, and converts
    to INPUT.FORMAT. With TEST.AUG.ENABLED it predicts on the views of TEST.AUG instead, and merges. For whole
    data sets, a data loader and `inference_on_dataset` are faster.

    Attributes:
        metadata: of the first data set in DATASETS.TEST, for drawing; without class names where the data set
            is named by its address and is not on this machine; missing if DATASETS.TEST is empty.
        model: the model, in eval mode.
        tta: the model with test-time augmentation, or None.
        aug: the resizing.
        input_format: "BGR" or "RGB", what the model takes.

    Example:
        >>> predictor = DefaultPredictor(cfg)
        >>> instances = predictor(cv2.imread("input.jpg"))["instances"]
    """

    def __init__(self, cfg: CfgNode):
        """
        Raises:
            ValueError: if INPUT.FORMAT is neither "RGB" nor "BGR".
        """
        self.cfg = cfg.clone()
        self.input_format = cfg.INPUT.FORMAT
        if self.input_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT must be 'RGB' or 'BGR' here, got {self.input_format!r}")
        self.model = build_model(self.cfg)
        self.model.eval()
        self.tta = GeneralizedRCNNWithTTA(self.cfg, self.model) if cfg.TEST.AUG.ENABLED else None
        names = as_names(cfg.DATASETS.TEST)
        if names:
            self.metadata = _find_metadata(names[0])
        load_for_inference(self.model, cfg.MODEL.WEIGHTS, use_average=cfg.SOLVER.EMA.ENABLED)
        self.aug = T.ResizeShortestEdge(
            [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST
        )

    @torch.no_grad()
    def __call__(self, original_image: np.ndarray) -> dict[str, Any]:
        """
        Args:
            original_image: (H, W, 3) uint8 in BGR order, as ``cv2.imread`` gives it; or float in 0..255.

        Returns:
            The model's output for this picture, such as ``{"instances": Instances}``, in the picture's own
            size.

        Raises:
            TypeError: if the picture is no array.
            ValueError: if it has another shape, or no pixels, or values scaled to 0..1.
        """
        _check_picture(original_image)
        if self.input_format == "RGB":
            original_image = original_image[:, :, ::-1]
        height, width = original_image.shape[:2]
        if self.tta is not None:
            image = torch.from_numpy(np.ascontiguousarray(original_image.transpose(2, 0, 1)))
            return self.tta([{"image": image, "height": height, "width": width}])[0]
        image = self.aug.get_transform(original_image).apply_image(original_image)
        # The transpose and the reversal give strides that torch cannot take.
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))
        return self.model([{"image": image, "height": height, "width": width}])[0]


def _find_metadata(name: str) -> Metadata:
    try:
        return MetadataCatalog.get(name)
    except FileNotFoundError as e:
        # A model goes where its data do not.
        logger.warning("Class names are unknown, predictions have numbers only: %s", e)
        return Metadata(name=name)


def _check_picture(image: Any) -> None:
    if image is None:
        raise TypeError("The picture is None: cv2.imread returns that for a file it cannot read")
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"The picture must be a numpy array (H, W, 3) in BGR order, got {type(image).__name__}"
        )
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"The picture must have the shape (H, W, 3), got {image.shape}")
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise TypeError(f"The picture must be uint8, or float in 0..255, got {image.dtype}")
    if image.dtype.kind == "f" and 0.0 < image.max() <= 1.0:
        raise ValueError("The picture's values lie in 0..1; the model takes 0..255")
