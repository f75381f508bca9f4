"""Helpers of the launch tests: functions that run in multiple processes, and fast ways to start them."""

import datetime
import multiprocessing
import os
import signal
import subprocess
import time

import psutil
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from detlib.engine import DefaultTrainer, HookBase, launch
from detlib.engine.distributed.environment import should_resume
from detlib.engine.hooks import StopOnSignal
from detlib.utils import comm
from detlib.utils.env import seed_all_rng
from tests.builders import tiny_cfg

TIMEOUT = datetime.timedelta(seconds=60)


def use_forkserver(monkeypatch) -> None:
    """Fork processes from a server that has imported everything, which is ten times faster."""
    multiprocessing.set_forkserver_preload(["tests.engine.launching"])
    monkeypatch.setattr("detlib.engine.distributed.supervisor._START_METHOD", "forkserver")


def remaining_processes(seconds: float = 8.0) -> list[str]:
    """Return the children of this process that are still alive, without helpers of Python itself.

    Data-loader workers whose process was killed notice that within five seconds.
    """
    end = time.monotonic() + seconds
    while True:
        left = [p for p in psutil.Process().children(recursive=True) if _is_ours(p)]
        if not left or time.monotonic() > end:
            return [f"{p.pid}: {' '.join(p.cmdline())}" for p in left]
        time.sleep(0.1)


def _is_ours(process: psutil.Process) -> bool:
    try:
        command = " ".join(process.cmdline())
        if "resource_tracker" in command or process.status() == psutil.STATUS_ZOMBIE:
            return False
        # The server is a child of this process. The processes that it forks have the same command line.
        return "forkserver" not in command or process.ppid() != os.getpid()
    except psutil.NoSuchProcess:
        return False


def agent_config(count: int, nodes: int = 1, endpoint: str = "localhost:0", **kwargs) -> LaunchConfig:
    """Return the configuration of torchrun's agent, for `count` processes per node."""
    return LaunchConfig(
        nodes,
        nodes,
        count,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        run_id="test",
        monitor_interval=0.1,
        start_method="forkserver",
        **{"max_restarts": 0, **kwargs},
    )


def run_agent(config: LaunchConfig, function, *args) -> None:
    """Run a function in the processes of an agent, and restore the signal handlers that it replaces."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in signals}
    try:
        elastic_launch(config, launched)(function, *args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start_with(environment: dict[str, str], output: str, function, *args):
    """Start a process with environment variables, as the launcher of a cluster does, and return it."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_in_environment, args=(environment, output, function, args))
    process.start()
    return process


def _in_environment(environment: dict[str, str], output: str, function, args: tuple) -> None:
    os.environ.update(environment)
    with open(output, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    function(*args)


def all_reduce_forever() -> None:
    while True:
        torch.distributed.all_reduce(torch.ones(1))


def fail_in_the_loss() -> None:
    raise ValueError("the loss of this image is undefined")


def one_fails(bad_rank: int) -> None:
    if comm.get_rank() == bad_rank:
        time.sleep(0.3)
        fail_in_the_loss()
    all_reduce_forever()


def one_is_killed(bad_rank: int, signum: int) -> None:
    if comm.get_rank() == bad_rank:
        time.sleep(0.3)
        os.kill(os.getpid(), signum)
    all_reduce_forever()


def oversleep() -> None:
    time.sleep(100)


def one_oversleeps(bad_rank: int, operation: str) -> None:
    if comm.get_rank() == bad_rank:
        oversleep()
    if operation == "barrier":
        comm.synchronize()
    else:
        all_reduce_forever()


def write_ranks(folder: str) -> None:
    with open(f"{folder}/{comm.get_rank()}", "w") as f:
        f.write(f"{comm.get_rank()} {comm.get_world_size()} {comm.get_local_rank()} {comm.get_local_size()}")


class At(HookBase):
    """A hook that calls a function after a given step of one process."""

    def __init__(self, iteration: int, rank: int, do):
        self._iteration, self._rank, self._do = iteration, rank, do

    def after_step(self) -> None:
        if (self.trainer.iter, comm.get_rank()) == (self._iteration, self._rank):
            self._do()


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_this_process_and_its_workers() -> None:
    """Send SIGTERM to this process and its data-loader workers, as Slurm and a system shutdown do."""
    own = psutil.Process()
    all_of_us = [str(p.pid) for p in [*own.children(), own] if p.cmdline() == own.cmdline()]
    # From another process, because workers obey a signal of the process they belong to.
    subprocess.run(["kill", *all_of_us], check=True)


def training_cfg(folder, **overrides):
    """Return the config of a proposal network trained for 6 steps, with a checkpoint every 2 steps."""
    light = {
        "MODEL__META_ARCHITECTURE": "ProposalNetwork",
        "MODEL__MASK_ON": False,
        "DATASETS__TEST": (),
        "SOLVER__MAX_ITER": 6,
        "SOLVER__CHECKPOINT_PERIOD": 2,
    }
    return tiny_cfg(folder, **light | overrides)


def train(folder: str, hooks: list = (), overrides: dict | None = None, resume: bool = False) -> None:
    """Train like tools/train_net.py, with `hooks` after the default ones."""
    torch.set_num_threads(1)
    cfg = training_cfg(folder, **(overrides or {}))
    seed_all_rng(cfg.SEED + comm.get_rank())
    resume = should_resume(resume, folder)
    trainer = DefaultTrainer(cfg)
    trainer.register_hooks([*hooks, StopOnSignal(trainer.checkpointer)])
    trainer.resume_or_load(resume=resume)
    trainer.train()


def train_and_be_killed_once(folder: str, rank: int, iteration: int) -> None:
    """Train, and kill one process after a step of the first start."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    train(folder, [At(iteration, rank, kill_this_process)] if first else [])


def train_and_be_preempted_once(folder: str) -> None:
    """Train, and send rank 0 the signal with which submitit announces the job's time limit."""
    first = os.environ["DETLIB_RESTART_COUNT"] == "0"
    train(folder, [At(2, 0, lambda: os.kill(os.getpid(), signal.SIGUSR2))] if first else [])


def launched(function, *args) -> None:
    """Call `launch` in a process that a launcher has started."""
    launch(function, 1, args=args, timeout=TIMEOUT)


def read_model(folder) -> dict[str, torch.Tensor]:
    """Return the parameters at the end of a training run."""
    return torch.load(os.path.join(folder, "model_final.pth"), weights_only=True)["model"]
