"""Keys of the run as a whole."""

RUN = {
    # Version of the names of the keys: raised when a key changes, see detlib.config.compat.
    "VERSION": 2,
    # Where logs, metrics, checkpoints and predictions go.
    "OUTPUT_DIR": "./output",
    # Seed of all random numbers. Negative: a fresh one each run (it is logged). A fixed seed makes runs
    # comparable; bitwise repetition also needs deterministic operators.
    "SEED": -1,
    # Whether cuDNN tries its algorithms for each input size. It pays when sizes vary little.
    "CUDNN_BENCHMARK": False,
    # Precision of float32 matrix products, for torch.set_float32_matmul_precision: "", "highest", "high",
    # "medium". "" leaves torch's own setting.
    "FLOAT32_PRECISION": "",
    # Iterations between pictures of ground truth and predictions in the event storage; 0: none.
    "VIS_PERIOD": 0,
    # A number that code can read through `global_cfg` in short experiments; code that stays should not use
    # it.
    "GLOBAL": {"HACK": 1.0},
}
