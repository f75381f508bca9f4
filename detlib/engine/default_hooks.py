"""The hooks that a training has unless its user says otherwise, for both kinds of config."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from detlib.engine import hooks
from detlib.engine.options import RunOptions
from detlib.engine.train_loop import HookBase, TrainerBase
from detlib.engine.validation import validation_results
from detlib.layers.fvcore_nn import get_bn_modules
from detlib.utils import comm
from detlib.utils.events import EventWriter

__all__ = ["build_default_hooks"]

logger = logging.getLogger(__name__)


def build_default_hooks(
    trainer: TrainerBase,
    options: RunOptions,
    *,
    evaluate: Callable[[], Mapping[str, Any]],
    keep_results: Callable[[Mapping[str, Any]], None],
    build_writers: Callable[[], list[EventWriter]],
    val_loss_loaders: Callable[[], Mapping[str, Iterable]] | None = None,
    precise_bn_loader: Callable[[], Iterable] | None = None,
    metadata: Any = None,
    image_format: str = "BGR",
    more_at_the_end: bool = False,
    extra_hooks: Iterable[HookBase | None] = (),
) -> list[HookBase | None]:
    """Makes the hooks that the options ask for.

    The order matters: the checkpoint is saved before the evaluation, which may fail; what goes by the results
    comes after it; and the writers come last, to put out what all others have measured.

    Args:
        trainer: has ``model``, ``checkpointer``, ``output_dir`` and ``weights_to_evaluate``.
        options: which hooks.
        evaluate: evaluates and returns a nested dict of numbers, on the main process at least.
        keep_results: is given the results of each evaluation, those of the validation loss with them.
        build_writers: makes the writers; called on the main process only.
        val_loss_loaders: makes the loaders of the validation loss by name; called at the first evaluation.
            None for no such loss.
        precise_bn_loader: makes the loader of batches for PreciseBN.
        metadata: names and colours of classes, for pictures.
        image_format: of the pictures in the training batches.
        more_at_the_end: whether `evaluate` does more after the last step than before.
        extra_hooks: hooks to come after the schedule.

    Returns:
        The hooks, with None in places.
    """
    result: list[HookBase | None] = [hooks.IterationTimer(), hooks.LRScheduler(), *extra_hooks]
    if options.profile_steps > 0:
        folder = os.path.join(options.output_dir, "profile")
        result.append(hooks.StepsProfiler(options.profile_start, options.profile_steps, folder))
    if options.vis_period > 0:
        result.append(
            hooks.TrainingPictures(
                options.vis_period,
                options.output_dir,
                image_format=image_format,
                metadata=metadata,
                model=trainer.model,
            )
        )
    if options.precise_bn_batches > 0 and precise_bn_loader is not None and get_bn_modules(trainer.model):
        result.append(
            hooks.PreciseBN(
                options.eval_period,
                trainer.model,
                precise_bn_loader(),
                options.precise_bn_batches,
                average=getattr(trainer, "ema", None) if options.ema_for_eval else None,
            )
        )
    # On every process, so that all of them stop if the model has diverged; only one writes files.
    result.append(
        hooks.PeriodicCheckpointer(
            trainer.checkpointer, options.checkpoint_period, max_to_keep=options.checkpoint_keep
        )
    )
    if val_loss_loaders is not None:
        evaluate = _with_validation_loss(trainer, evaluate, val_loss_loaders)

    def evaluate_and_keep() -> Mapping[str, Any]:
        with trainer.weights_to_evaluate():
            results = evaluate()
        keep_results(results)
        return results

    result.append(hooks.EvalHook(options.eval_period, evaluate_and_keep, repeat_after_stop=more_at_the_end))
    result += _hooks_by_metric(trainer, options)
    if options.eval_period > 0:
        result.append(hooks.MissedEvaluation(options.eval_period, options.output_dir))
    if comm.is_main_process():
        result.append(hooks.PeriodicWriter(build_writers(), options.log_period, options.eval_period))
    return result


def _with_validation_loss(
    trainer: TrainerBase,
    evaluate: Callable[[], Mapping[str, Any]],
    build_loaders: Callable[[], Mapping[str, Iterable]],
) -> Callable[[], Mapping[str, Any]]:
    loaders: dict[str, Iterable] = {}

    def evaluate_and_take_losses() -> Mapping[str, Any]:
        results = dict(evaluate() or {})
        if not loaders:
            loaders.update(build_loaders())
        return {**results, **validation_results(trainer.model, loaders)}

    return evaluate_and_take_losses


def _hooks_by_metric(trainer: TrainerBase, options: RunOptions) -> list[HookBase]:
    result: list[HookBase] = []
    period = options.eval_period
    if options.best_metric:
        result.append(
            hooks.BestCheckpointer(
                period,
                trainer.checkpointer,
                options.best_metric,
                options.best_mode,
                on_all_processes=True,
            )
        )
    if options.early_stop_patience > 0:
        if period <= 0:
            logger.warning(
                "Training cannot be stopped early (SOLVER.EARLY_STOP.PATIENCE, train.early_stop.patience): "
                "there is no evaluation before its end. Set TEST.EVAL_PERIOD or TEST.EVAL_EPOCHS "
                "(train.eval_period, train.eval_epochs)"
            )
        metric = options.early_stop_metric or options.best_metric
        result.append(
            hooks.EarlyStopping(
                period, metric, options.early_stop_patience, options.early_stop_mode, options.output_dir
            )
        )
    return result
