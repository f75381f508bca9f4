#!/usr/bin/env python
"""Train and evaluate the model of a config file.

    tools/train_net.py --config-file configs/Quickstart/mask_rcnn_R_18_FPN_shapes.yaml OUTPUT_DIR out
    tools/train_net.py --config-file configs/COCO-Detection/fcos_R_50_FPN_1x.py train.output_dir=out

The script runs on multiple GPUs and machines with --num-gpus, under torchrun, and as a Slurm job with
--slurm; see docs/training.md. The output folder contains checkpoints, config.yaml, log.txt, metrics.json,
TensorBoard events, inference/, predictions/ and report/. Overrides of the config are the last arguments:
pairs KEY VALUE for a YAML config, path.to.key=value for a lazy config. For more than a config can express,
subclass DefaultTrainer or LazyTrainer in a script like this one.
"""

import datetime
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, NoReturn

from detlib.checkpoint import DetectionCheckpointer
from detlib.config import CfgNode, LazyConfig, get_cfg
from detlib.engine import (
    DefaultTrainer,
    LazyTrainer,
    ProcessFailedError,
    default_argument_parser,
    default_setup,
    hooks,
    launch,
)
from detlib.engine.checks import check_datasets, check_weights
from detlib.engine.distributed.environment import info_from_environment, should_resume
from detlib.engine.distributed.slurm import submit
from detlib.engine.ema import load_for_inference
from detlib.engine.hooks.visualization import write_prediction_images
from detlib.engine.options import RunSettings
from detlib.engine.output_folder import (
    OutputFolderInUseError,
    check_output_folder,
    lock_output_folder,
)
from detlib.evaluation import verify_results
from detlib.report import write_report
from detlib.utils import comm
from detlib.utils.logger import create_small_table

logger = logging.getLogger("detlib.train_net")


def make_config(args: Namespace) -> CfgNode | Mapping[str, Any]:
    """Read the YAML or lazy config file, and apply the overrides of the command line."""
    if args.config_file.endswith(".py"):
        return LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    return cfg


def log_results(results: Mapping, title: str = "Results") -> None:
    """Log nested results as one table for each task."""
    numbers = {name: value for name, value in results.items() if not isinstance(value, Mapping)}
    if numbers:
        logger.info("%s:\n%s", title, create_small_table(numbers))
    for name, value in results.items():
        if isinstance(value, Mapping):
            log_results(value, f"{title}, {name}")


def main(args: Namespace) -> Mapping | None:
    """Train or evaluate. Every process runs this function."""
    cfg = make_config(args)
    settings = RunSettings.from_config(cfg)
    if args.eval_only:
        return _run_here(cfg, args, settings)
    # Before the setup, which writes the config and the log.
    with lock_output_folder(settings.output_dir):
        return _run_here(cfg, args, settings)


def _run_here(cfg: CfgNode | Mapping[str, Any], args: Namespace, settings: RunSettings) -> Mapping | None:
    default_setup(cfg, args)
    is_yaml = isinstance(cfg, CfgNode)
    trainer_class = DefaultTrainer if is_yaml else LazyTrainer
    if args.eval_only:
        model = trainer_class.build_model(cfg)
        last = DetectionCheckpointer(model, settings.output_dir).get_checkpoint_file()
        weights = args.resume and last or settings.weights
        if not weights:
            logger.warning(
                "--eval-only evaluates random weights: MODEL.WEIGHTS (train.init_checkpoint) is empty%s",
                ", and there is no checkpoint to resume from" if args.resume else "",
            )
        load_for_inference(model, weights, use_average=settings.ema_decay > 0)
        results = trainer_class.test(cfg, model)
        if comm.is_main_process() and is_yaml and cfg.TEST.EXPECTED_RESULTS:
            verify_results(cfg, results)
        write_prediction_images(cfg, model)
    else:
        resume = should_resume(args.resume, settings.output_dir)
        trainer = trainer_class(cfg)
        trainer.register_hooks([hooks.StopOnSignal(trainer.checkpointer)])
        trainer.resume_or_load(resume=resume)
        results = trainer.train()
        with trainer.weights_to_evaluate():
            write_prediction_images(cfg, trainer.model)
    if comm.is_main_process():
        log_results(results or {})
        if settings.report:
            write_report(settings.output_dir, cfg)
        logger.info("All output is in %s", os.path.abspath(settings.output_dir))
    return results


def fail(message: Any, code: int) -> NoReturn:
    """Exit with an error message."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    sys.exit(code)


def run_as_job(args: Namespace, argv: list[str], settings: RunSettings) -> None:
    """Submit a Slurm job that runs the same command."""
    argv = [argument for argument in argv if argument != "--slurm"]
    folder = os.path.join(settings.output_dir, "slurm")
    job = submit(__file__, argv, args, folder=folder, use_gpus=settings.device != "cpu")
    print(f"Submitted job {job.job_id}; its logs go to {job.paths.folder}")


def writes_output(args: Namespace) -> bool:
    """Return whether this process or one that it starts is the main process."""
    info = info_from_environment()
    return args.machine_rank == 0 and (info is None or info.rank == 0)


def run(argv: list[str] | None = None) -> None:
    """Parse the command line and start the processes."""
    argv = sys.argv[1:] if argv is None else argv
    args = default_argument_parser().parse_args(argv)
    try:
        # Check the config before any process starts, so that a mistake fails fast and with a one-line
        # message.
        cfg = make_config(args)
        settings = RunSettings.from_config(cfg)
        check_datasets(cfg, train=not args.eval_only)
        check_weights(cfg)
        if args.slurm:
            return run_as_job(args, argv, settings)
        if writes_output(args):
            check_output_folder(settings.output_dir, is_for_training=not args.eval_only)
    except (ImportError, OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(error.args[0] if isinstance(error, KeyError) and error.args else error, 2)
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
            timeout=datetime.timedelta(seconds=settings.timeout),
        )
    except (OutputFolderInUseError, ProcessFailedError) as error:
        fail(error, 1)


if __name__ == "__main__":
    run()
