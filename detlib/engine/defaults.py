"""The default components of a training script: arguments, setup, writers, trainer and predictor."""

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
from detlib.engine.output_folder import check_output_folder
from detlib.evaluation.test_time_augmentation import GeneralizedRCNNWithTTA
from detlib.modeling import build_model
from detlib.utils import comm
from detlib.utils.env import limit_threads, seed_all_rng
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

  with torchrun, on any number of machines, restarted after a failure:
    $ torchrun --nproc-per-node 8 --max-restarts 3 {program} --config-file cfg.yaml

  as a Slurm job, requeued at its time limit:
    $ {program} --slurm --slurm-partition gpu --num-gpus 8 --config-file cfg.yaml
"""


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all training scripts share.

    Args:
        epilog: text below the list of arguments; None for examples.
    """
    parser = argparse.ArgumentParser(
        epilog=_EPILOG.format(program=sys.argv[0]) if epilog is None else epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="config file: .yaml, or .py for a lazy config"
    )
    parser.add_argument(
        "--resume", action="store_true", help="resume from the last checkpoint in OUTPUT_DIR, if there is one"
    )
    parser.add_argument("--eval-only", action="store_true", help="only evaluate MODEL.WEIGHTS")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        help="number of GPUs per machine; without a GPU, number of CPU processes; not needed with torchrun",
    )
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine, from 0")
    parser.add_argument(
        "--dist-url",
        default="auto",
        help="rendezvous URL of the processes, tcp://HOST:PORT; 'auto' finds a free port on one machine",
    )
    add_slurm_arguments(parser)
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="config options at the end of the command: KEY VALUE pairs; path.to.key=value for .py",
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
            logger.warning("Could not save the config: %s", e)
            return
    logger.info("Saved the full config to %s", path)


def default_setup(cfg: CfgNode | Mapping[str, Any], args: Any) -> None:
    """Create the output folder, set up logging, save the config, log the environment, and seed.

    Args:
        cfg: a CfgNode or a lazy config. It is saved as ``config.yaml`` in OUTPUT_DIR or ``train.output_dir``.
            The number of classes of a CfgNode is set from the training data, unless the config sets it
            (see `detlib.engine.checks.set_num_classes`).
        args: the parsed command line. It is logged, and its ``eval_only`` is used.

    Raises:
        OSError: if the output folder cannot be written to.
        OutputFolderInUseError: if another process trains in it, unless ``args.eval_only`` is set.
    """
    from detlib.utils.collect_env import collect_env_info  # slow to import, and only needed here

    settings = RunSettings.from_config(cfg)
    output_dir = settings.output_dir
    if comm.is_main_process() and output_dir:
        check_output_folder(output_dir, is_for_training=not getattr(args, "eval_only", False))
        PathManager.mkdirs(output_dir)
    rank = comm.get_rank()
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    logger = setup_logger(output_dir, distributed_rank=rank)
    logger.info("Process %d of %d", rank, comm.get_world_size())
    limit_threads()
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Command line arguments: %s", args)
    if isinstance(cfg, CfgNode):
        set_num_classes(cfg)
    if comm.is_main_process() and output_dir:
        _save_config(cfg, os.path.join(output_dir, "config.yaml"))
    # A separate seed for each process; otherwise all would draw the same augmentations.
    seed_all_rng(None if settings.seed < 0 else settings.seed + rank)
    if not getattr(args, "eval_only", False):
        # Not in evaluation: image sizes vary, so benchmarking each would cost more than it gains.
        torch.backends.cudnn.benchmark = settings.cudnn_benchmark


def default_writers(
    output_dir: str,
    max_iter: int | None = None,
    names: Sequence[str] = ("console", "json", "tensorboard"),
    params: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[EventWriter]:
    """Build writers for the terminal, ``metrics.json`` and TensorBoard, or others by name.

    Args:
        output_dir: folder of the files.
        max_iter: total number of iterations, for the remaining time.
        names: any of "console", "json", "csv", "tensorboard", "wandb" and "mlflow".
        params: further arguments of a writer's class, by name of the writer.

    Raises:
        ValueError: if a name is unknown.
        ImportError: if a writer's package is not installed. The message has the command that installs it.
    """
    return build_writers(names, output_dir, max_iter, params)


class DefaultPredictor:
    """A predictor that runs the model of a config on single images.

    It loads MODEL.WEIGHTS onto MODEL.DEVICE, resizes images to INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST, and
    converts them to INPUT.FORMAT. With TEST.AUG.ENABLED it predicts on the augmented views of TEST.AUG and
    merges the predictions. For entire datasets, a data loader and `inference_on_dataset` are faster.

    Attributes:
        metadata: metadata of the first dataset of DATASETS.TEST, for drawing. It has no class names if the
            dataset is specified by a URI and is not on this machine. Missing if DATASETS.TEST is empty.
        model: the model, in eval mode.
        tta: the model with test-time augmentation, or None.
        aug: the resize augmentation.
        input_format: channel order of the model's input, "BGR" or "RGB".

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
            original_image: (H, W, 3) uint8 in BGR order, as ``cv2.imread`` returns it; or float in [0, 255].

        Returns:
            The model's output for this image, such as ``{"instances": Instances}``, in the size of the
            original image.

        Raises:
            TypeError: if the image is not a uint8 or float array.
            ValueError: if it has another shape, no pixels, or values scaled to [0, 1].
        """
        _check_image(original_image)
        if self.input_format == "RGB":
            original_image = original_image[:, :, ::-1]
        height, width = original_image.shape[:2]
        if self.tta is not None:
            image = torch.from_numpy(np.ascontiguousarray(original_image.transpose(2, 0, 1)))
            return self.tta([{"image": image, "height": height, "width": width}])[0]
        image = self.aug.get_transform(original_image).apply_image(original_image)
        # torch does not support the strides of the transposed and reversed array.
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))
        return self.model([{"image": image, "height": height, "width": width}])[0]


def _find_metadata(name: str) -> Metadata:
    try:
        return MetadataCatalog.get(name)
    except FileNotFoundError as e:
        # A model is often used on a machine without its data.
        logger.warning("Class names are unknown, so predictions have class indices only: %s", e)
        return Metadata(name=name)


def _check_image(image: Any) -> None:
    if image is None:
        raise TypeError("The image is None: cv2.imread returns None for a file that it cannot read")
    if not isinstance(image, np.ndarray):
        raise TypeError(f"The image must be a numpy array (H, W, 3) in BGR order, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"The image must have the shape (H, W, 3), got {image.shape}")
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise TypeError(f"The image must be uint8, or float in [0, 255], got {image.dtype}")
    if image.dtype.kind == "f" and 0.0 < image.max() <= 1.0:
        raise ValueError("The values of the image are in [0, 1]; the model expects [0, 255]")
