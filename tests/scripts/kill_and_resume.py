"""Kill training runs at random times, resume them, and compare their results.

    python tests/scripts/kill_and_resume.py 50

Every run is a forked process, which saves the time for imports. Its phase when it is killed (training,
saving, evaluating) is in shared memory. The script prints one line, and exits with 1 if a resumed run differs
from an uninterrupted run in its parameters, best checkpoint or evaluation results, or if it has two rows for
one iteration.
"""

import csv
import json
import logging
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections import Counter
from pathlib import Path

import torch

from detlib.checkpoint import Checkpointer
from detlib.engine import DefaultTrainer, default_setup, hooks
from tests.builders import tiny_cfg

_STEPS = 8


def _marking(phase: str, memory: mmap.mmap, function):
    """Wrap a function so that the shared memory has the phase while it runs."""

    def marked(*args, **kwargs):
        memory[:1] = phase.encode()
        try:
            return function(*args, **kwargs)
        finally:
            memory[:1] = b"t"

    return marked


def _train(folder: Path, memory: mmap.mmap, asynchronous: bool) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    Checkpointer._write = _marking("s", memory, Checkpointer._write)
    hooks.EvalHook._do_eval = _marking("e", memory, hooks.EvalHook._do_eval)
    cfg = tiny_cfg(
        folder,
        SOLVER__MAX_ITER=_STEPS,
        SOLVER__CHECKPOINT_PERIOD=1,
        SOLVER__CHECKPOINT_KEEP_LAST=2,
        SOLVER__CHECKPOINT_ASYNC=asynchronous,
        SOLVER__EMA__ENABLED=True,
        SOLVER__BEST_CHECKPOINT__METRIC="val/total_loss",
        SOLVER__BEST_CHECKPOINT__MODE="min",
        TEST__EVAL_PERIOD=2,
        TEST__VAL_LOSS=("shapes:val?num=2&size=64",),
        DATASETS__TEST=("shapes:val?num=2&size=64",),
        # A narrow network, to keep the checkpoints small.
        MODEL__RESNETS__DEPTH=50,
        MODEL__RESNETS__NORM="BN",
        MODEL__RESNETS__STEM_OUT_CHANNELS=8,
        MODEL__RESNETS__RES2_OUT_CHANNELS=32,
        MODEL__RESNETS__WIDTH_PER_GROUP=8,
    )
    default_setup(cfg, Namespace(eval_only=False))
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=True)
    memory[:1] = b"t"
    trainer.train()


def _start(folder: Path, memory: mmap.mmap, asynchronous: bool) -> int:
    memory[:1] = b"b"  # building
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.setpgid(0, 0)
        _train(folder, memory, asynchronous)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def _finish(folder: Path, memory: mmap.mmap, asynchronous: bool) -> dict:
    _, status = os.waitpid(_start(folder, memory, asynchronous), 0)
    if status:
        raise RuntimeError(f"A run in {folder} that was not killed ended with status {status}")
    final = torch.load(folder / "model_final.pth", weights_only=True)
    best = torch.load(folder / "model_best.pth", weights_only=True)
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    with open(folder / "metrics.csv", newline="") as f:
        table = list(csv.DictReader(f))
    return {
        "model": final["model"],
        "ema": final["ema_state"],
        "optimizer": final["trainer"]["_trainer"]["optimizer"],
        "best": {"model": best["model"], "state": best["best"]},
        "losses": [(row["iteration"], row["val/total_loss"]) for row in rows if "val/total_loss" in row],
        "twice": _repeated(rows) + _repeated(table),
    }


def _repeated(rows: list[dict]) -> list:
    """Return the iterations with more than one row. A missing row is fine: a kill may lose the last one."""
    return [iteration for iteration, n in Counter(row["iteration"] for row in rows).items() if n > 1]


def _equal(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    return one == two


def main(number: int, seed: int = 0) -> int:
    """Kill and resume `number` runs, and return how many of them have different results."""
    memory = mmap.mmap(-1, 1)
    draw = random.Random(seed)
    phases: Counter = Counter()
    different = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        start = time.monotonic()
        reference = _finish(root / "reference", memory, False)
        duration = time.monotonic() - start
        for k in range(number):
            asynchronous = k % 2 == 1
            while True:
                folder = root / f"run{k}"
                pid = _start(folder, memory, asynchronous)
                time.sleep(draw.uniform(0.05, 1.0) * duration)
                phase = memory[:1].decode()
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                if os.WIFSIGNALED(status):
                    break
                # The run had already finished: the machine is faster than during the first run.
                shutil.rmtree(folder)
                duration *= 0.8
            phases[phase] += 1
            different += not _equal(_finish(folder, memory, asynchronous), reference)
            shutil.rmtree(folder)
    names = {"b": "starting", "t": "training", "s": "saving", "e": "evaluating"}
    listed = ", ".join(f"{count} {names[phase]}" for phase, count in sorted(phases.items()))
    print(f"{number} runs killed ({listed}) and resumed: {number - different} have the same results")
    return different


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]), *map(int, sys.argv[2:]))))
