"""The options of a training run, each declared in one place.

A declaration has the option's key in YAML configs, its entry in lazy configs, the default, the valid values
and a sentence of documentation. It is the source of the defaults of YAML keys, of the reading and checking of
both types of config, of the warnings about misspelled entries, and of the table in ``docs/training.md``. To
add an option, declare it here and use it where it takes effect.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["Declaration", "RunOptions", "declarations", "yaml_defaults"]

_NO_SWITCH = object()


@dataclass(frozen=True)
class Declaration:
    """The keys of an option in configs, its default and its valid values."""

    yaml: str | None
    """Key in a YAML config, "SOLVER.EMA.DECAY"; None if only lazy configs have the option."""
    lazy: str | None
    """Entry of a lazy config, "train.model_ema.decay"; None if only YAML configs have the option."""
    default: Any
    doc: str
    """One sentence for the table of options."""
    lazy_default: Any = None
    """The default in lazy configs."""
    off: Any = _NO_SWITCH
    """The value while the entry ENABLED (``enabled``) next to the key is false, which it is by default."""
    choices: tuple = ()
    """Valid values; () for any value of the right type."""
    minimum: float | None = None
    below: float | None = None
    """Valid values are less than this."""

    @property
    def has_switch(self) -> bool:
        return self.off is not _NO_SWITCH

    @property
    def yaml_switch(self) -> str | None:
        return f"{self.yaml.rpartition('.')[0]}.ENABLED" if self.has_switch and self.yaml else None

    @property
    def lazy_switch(self) -> str | None:
        return f"{self.lazy.rpartition('.')[0]}.enabled" if self.has_switch and self.lazy else None

    @property
    def name(self) -> str:
        """Name of the option in error messages: "SOLVER.MAX_ITER (train.max_iter)"."""
        if self.yaml and self.lazy:
            return f"{self.yaml} ({self.lazy})"
        return self.yaml or self.lazy or ""


def _option(yaml: str | None, lazy: str | None, default: Any, doc: str, **more: Any) -> Any:
    declaration = Declaration(yaml, lazy, default, doc, **{"lazy_default": default, **more})
    initial = declaration.off if declaration.has_switch else default
    metadata = {"declaration": declaration}
    if isinstance(initial, list):
        return dataclasses.field(default=tuple(initial), metadata=metadata)
    if isinstance(initial, dict):
        return dataclasses.field(default_factory=lambda: dict(initial), metadata=metadata)
    return dataclasses.field(default=initial, metadata=metadata)


@dataclass(kw_only=True)
class RunOptions:
    """Declarations of all options. `detlib.engine.options.RunSettings` reads and checks their values."""

    # The run.
    output_dir: str = _option(
        "OUTPUT_DIR", "train.output_dir", "./output", "folder of logs, metrics, checkpoints and predictions"
    )
    weights: str = _option(
        "MODEL.WEIGHTS",
        "train.init_checkpoint",
        "",
        "weights to start from: a file or a URL; empty for random weights",
    )
    device: str = _option(
        "MODEL.DEVICE",
        "train.device",
        "auto",
        "`auto` (CUDA, else MPS, else the CPU), `cpu`, `cuda`, `cuda:1`",
    )
    seed: int = _option(
        "SEED", "train.seed", -1, "seed of all random numbers; negative draws one, which is logged"
    )
    max_iter: int = _option(
        "SOLVER.MAX_ITER", "train.max_iter", 40000, "number of steps (updates) of the run", minimum=1
    )
    max_epochs: float = _option(
        "SOLVER.MAX_EPOCHS",
        None,
        0.0,
        "passes over the training data; above 0 it sets `MAX_ITER` and moves `STEPS` and `WARMUP_ITERS` in "
        "proportion",
    )
    fast_dev_run: bool = _option(
        None,
        "train.fast_dev_run.enabled",
        False,
        "a trial run of 20 steps with two evaluations, to check that all parts of a recipe work",
    )
    cudnn_benchmark: bool = _option(
        "CUDNN_BENCHMARK",
        "train.cudnn_benchmark",
        False,
        "let cuDNN try its algorithms for each input size; pays off when sizes vary little",
    )
    timeout: float = _option(
        "TRAIN.TIMEOUT",
        "train.timeout",
        1800,
        "seconds that a process waits for the others before the run ends with the names of the missing ones",
    )

    # The step.
    images_per_step: int = _option(
        "SOLVER.IMS_PER_BATCH",
        "dataloader.train.total_batch_size",
        16,
        "images of one update, over all processes",
        lazy_default=0,
    )
    accum_steps: int = _option(
        "SOLVER.ACCUM_STEPS",
        "train.accum_steps",
        1,
        "forward and backward passes that share the images of one update, to save memory",
        minimum=1,
    )
    precision: str = _option(
        "SOLVER.AMP.PRECISION",
        "train.amp.precision",
        "float16",
        "mixed precision: `float16`, whose gradients are scaled, or `bfloat16`, always used on the CPU",
        off="",
        choices=("float16", "bfloat16"),
    )
    clip_grad: dict[str, Any] | None = _option(
        None,
        "train.clip_grad.params",
        {},
        "arguments of `torch.nn.utils.clip_grad_norm_`, which clips all gradients together",
        off=None,
    )
    skip_non_finite: int = _option(
        "SOLVER.SKIP_NON_FINITE",
        "train.skip_non_finite",
        0,
        "how many steps in a row may be skipped because their loss is infinite or NaN; 0 ends the run at the "
        "first one",
        minimum=0,
    )
    ema_decay: float = _option(
        "SOLVER.EMA.DECAY",
        "train.model_ema.decay",
        0.9998,
        "decay of a moving average of the weights, which evaluation uses and checkpoints keep",
        lazy_default=0.999,
        off=0.0,
        minimum=0,
        below=1,
    )

    # The model.
    freeze: tuple[str, ...] = _option(
        "MODEL.FREEZE", "train.freeze", [], "parameters that are not trained, by name with `*` and `?`"
    )
    activation_checkpoint: bool = _option(
        "TRAIN.ACTIVATION_CHECKPOINT",
        "train.activation_checkpoint",
        False,
        "recompute the backbone's blocks in the backward pass instead of keeping their activations",
    )
    compile: bool = _option(
        "TRAIN.COMPILE.ENABLED",
        "train.compile.enabled",
        False,
        "compile parts of the model with `torch.compile`",
    )
    compile_modules: tuple[str, ...] = _option(
        "TRAIN.COMPILE.MODULES",
        "train.compile.modules",
        (),
        "names of these parts; empty for backbone and heads",
    )
    compile_backend: str = _option(
        "TRAIN.COMPILE.BACKEND", "train.compile.backend", "inductor", "backend of `torch.compile`"
    )

    # Multiple processes.
    strategy: str = _option(
        "TRAIN.STRATEGY",
        "train.strategy",
        "ddp",
        "`ddp` keeps the model in each process; `fsdp` shards parameters, gradients and optimizer state, for "
        "models that fill the memory",
        choices=("ddp", "fsdp"),
    )
    static_graph: bool = _option(
        "TRAIN.STATIC_GRAPH", None, False, "promise DDP that every step uses the same parameters"
    )
    find_unused_parameters: bool = _option(
        "TRAIN.FIND_UNUSED_PARAMETERS", None, False, "let DDP search for parameters that a step did not use"
    )
    ddp: dict[str, Any] = _option(
        None, "train.ddp", {}, "arguments of `DistributedDataParallel`, and `fp16_compression`"
    )

    # Checkpoints and evaluation.
    checkpoint_period: int = _option(
        "SOLVER.CHECKPOINT_PERIOD", "train.checkpointer.period", 5000, "steps between two checkpoints"
    )
    checkpoint_epochs: float = _option(
        "SOLVER.CHECKPOINT_EPOCHS", None, 0, "epochs between two checkpoints; above 0 it is used instead"
    )
    checkpoint_keep: int | None = _option(
        "SOLVER.CHECKPOINT_KEEP_LAST",
        "train.checkpointer.max_to_keep",
        0,
        "how many periodic checkpoints to keep, the newest ones; 0 keeps all",
        lazy_default=None,
        minimum=0,
    )
    checkpoint_async: bool = _option(
        "SOLVER.CHECKPOINT_ASYNC",
        "train.checkpointer.async_save",
        False,
        "write checkpoints in the background, from a copy in main memory",
    )
    eval_period: int = _option(
        "TEST.EVAL_PERIOD", "train.eval_period", 0, "steps between two evaluations; 0: only at the end"
    )
    eval_epochs: float = _option(
        "TEST.EVAL_EPOCHS",
        "train.eval_epochs",
        0.0,
        "epochs between two evaluations, fractions allowed; above 0 it is used instead",
    )
    val_loss: tuple[str, ...] = _option(
        "TEST.VAL_LOSS",
        None,
        (),
        "datasets with annotations whose losses each evaluation computes (lazy configs: a loader "
        "`dataloader.val_loss`)",
    )
    precise_bn_batches: int = _option(
        "TEST.PRECISE_BN.NUM_ITER",
        "train.precise_bn.num_iter",
        200,
        "training batches from which BatchNorm's statistics are recomputed before each evaluation",
        off=0,
    )
    best_metric: str = _option(
        "SOLVER.BEST_CHECKPOINT.METRIC",
        "train.best_checkpoint.metric",
        "",
        "metric of the best checkpoint, `model_best.pth`, such as `bbox/AP`; empty for none",
    )
    best_mode: str = _option(
        "SOLVER.BEST_CHECKPOINT.MODE",
        "train.best_checkpoint.mode",
        "max",
        "whether a higher (`max`) or a lower (`min`) value is better",
        choices=("max", "min"),
    )
    early_stop_patience: int = _option(
        "SOLVER.EARLY_STOP.PATIENCE",
        "train.early_stop.patience",
        0,
        "evaluations in a row without a better metric after which training ends; 0: never",
    )
    early_stop_metric: str = _option(
        "SOLVER.EARLY_STOP.METRIC",
        "train.early_stop.metric",
        "",
        "metric of early stopping; empty for metric and mode of the best checkpoint",
    )
    early_stop_mode: str | None = _option(
        "SOLVER.EARLY_STOP.MODE",
        "train.early_stop.mode",
        "max",
        "whether a higher (`max`) or a lower (`min`) value is better",
        lazy_default=None,
        choices=("max", "min"),
    )

    # Output.
    log_period: int = _option(
        "TRAIN.LOG_PERIOD",
        "train.log_period",
        20,
        "steps between two rows of metrics; each evaluation writes a row too",
        minimum=1,
    )
    writers: tuple[str, ...] = _option(
        "TRAIN.WRITERS",
        "train.writers",
        ("console", "json", "tensorboard", "csv"),
        "where metrics are written: `console`, `json`, `csv`, `tensorboard`, `wandb`, `mlflow`",
    )
    wandb_project: str = _option("TRAIN.WANDB.PROJECT", None, "", "project of the writer `wandb`")
    wandb_name: str = _option("TRAIN.WANDB.NAME", None, "", "name of its run")
    wandb: dict[str, Any] | None = _option(
        None,
        "train.wandb.params",
        {},
        "adds the writer `wandb`, with these arguments of `wandb.init`",
        off=None,
    )
    mlflow_uri: str = _option(
        "TRAIN.MLFLOW.TRACKING_URI", None, "", "server of the writer `mlflow`; empty for `OUTPUT_DIR/mlruns`"
    )
    mlflow_experiment: str = _option("TRAIN.MLFLOW.EXPERIMENT", None, "", "its experiment")
    mlflow_name: str = _option("TRAIN.MLFLOW.NAME", None, "", "name of its run")
    mlflow: dict[str, Any] | None = _option(
        None,
        "train.mlflow.params",
        {},
        "adds the writer `mlflow`; `tracking_uri`, `experiment` and `run_name`",
        off=None,
    )
    vis_period: int = _option(
        "VIS_PERIOD", "train.vis_period", 0, "steps between two visualizations of training images; 0: none"
    )
    profile_start: int = _option(
        "TRAIN.PROFILE.START", "train.profile.start", 20, "steps of the run before the first profiled one"
    )
    profile_steps: int = _option(
        "TRAIN.PROFILE.STEPS", "train.profile.steps", 5, "how many steps to profile", off=0
    )
    report: bool = _option(
        "TRAIN.REPORT",
        "train.report",
        True,
        "write curves, tables and images to `OUTPUT_DIR/report` at the end",
    )


def declarations() -> dict[str, Declaration]:
    """Return the declaration of each option by its name in `RunOptions`."""
    return {field.name: field.metadata["declaration"] for field in dataclasses.fields(RunOptions)}


def yaml_defaults() -> dict[str, Any]:
    """Return the defaults of the YAML keys: ``{"SOLVER.EMA.DECAY": 0.9998, ...}``."""
    defaults: dict[str, Any] = {}
    for declaration in declarations().values():
        if declaration.yaml_switch:
            defaults[declaration.yaml_switch] = False
        if declaration.yaml:
            defaults[declaration.yaml] = declaration.default
    return defaults
