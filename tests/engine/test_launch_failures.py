"""When one of several processes fails, all end soon, and the cause is what is said."""

import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from detlib.engine import ProcessFailedError, launch
from detlib.engine.distributed.failures import Failure, describe_failure, is_communication_error
from tests.engine import launching

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def quick_start(monkeypatch):
    launching.use_forkserver(monkeypatch)


def _fail(function, count: int, *args, timeout: float = 60) -> tuple[str, float]:
    """The message of a failed run, and the seconds that it took."""
    start = time.monotonic()
    with pytest.raises(ProcessFailedError) as error:
        launch(function, count, args=args, timeout=datetime.timedelta(seconds=timeout))
    return str(error.value), time.monotonic() - start


def test_error_ends_all_with_its_message():
    said, seconds = _fail(launching.one_fails, 3, 1)
    assert said.startswith("Process 1 of 3 failed with ValueError: the loss of this picture is undefined\n")
    assert "in fail_in_the_loss" in said and "all_reduce" not in said
    assert seconds < 40  # and not the minute of the time-out, on a busy machine either
    assert not launching.remaining_processes()


def test_killed_process_is_named_with_a_hint():
    said, seconds = _fail(launching.one_is_killed, 2, 1, signal.SIGKILL)
    assert said.startswith("Process 1 of 2 was ended by signal 9 (SIGKILL; pid ")
    assert "memory" in said and "DATALOADER.NUM_WORKERS" in said
    assert seconds < 40
    assert not launching.remaining_processes()


@pytest.mark.parametrize("operation", ["barrier", pytest.param("all_reduce", marks=pytest.mark.slow)])
def test_hanging_operation_names_who_is_missing_and_where(operation):
    said, seconds = _fail(launching.one_oversleeps, 3, 1, operation, timeout=3)
    assert said.startswith(
        "Processes 0, 2 of 3 waited in vain for process 1; an operation is given up after 3 s"
    )
    place = said.partition("Process 1 was at:")[2]
    assert "in oversleep" in place and "time.sleep(100)" in place
    if operation == "barrier":
        assert "Ranks 1 failed to pass monitoredBarrier" in said
    assert seconds < 40
    assert not launching.remaining_processes()


@pytest.mark.parametrize("where", [pytest.param("loss", marks=pytest.mark.slow), "loader"])
def test_failure_of_a_training_leaves_no_worker(tmp_path, where):
    said, _ = _fail(_train_and_fail, 2, str(tmp_path), where)
    assert said.startswith("Process 1 of 2 failed with ")
    assert {"loss": "the loss of this picture is undefined", "loader": "no such picture"}[where] in said
    assert not launching.remaining_processes()


def _train_and_fail(folder: str, where: str) -> None:
    if where == "loss":
        hooks = [launching.At(1, 1, launching.fail_in_the_loss)]
    else:
        hooks = [launching.At(0, 1, _break_the_mapper)]
    launching.train(folder, hooks, {"DATALOADER__NUM_WORKERS": 1})


def _break_the_mapper() -> None:
    raise FileNotFoundError("no such picture")


@pytest.mark.slow
def test_processes_whose_starter_is_killed_end(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_STARTER.format(folder=str(tmp_path)))
    starter = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    end = time.monotonic() + 120
    while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    pids = [int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*")]
    starter.kill()
    starter.wait()
    assert len(pids) == 2
    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=20)
    assert not alive


_STARTER = """
from detlib.engine import launch
from tests.engine.test_launch_failures import note_and_wait
if __name__ == "__main__":
    launch(note_and_wait, 2, args=({folder!r},))
"""


def note_and_wait(folder: str) -> None:
    Path(folder, f"pid{os.getpid()}").touch()
    launching.all_reduce_for_ever()


def test_cause_comes_before_its_consequences():
    lost = Failure(0, "lost", "RuntimeError: Connection closed by peer", "trace 0", order=1)
    gone = Failure.from_exit(2, 77, -9)
    raised = Failure(1, "error", "ValueError: bad", "trace 1", order=3)
    said = describe_failure([lost, raised], 4, {}, 5)
    assert said == "Process 1 of 4 failed with ValueError: bad\n\ntrace 1"
    assert describe_failure([lost, raised, gone], 4, {}, 5).startswith("Process 2 of 4 was ended by signal 9")
    said = describe_failure([lost], 3, {1: "here", 2: "there"}, 5)
    assert said.startswith("Process 0 of 3 waited in vain for processes 1, 2;")
    assert said.endswith("Process 1 was at:\n\nhere\n\nProcess 2 was at:\n\nthere")
    both = [lost, Failure(1, "lost", "RuntimeError: gloo", order=2)]
    assert "Processes 0, 1 of 2 lost the connection to each other." in describe_failure(both, 2, {}, 5)


def test_exit_without_a_word_is_told():
    assert "ended with exit code 3 and without a word (pid 5 on " in Failure.from_exit(0, 5, 3).title
    assert "SIGBUS" in Failure.from_exit(0, 5, -7).title and "/dev/shm" in Failure.from_exit(0, 5, -7).title
    assert "NCCL" in Failure.from_exit(0, 5, -6).title
    assert "is gone without a word" in Failure.from_exit(0, 5, None).title


def test_errors_of_communication_are_told_from_others():
    assert is_communication_error(dist.DistNetworkError("refused"))
    assert is_communication_error(RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert not is_communication_error(RuntimeError("CUDA out of memory"))
    assert not is_communication_error(ValueError("connection closed by peer"))
