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
        "initial weights: a file or a URL; empty for random weights",
    )
    device: str = _option(
        "MODEL.DEVICE",
        "train.device",
        "auto",
        "device: `auto` (CUDA, else MPS, else CPU), `cpu`, `cuda`, `cuda:1`",
    )
    seed: int = _option(
        "SEED", "train.seed", -1, "seed of all random numbers; if negative, a random seed, which is logged"
    )
    max_iter: int = _option(
        "SOLVER.MAX_ITER",
        "train.max_iter",
        40000,
        "number of steps (optimizer updates) of the run",
        minimum=1,
    )
    max_epochs: float = _option(
        "SOLVER.MAX_EPOCHS",
        None,
        0.0,
        "number of epochs; if above 0, it sets `MAX_ITER` and scales `STEPS` and `WARMUP_ITERS` accordingly",
        minimum=0,
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
        "benchmark cuDNN's algorithms for each input size, which pays off if sizes vary little",
    )
    timeout: float = _option(
        "TRAIN.TIMEOUT",
        "train.timeout",
        1800,
        "seconds that a process waits for the others before the run fails and names the missing processes",
    )

    # The step.
    images_per_step: int = _option(
        "SOLVER.IMS_PER_BATCH",
        "dataloader.train.total_batch_size",
        16,
        "batch size of an update, over all processes",
        lazy_default=0,
        minimum=0,
    )
    accum_steps: int = _option(
        "SOLVER.ACCUM_STEPS",
        "train.accum_steps",
        1,
        "number of forward and backward passes that split the images of an update, to save memory",
        minimum=1,
    )
    precision: str = _option(
        "SOLVER.AMP.PRECISION",
        "train.amp.precision",
        "float16",
        "mixed precision: `float16`, with gradient scaling, or `bfloat16`, which is always used on the CPU",
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
        "maximum number of consecutive steps to skip because their loss is infinite or NaN; with 0, the run "
        "ends at the first one",
        minimum=0,
    )
    ema_decay: float = _option(
        "SOLVER.EMA.DECAY",
        "train.model_ema.decay",
        0.9998,
        "decay of the moving average of the weights, which evaluation uses and checkpoints include",
        lazy_default=0.999,
        off=0.0,
        minimum=0,
        below=1,
    )

    # The model.
    freeze: tuple[str, ...] = _option(
        "MODEL.FREEZE", "train.freeze", [], "frozen parameters, by name with the wildcards `*` and `?`"
    )
    activation_checkpoint: bool = _option(
        "TRAIN.ACTIVATION_CHECKPOINT",
        "train.activation_checkpoint",
        False,
        "recompute the blocks of the backbone in the backward pass instead of storing their activations",
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
        "names of the parts to compile; empty for backbone and heads",
    )
    compile_backend: str = _option(
        "TRAIN.COMPILE.BACKEND", "train.compile.backend", "inductor", "backend of `torch.compile`"
    )

    # Multiple processes.
    strategy: str = _option(
        "TRAIN.STRATEGY",
        "train.strategy",
        "ddp",
        "`ddp` replicates the model in each process; `fsdp` shards parameters, gradients and optimizer "
        "state, for models that do not fit in memory",
        choices=("ddp", "fsdp"),
    )
    static_graph: bool = _option(
        "TRAIN.STATIC_GRAPH", None, False, "tell DDP that every step uses the same parameters"
    )
    find_unused_parameters: bool = _option(
        "TRAIN.FIND_UNUSED_PARAMETERS", None, False, "let DDP search for parameters that a step does not use"
    )
    ddp: dict[str, Any] = _option(
        None, "train.ddp", {}, "arguments of `DistributedDataParallel`, and `fp16_compression`"
    )

    # Checkpoints and evaluation.
    checkpoint_period: int = _option(
        "SOLVER.CHECKPOINT_PERIOD", "train.checkpointer.period", 5000, "steps between two checkpoints"
    )
    checkpoint_epochs: float = _option(
        "SOLVER.CHECKPOINT_EPOCHS",
        None,
        0,
        "epochs between two checkpoints; if above 0, it replaces the number of steps",
        minimum=0,
    )
    checkpoint_keep: int | None = _option(
        "SOLVER.CHECKPOINT_KEEP_LAST",
        "train.checkpointer.max_to_keep",
        0,
        "number of the latest periodic checkpoints to keep; 0 keeps all",
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
        "epochs between two evaluations, fractions allowed; if above 0, it replaces the number of steps",
        minimum=0,
    )
    val_loss: tuple[str, ...] = _option(
        "TEST.VAL_LOSS",
        None,
        (),
        "annotated datasets on which each evaluation computes the losses (lazy configs: a loader "
        "`dataloader.val_loss`)",
    )
    precise_bn_batches: int = _option(
        "TEST.PRECISE_BN.NUM_ITER",
        "train.precise_bn.num_iter",
        200,
        "number of training batches to recompute the statistics of BatchNorm before each evaluation",
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
        "number of consecutive evaluations without improvement after which training ends; 0: never",
    )
    early_stop_metric: str = _option(
        "SOLVER.EARLY_STOP.METRIC",
        "train.early_stop.metric",
        "",
        "metric of early stopping; empty for the metric and mode of the best checkpoint",
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
        "steps between two rows of metrics; evaluations write a row too",
        minimum=1,
    )
    writers: tuple[str, ...] = _option(
        "TRAIN.WRITERS",
        "train.writers",
        ("console", "json", "tensorboard", "csv"),
        "where metrics are written: `console`, `json`, `csv`, `tensorboard`, `wandb`, `mlflow`",
    )
    wandb_project: str = _option("TRAIN.WANDB.PROJECT", None, "", "project of the writer `wandb`")
    wandb_name: str = _option("TRAIN.WANDB.NAME", None, "", "run name of the writer `wandb`")
    wandb: dict[str, Any] | None = _option(
        None,
        "train.wandb.params",
        {},
        "arguments of `wandb.init`; adds the writer `wandb`",
        off=None,
    )
    mlflow_uri: str = _option(
        "TRAIN.MLFLOW.TRACKING_URI", None, "", "server of the writer `mlflow`; empty for `OUTPUT_DIR/mlruns`"
    )
    mlflow_experiment: str = _option("TRAIN.MLFLOW.EXPERIMENT", None, "", "experiment of the writer `mlflow`")
    mlflow_name: str = _option("TRAIN.MLFLOW.NAME", None, "", "run name of the writer `mlflow`")
    mlflow: dict[str, Any] | None = _option(
        None,
        "train.mlflow.params",
        {},
        "`tracking_uri`, `experiment` and `run_name` of the writer `mlflow`, which it adds",
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
