"""Keys of how a training runs on its machines: TRAIN. None of them changes what is computed, but rounding."""

TRAIN = {
    # Several processes: "ddp" keeps the whole model in each; "fsdp" shares parameters, gradients and
    # optimizer state out between them (PyTorch's fully_shard), for models that fill the memory.
    "STRATEGY": "ddp",
    # For DDP: promise that each step uses the same parameters; or search for those that a step did not use.
    "STATIC_GRAPH": False,
    "FIND_UNUSED_PARAMETERS": False,
    # Seconds that a process waits for the others before it gives up.
    "TIMEOUT": 1800,
    # Compute the insides of the backbone's blocks again in the backward pass instead of keeping them.
    "ACTIVATION_CHECKPOINT": False,
    # torch.compile of parts of the model, by name; (): backbone and heads.
    "COMPILE": {"ENABLED": False, "MODULES": (), "BACKEND": "inductor"},
    # Write a trace of STEPS steps, after the first START of a run, into OUTPUT_DIR/profile, for
    # chrome://tracing.
    "PROFILE": {"ENABLED": False, "START": 20, "STEPS": 5},
    # What metrics are written to: "console", "json", "tensorboard", "csv", "wandb", "mlflow".
    "WRITERS": ("console", "json", "tensorboard", "csv"),
    # Of the writer "wandb"; "": what its environment variables say.
    "WANDB": {"PROJECT": "", "NAME": ""},
    # Of the writer "mlflow"; "": what its environment variables say, or the folder OUTPUT_DIR/mlruns.
    "MLFLOW": {"TRACKING_URI": "", "EXPERIMENT": "", "NAME": ""},
    # Iterations between two lines.
    "LOG_PERIOD": 20,
    # Draw curves, tables and pictures of the run into OUTPUT_DIR/report at its end.
    "REPORT": True,
}
