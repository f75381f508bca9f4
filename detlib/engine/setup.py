"""What a training script does before the training: arguments, logs, seeds and writers."""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from detlib.config import CfgNode, LazyConfig, try_get_key
from detlib.engine.checks import set_num_classes
from detlib.engine.distributed.slurm import add_slurm_arguments
from detlib.utils import comm
from detlib.utils.env import seed_all_rng
from detlib.utils.events import EventWriter
from detlib.utils.file_io import PathManager
from detlib.utils.logger import setup_logger
from detlib.utils.writers import build_writers

__all__ = [
    "default_argument_parser",
    "default_setup",
    "default_writers",
    "run_setting",
]

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


# Where each kind of config has what concerns a run as a whole, and what holds if it says nothing.
RUN_SETTINGS = {
    "output_dir": ("OUTPUT_DIR", "train.output_dir", "./output"),
    "seed": ("SEED", "train.seed", -1),
    "cudnn_benchmark": ("CUDNN_BENCHMARK", "train.cudnn_benchmark", False),
    "timeout": ("TRAIN.TIMEOUT", "train.timeout", 1800),
    "device": ("MODEL.DEVICE", "train.device", "auto"),
    "weights": ("MODEL.WEIGHTS", "train.init_checkpoint", ""),
    "use_average": ("SOLVER.EMA.ENABLED", "train.model_ema.enabled", False),
    "report": ("TRAIN.REPORT", "train.report", True),
}


def run_setting(cfg: CfgNode | Mapping[str, Any], name: str) -> Any:
    """A setting of a run as a whole, from either kind of config.

    Args:
        cfg: a CfgNode, or a lazy config with the node ``train``.
        name: "output_dir", "seed", "cudnn_benchmark", "timeout", "device", "weights" (what to start from),
            "use_average" (whether to evaluate the average of the weights) or "report" (whether to make one).
    """
    yaml_key, lazy_key, default = RUN_SETTINGS[name]
    return try_get_key(cfg, yaml_key if isinstance(cfg, CfgNode) else lazy_key, default=default)


def _save_config(cfg: CfgNode | Mapping[str, Any], path: str) -> None:
    logger = logging.getLogger(__name__)
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

    output_dir = run_setting(cfg, "output_dir")
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
    seed = run_setting(cfg, "seed")
    if not isinstance(seed, int):
        yaml_key, lazy_key, _ = RUN_SETTINGS["seed"]
        raise TypeError(f"{yaml_key} ({lazy_key}) must be a whole number, got {seed!r}")
    seed_all_rng(None if seed < 0 else seed + rank)
    if not getattr(args, "eval_only", False):
        # Pictures of all sizes are evaluated: measuring each anew would cost more than it gains.
        torch.backends.cudnn.benchmark = run_setting(cfg, "cudnn_benchmark")


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
