#!/usr/bin/env python
"""Trains and evaluates the model of a config file.

    tools/train_net.py --config-file configs/Quickstart/mask_rcnn_R_18_FPN_shapes.yaml OUTPUT_DIR out
    tools/train_net.py --config-file configs/COCO-Detection/fcos_R_50_FPN_1x.py train.output_dir=out

The output folder then holds checkpoints, config.yaml, log.txt, metrics.json, events for TensorBoard,
inference/, predictions/ and report/. Changes to the config come last, as pairs KEY VALUE for a YAML config
and as path.to.key=value for a lazy one. For more than a config can say, subclass DefaultTrainer or
LazyTrainer in a script like this one.
"""

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from detlib.checkpoint import DetectionCheckpointer
from detlib.config import CfgNode, LazyConfig, get_cfg
from detlib.engine import DefaultTrainer, LazyTrainer, default_argument_parser, default_setup, launch
from detlib.engine.checks import check_datasets, check_weights
from detlib.engine.pictures import write_prediction_pictures
from detlib.engine.report import report_wanted, write_report
from detlib.engine.setup import run_setting
from detlib.evaluation import verify_results
from detlib.utils import comm
from detlib.utils.logger import create_small_table

logger = logging.getLogger("detlib.train_net")


def make_config(args: Namespace) -> CfgNode | Mapping[str, Any]:
    """Reads the config file, YAML or lazy, and the changes of the command line."""
    if args.config_file.endswith(".py"):
        return LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    return cfg


def log_results(results: Mapping, title: str = "Results") -> None:
    """Logs one table for each task, at any depth of data sets and tasks."""
    numbers = {name: value for name, value in results.items() if not isinstance(value, Mapping)}
    if numbers:
        logger.info("%s:\n%s", title, create_small_table(numbers))
    for name, value in results.items():
        if isinstance(value, Mapping):
            log_results(value, f"{title}, {name}")


def main(args: Namespace) -> Mapping | None:
    """What every process does."""
    cfg = make_config(args)
    default_setup(cfg, args)
    is_yaml = isinstance(cfg, CfgNode)
    trainer_class = DefaultTrainer if is_yaml else LazyTrainer
    if args.eval_only:
        model = trainer_class.build_model(cfg)
        weights = cfg.MODEL.WEIGHTS if is_yaml else cfg.train.get("init_checkpoint", "")
        checkpointer = DetectionCheckpointer(model, run_setting(cfg, "output_dir"))
        checkpointer.resume_or_load(weights, resume=args.resume)
        results = trainer_class.test(cfg, model)
        if comm.is_main_process() and is_yaml and cfg.TEST.EXPECTED_RESULTS:
            verify_results(cfg, results)
    else:
        trainer = trainer_class(cfg)
        trainer.resume_or_load(resume=args.resume)
        results, model = trainer.train(), trainer.model
    write_prediction_pictures(cfg, model)
    if comm.is_main_process():
        log_results(results or {})
        if report_wanted(cfg):
            write_report(run_setting(cfg, "output_dir"), cfg)
        logger.info("All output is in %s", os.path.abspath(run_setting(cfg, "output_dir")))
    return results


def run(argv: list[str] | None = None) -> None:
    """Parses the command line and starts the processes."""
    args = default_argument_parser().parse_args(argv)
    try:
        # Before any process starts: a slip in the config should cost a second and read as one line.
        cfg = make_config(args)
        check_datasets(cfg, train=not args.eval_only)
        check_weights(cfg)
    except (OSError, KeyError, TypeError, ValueError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        sys.exit(2)
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    run()
