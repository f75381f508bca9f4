"""The training script in multiple processes, started from the command line."""

import importlib.util
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from detlib.engine import ProcessFailedError
from tests.engine.launching import read_model, remaining_processes, training_cfg

pytestmark = pytest.mark.distributed

_SCRIPT = Path(__file__).parents[2] / "tools" / "train_net.py"
_LAZY = "configs/Quickstart/fcos_R_18_FPN_shapes.py"
_TORCHRUN = ("-m", "torch.distributed.run")


def _write_config(folder, **overrides) -> str:
    path = folder / "config.yaml"
    overrides = {"TRAIN__REPORT": False, "SOLVER__IMS_PER_BATCH": 4, **overrides}
    path.write_text(training_cfg(folder / "out", **overrides).dump())
    return str(path)


def _start(*arguments: str, **kwargs) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(_SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        **kwargs,
    )


def _run(*arguments: str) -> str:
    """Run a program that must succeed, and return its output."""
    process = _start(*arguments)
    printed = process.communicate(timeout=400)[0]
    assert process.returncode == 0, printed[-3000:]
    return printed


def _train(config: str, out, count: int = 2) -> str:
    return _run(str(_SCRIPT), "--num-gpus", str(count), "--config-file", config, "OUTPUT_DIR", str(out))


def _assert_equal_models(one, other, tolerance: float = 0.0) -> None:
    one, other = read_model(one), read_model(other)
    difference = max((one[name] - other[name]).abs().max().item() for name in one)
    assert difference <= tolerance, f"the parameters differ by {difference}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _iterations_done(out: Path) -> int:
    path = out / "last_checkpoint"
    if not path.exists():
        return 0
    name = path.read_text()
    return 99 if "final" in name else int(name.removeprefix("model_").removesuffix(".pth")) + 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_killed_process_does_not_change_the_result(tmp_path, count):
    """A process is killed at a random time, and torchrun restarts all processes."""
    rng = random.Random()
    iterations = 16
    config = _write_config(
        tmp_path, SOLVER__MAX_ITER=iterations, SOLVER__CHECKPOINT_PERIOD=3, DATALOADER__NUM_WORKERS=1
    )
    _train(config, tmp_path / "reference", count)
    out = tmp_path / "out"
    options = ("--standalone", "--nproc-per-node", str(count), "--max-restarts=3")
    process = _start(*_TORCHRUN, *options, str(_SCRIPT), "--config-file", config)
    until = rng.randrange(0, iterations - 3)
    while _iterations_done(out) < until and process.poll() is None:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 3))
    workers = [p for p in psutil.Process(process.pid).children() if str(_SCRIPT) in p.cmdline()]
    assert len(workers) == count
    rng.choice(workers).kill()
    killed_at = _iterations_done(out)
    printed = process.communicate(timeout=500)[0]
    print(f"killed with {killed_at} iterations saved")
    assert process.returncode == 0, printed[-3000:]
    assert "Restart 1 (TORCHELASTIC_RESTART_COUNT)" in printed or killed_at == 0
    _assert_equal_models(out, tmp_path / "reference")
    assert not remaining_processes()


@pytest.mark.slow
def test_two_machines_give_the_same_result_as_one(tmp_path):
    config = _write_config(tmp_path)
    _train(config, tmp_path / "reference")
    endpoint = f"127.0.0.1:{_free_port()}"
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test")
    options = ("--nnodes", "2", "--nproc-per-node", "1", *rendezvous)
    nodes = [_start(*_TORCHRUN, *options, str(_SCRIPT), "--config-file", config) for _ in range(2)]
    printed = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed[0][-3000:] + printed[1][-3000:]
    _assert_equal_models(tmp_path / "out", tmp_path / "reference")
    url = f"tcp://127.0.0.1:{_free_port()}"
    options = ("--num-machines", "2", "--dist-url", url, "--config-file", config, "--machine-rank")
    overrides = ("OUTPUT_DIR", str(tmp_path / "flags"))
    nodes = [_start(str(_SCRIPT), *options, str(i), *overrides) for i in range(2)]
    printed = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed[0][-3000:] + printed[1][-3000:]
    _assert_equal_models(tmp_path / "flags", tmp_path / "reference")
    assert not remaining_processes()


@pytest.mark.slow
def test_lazy_config_trains_the_same_with_spawn_and_torchrun(tmp_path):
    overrides = ("train.max_iter=3", "train.device=cpu", "dataloader.train.num_workers=0")
    overrides = (*overrides, "+train.timeout=100", "~dataloader.test", "~dataloader.evaluator")
    common = ("--config-file", _LAZY, *overrides)
    _run(str(_SCRIPT), "--num-gpus", "2", *common, f"train.output_dir={tmp_path / 'spawned'}")
    options = ("--standalone", "--nproc-per-node", "2", str(_SCRIPT))
    _run(*_TORCHRUN, *options, *common, f"train.output_dir={tmp_path / 'torchrun'}")
    _assert_equal_models(tmp_path / "spawned", tmp_path / "torchrun")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["spawn", "torchrun"])
def test_error_of_a_process_is_printed_last(tmp_path, launcher):
    config = _write_config(tmp_path, DATALOADER__NUM_WORKERS=1)
    options = ("--config-file", config, "SOLVER.BASE_LR", "1e12", "SOLVER.MAX_ITER", "30")
    if launcher == "spawn":
        process = _start(str(_SCRIPT), "--num-gpus", "2", *options)
    else:
        process = _start(*_TORCHRUN, "--standalone", "--nproc-per-node", "2", str(_SCRIPT), *options)
    printed = process.communicate(timeout=400)[0]
    assert process.returncode == 1
    mark = "train_net.py: error: Process" if launcher == "spawn" else "Root Cause"
    last = printed[printed.rindex(mark) :]
    assert "of 2 failed with FloatingPointError" in last and "infinite or NaN" in last
    assert "Connection closed" not in last
    assert not remaining_processes()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["alone", "spawn", "torchrun"])
def test_sigterm_saves_and_ends_with_143(tmp_path, launcher):
    config = _write_config(tmp_path, SOLVER__MAX_ITER=5000, DATALOADER__NUM_WORKERS=1)
    options = ("--config-file", config)
    if launcher == "torchrun":
        process = _start(*_TORCHRUN, "--standalone", "--nproc-per-node", "2", str(_SCRIPT), *options)
    else:
        process = _start(str(_SCRIPT), "--num-gpus", "2" if launcher == "spawn" else "1", *options)
    while _iterations_done(tmp_path / "out") < 4:
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    printed = process.communicate(timeout=100)[0]
    assert "Stopped by SIGTERM after iteration" in printed
    # torchrun has its own exit code.
    assert process.returncode == (1 if launcher == "torchrun" else 143), printed[-2000:]
    assert not remaining_processes()


def _load_script():
    spec = importlib.util.spec_from_file_location("train_net", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_failed_process_exits_with_1_and_prints_the_error(tmp_path, monkeypatch, capsys):
    script = _load_script()
    seen = {}

    def launch(*args, **kwargs):
        seen.update(kwargs)
        raise ProcessFailedError("Process 1 of 2 failed with ValueError: bad")

    monkeypatch.setattr(script, "launch", launch)
    config = _write_config(tmp_path, TRAIN__TIMEOUT=77)
    with pytest.raises(SystemExit) as end:
        script.run(["--num-gpus", "2", "--config-file", config])
    assert end.value.code == 1
    assert capsys.readouterr().err.endswith("error: Process 1 of 2 failed with ValueError: bad\n")
    assert seen["timeout"].total_seconds() == 77


@pytest.mark.parametrize("timeout", ["0", "-5"])
def test_timeout_that_is_not_positive_fails(tmp_path, capsys, timeout):
    with pytest.raises(SystemExit) as end:
        _load_script().run(["--config-file", _write_config(tmp_path), "TRAIN.TIMEOUT", timeout])
    assert end.value.code == 2 and "must be above 0 seconds" in capsys.readouterr().err


def test_slurm_job_runs_the_same_command(tmp_path, monkeypatch, capsys):
    script = _load_script()
    seen = {}

    class Job:
        job_id = "5"

        class paths:  # noqa: N801
            folder = "logs"

    def submit(path, argv, args, **kwargs):
        seen.update(kwargs, path=path, argv=argv, num_gpus=args.num_gpus)
        return Job

    monkeypatch.setattr(script, "submit", submit)
    argv = ["--num-gpus", "4", "--config-file", _write_config(tmp_path), "SOLVER.BASE_LR", "0.1"]
    script.run(["--slurm", *argv])
    assert seen.pop("path") == str(_SCRIPT)
    assert seen == dict(argv=argv, num_gpus=4, folder=str(tmp_path / "out" / "slurm"), use_gpus=False)
    assert "Submitted job 5; its logs go to logs" in capsys.readouterr().out
