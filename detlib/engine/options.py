"""What a training is told about its steps and hooks, read from either kind of config.

`RunOptions` is the one place where the keys of a YAML config and the entries of a lazy config's ``train``
meet; the trainer and the hooks know no config.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from detlib.config import CfgNode
from detlib.engine.option_checks import check_options, key_of, warn_of_slips
from detlib.utils.writers import check_writers

__all__ = ["RunOptions", "epochs_to_iterations", "set_iterations"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RunOptions:
    """How to train. The names of the keys in comments are those of a YAML config."""

    max_iter: int
    """The number of steps after which training ends."""
    output_dir: str = "./output"
    """Folder of checkpoints and logs."""
    weights: str = ""
    """What `resume_or_load` loads where it does not resume."""
    seed: int = -1
    """Of the steps' random numbers; negative draws one."""

    accum_steps: int = 1
    """Forward and backward passes for one update."""
    precision: str = ""
    """"float16" or "bfloat16" for mixed precision, "" for none."""
    skip_non_finite: int = 0
    """How many steps in a row may be left out because their loss is not finite; 0 ends the training."""
    images_per_step: int = 0
    """Pictures of one update over all processes, 0 if that is not known; for advice."""

    freeze: tuple[str, ...] = ()
    """Patterns of parameter names that are not trained."""
    strategy: str = "ddp"
    """"ddp" or "fsdp"."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """Arguments of `create_ddp_model`."""
    activation_checkpoint: bool = False
    """Whether to compute the insides of backbone blocks twice instead of keeping them."""
    compile: bool = False
    """Whether to use torch.compile."""
    compile_modules: tuple[str, ...] = ()
    """Names of the modules to compile, () for backbone and heads."""
    compile_backend: str = "inductor"
    """As in `torch.compile`."""
    ema_decay: float = 0.0
    """Decay of the weights' moving average in (0, 1); 0 keeps none."""
    ema_for_eval: bool = True
    """Whether evaluation uses the average."""

    checkpoint_period: int = 5000
    """Steps between checkpoints."""
    checkpoint_keep: int | None = None
    """How many periodic checkpoints to keep; None keeps all."""
    checkpoint_async: bool = False
    """See `detlib.checkpoint.Checkpointer`."""
    eval_period: int = 0
    """Steps between evaluations; 0 for the end only."""
    val_loss: tuple[str, ...] = ()
    """Names of the data sets to take losses on at each evaluation."""
    best_metric: str = ""
    """Metric of the best checkpoint, "" for none."""
    best_mode: str = "max"
    """Whether more ("max") or less ("min") of it is better."""
    early_stop_patience: int = 0
    """Evaluations without progress after which training ends; 0 for never."""
    early_stop_metric: str = ""
    """Its metric, "" for `best_metric`."""
    early_stop_mode: str = "max"
    """As `best_mode`."""
    precise_bn_batches: int = 0
    """Batches to take BatchNorm's statistics of before each evaluation; 0 leaves them."""
    log_period: int = 20
    """Steps between two outputs of the writers."""
    vis_period: int = 0
    """Steps between drawings of training pictures; 0 for none."""
    writers: tuple[str, ...] = ("console", "json", "tensorboard")
    """Names of the writers."""
    writer_params: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arguments of writers, by their names."""
    profile_start: int = 20
    """First step to profile."""
    profile_steps: int = 0
    """How many to profile; 0 for none."""

    def __post_init__(self) -> None:
        """
        Raises:
            TypeError, ValueError: if an option is none of the legal ones, naming its config key.
        """
        check_writers(self.writers)
        check_options(self)
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"{key_of('ema_decay')} lies in [0, 1), got {self.ema_decay}")
        for option, metric, mode in (
            ("best_mode", self.best_metric, self.best_mode),
            ("early_stop_mode", self.early_stop_metric, self.early_stop_mode),
        ):
            if mode == "max" and "loss" in metric.rpartition("/")[2]:
                raise ValueError(
                    f"{key_of(option)} is 'max', but less is better of the metric '{metric}': set it to 'min'"
                )
        if self.early_stop_patience > 0 and not (self.early_stop_metric or self.best_metric):
            raise ValueError(
                f"Early stopping after {self.early_stop_patience} evaluations needs a metric: set "
                "SOLVER.EARLY_STOP.METRIC (train.early_stop.metric), for example to 'bbox/AP'"
            )

    @classmethod
    def from_cfg(cls, cfg: CfgNode, pictures_per_epoch: int | None = None) -> "RunOptions":
        """Reads a YAML config.

        Args:
            cfg: the config, whose SOLVER.MAX_ITER holds.
            pictures_per_epoch: number of training pictures, None if it is not known.

        Raises:
            ValueError: if a key has no legal value, or is in epochs of an unknown length.
        """
        solver, test, train = cfg.SOLVER, cfg.TEST, cfg.TRAIN
        best, early = solver.BEST_CHECKPOINT, solver.EARLY_STOP

        def iterations(key: str, epochs: float, period: int) -> int:
            return epochs_to_iterations(key, epochs, pictures_per_epoch, solver.IMS_PER_BATCH) or period

        return cls(
            max_iter=solver.MAX_ITER,
            output_dir=cfg.OUTPUT_DIR,
            weights=cfg.MODEL.WEIGHTS,
            seed=cfg.SEED,
            accum_steps=solver.ACCUM_STEPS,
            precision=solver.AMP.PRECISION if solver.AMP.ENABLED else "",
            skip_non_finite=solver.SKIP_NON_FINITE,
            images_per_step=solver.IMS_PER_BATCH,
            freeze=tuple(cfg.MODEL.FREEZE),
            strategy=train.STRATEGY,
            ddp={
                "static_graph": train.STATIC_GRAPH,
                "find_unused_parameters": train.FIND_UNUSED_PARAMETERS,
            },
            activation_checkpoint=train.ACTIVATION_CHECKPOINT,
            compile=train.COMPILE.ENABLED,
            compile_modules=tuple(train.COMPILE.MODULES),
            compile_backend=train.COMPILE.BACKEND,
            ema_decay=solver.EMA.DECAY if solver.EMA.ENABLED else 0.0,
            checkpoint_period=iterations(
                "SOLVER.CHECKPOINT_EPOCHS", solver.CHECKPOINT_EPOCHS, solver.CHECKPOINT_PERIOD
            ),
            checkpoint_keep=solver.CHECKPOINT_KEEP_LAST or None,
            checkpoint_async=solver.CHECKPOINT_ASYNC,
            eval_period=iterations("TEST.EVAL_EPOCHS", test.EVAL_EPOCHS, test.EVAL_PERIOD),
            val_loss=(test.VAL_LOSS,) if isinstance(test.VAL_LOSS, str) else tuple(test.VAL_LOSS),
            best_metric=best.METRIC,
            best_mode=best.MODE,
            early_stop_patience=early.PATIENCE,
            early_stop_metric=early.METRIC,
            early_stop_mode=early.MODE if early.METRIC else best.MODE,
            precise_bn_batches=test.PRECISE_BN.NUM_ITER if test.PRECISE_BN.ENABLED else 0,
            log_period=train.LOG_PERIOD,
            vis_period=cfg.VIS_PERIOD,
            writers=_as_given(train.WRITERS),
            writer_params={
                "wandb": _given(project=train.WANDB.PROJECT, name=train.WANDB.NAME),
                "mlflow": _given(
                    tracking_uri=train.MLFLOW.TRACKING_URI,
                    experiment=train.MLFLOW.EXPERIMENT,
                    run_name=train.MLFLOW.NAME,
                ),
            },
            profile_start=train.PROFILE.START,
            profile_steps=train.PROFILE.STEPS if train.PROFILE.ENABLED else 0,
        )

    @classmethod
    def from_lazy(
        cls, train: Mapping[str, Any], images_per_step: int = 0, pictures_per_epoch: int | None = None
    ) -> "RunOptions":
        """Reads the node ``train`` of a lazy config.

        Besides what ``configs/common/train.py`` has, these may be there: ``seed``, ``accum_steps``,
        ``amp.precision``, ``skip_non_finite``, ``freeze``, ``strategy``, ``activation_checkpoint``,
        ``compile`` (``enabled``, ``modules``, ``backend``), ``model_ema`` (``enabled``, ``decay``),
        ``best_checkpoint`` (``metric``, ``mode``), ``early_stop`` (``patience``, ``metric``, ``mode``),
        ``eval_epochs``, ``precise_bn`` (``enabled``, ``num_iter``), ``vis_period``, ``writers``, ``wandb``
        and ``mlflow`` (``enabled``, ``params`` for the writer) and ``profile`` (``enabled``, ``start``,
        ``steps``), each as the key of that name in a YAML config. ``fast_dev_run.enabled`` makes a run of 20
        steps with two evaluations, to see whether all parts of a recipe work.

        Args:
            train: the node.
            images_per_step: pictures of one update, 0 if that is not known.
            pictures_per_epoch: number of training pictures, None if it is not known.

        Raises:
            TypeError, ValueError: if an entry has no legal value, or is in epochs of an unknown length.
        """
        warn_of_slips(train)
        amp, ema, best = train.get("amp", {}), train.get("model_ema", {}), train.get("best_checkpoint", {})
        early, profile = train.get("early_stop", {}), train.get("profile", {})
        compiling, checkpoints = train.get("compile", {}), train.get("checkpointer", {})
        precise_bn = train.get("precise_bn", {})
        writers = _as_given(train.get("writers", ("console", "json", "tensorboard", "csv")))
        services = {name: train.get(name, {}) for name in ("wandb", "mlflow")}
        if not isinstance(writers, str):
            enabled = (name for name, service in services.items() if service.get("enabled", False))
            writers += tuple(name for name in enabled if name not in writers)
        eval_iterations = epochs_to_iterations(
            "train.eval_epochs",
            train.get("eval_epochs", 0),
            pictures_per_epoch if images_per_step > 0 else None,
            images_per_step,
        )
        is_trial = train.get("fast_dev_run", {}).get("enabled", False)
        return cls(
            max_iter=20 if is_trial else train.max_iter,
            output_dir=train.output_dir,
            weights=train.get("init_checkpoint", ""),
            seed=train.get("seed", -1),
            accum_steps=train.get("accum_steps", 1),
            precision=amp.get("precision", "float16") if amp.get("enabled", False) else "",
            skip_non_finite=train.get("skip_non_finite", 0),
            images_per_step=images_per_step,
            freeze=_as_given(train.get("freeze", ())),
            strategy=train.get("strategy", "ddp"),
            ddp=dict(train.get("ddp", {})),
            activation_checkpoint=train.get("activation_checkpoint", False),
            compile=compiling.get("enabled", False),
            compile_modules=_as_given(compiling.get("modules", ())),
            compile_backend=compiling.get("backend", "inductor"),
            ema_decay=ema.get("decay", 0.999) if ema.get("enabled", False) else 0.0,
            checkpoint_period=checkpoints.get("period", 5000),
            checkpoint_keep=checkpoints.get("max_to_keep"),
            checkpoint_async=checkpoints.get("async_save", False),
            eval_period=10 if is_trial else eval_iterations or train.get("eval_period", 0),
            best_metric=best.get("metric", ""),
            best_mode=best.get("mode", "max"),
            early_stop_patience=early.get("patience", 0),
            early_stop_metric=early.get("metric", ""),
            early_stop_mode=early.get("mode", best.get("mode", "max")),
            precise_bn_batches=precise_bn.get("num_iter", 200) if precise_bn.get("enabled", False) else 0,
            log_period=1 if is_trial else train.get("log_period", 20),
            vis_period=train.get("vis_period", 0),
            writers=writers,
            writer_params={name: dict(service.get("params", {})) for name, service in services.items()},
            profile_start=profile.get("start", 20),
            profile_steps=profile.get("steps", 5) if profile.get("enabled", False) else 0,
        )


def set_iterations(cfg: CfgNode, pictures_per_epoch: int | None) -> CfgNode:
    """Sets SOLVER.MAX_ITER from SOLVER.MAX_EPOCHS, and moves STEPS and WARMUP_ITERS in proportion.

    Args:
        cfg: the config, which is not changed.
        pictures_per_epoch: number of training pictures, None if it is not known.

    Returns:
        `cfg` itself if MAX_EPOCHS is 0, else a changed copy.

    Raises:
        ValueError: if the training data do not tell their length.
    """
    solver = cfg.SOLVER
    max_iter = epochs_to_iterations(
        "SOLVER.MAX_EPOCHS", solver.MAX_EPOCHS, pictures_per_epoch, solver.IMS_PER_BATCH
    )
    if max_iter is None:
        return cfg
    cfg, scale = cfg.clone(), max_iter / solver.MAX_ITER
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = max_iter
    cfg.SOLVER.STEPS = tuple(round(step * scale) for step in solver.STEPS)
    cfg.SOLVER.WARMUP_ITERS = round(solver.WARMUP_ITERS * scale)
    logger.info(
        "%g epochs of %d pictures are %d iterations of %d; the rate falls at %s, the warm-up takes %d",
        solver.MAX_EPOCHS,
        pictures_per_epoch,
        max_iter,
        solver.IMS_PER_BATCH,
        cfg.SOLVER.STEPS,
        cfg.SOLVER.WARMUP_ITERS,
    )
    if frozen:
        cfg.freeze()
    return cfg


def _as_given(names: Any) -> Any:
    """Several names as a tuple; a single one stays, to be refused."""
    return names if isinstance(names, str) else tuple(names)


def _given(**kwargs: str) -> dict[str, str]:
    """Without what is empty, which leaves the writer's default."""
    return {name: value for name, value in kwargs.items() if value}


def epochs_to_iterations(
    key: str, epochs: float, pictures_per_epoch: int | None, images_per_step: int
) -> int | None:
    """Iterations of so many passes over the training data; None for 0 epochs.

    Args:
        key: what the number is set by, for the message.
        epochs: number of passes, which need not be whole.
        pictures_per_epoch: number of training pictures, None if it is not known.
        images_per_step: pictures of one update.

    Raises:
        TypeError: if `epochs` is no number.
        ValueError: if the training data do not tell their length.
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int | float):
        raise TypeError(f"{key} must be a number, got {epochs!r}")
    if epochs <= 0:
        return None
    if pictures_per_epoch is None:
        raise ValueError(
            f"{key} = {epochs}: the training data do not tell their length; count in iterations instead."
        )
    return max(1, round(epochs * pictures_per_epoch / images_per_step))
