"""Slurm jobs, run with submitit's executor for the local machine."""

import argparse
import os
import signal
import sys

import pytest
import torch

from detlib.engine import default_argument_parser
from detlib.engine.distributed.slurm import SlurmJob, submit, submit_script
from tests.engine import launching

pytestmark = pytest.mark.distributed

_SCRIPT = """
import sys
from tests.engine import launching
launching.launched(getattr(launching, sys.argv[1]), sys.argv[2])
"""


def _submit(folder, monkeypatch, tasks: int, function: str):
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    script = folder / "script.py"
    script.write_text(_SCRIPT)
    arguments = ["--slurm-cluster", "local", "--slurm-timeout-min", "5", "--num-gpus", str(tasks)]
    args = default_argument_parser().parse_args(arguments)
    return submit(
        str(script), [function, str(folder / "out")], args, folder=str(folder / "slurm"), use_gpus=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 2])
def test_job_is_requeued_and_resumes(tmp_path, monkeypatch, tasks):
    job = _submit(tmp_path, monkeypatch, tasks, "train_and_be_preempted_once")
    job.wait()
    log = job.stdout() + job.stderr()
    assert "stopping after this step to requeue the job" in log
    assert "Stopped by SIGUSR2 after iteration 2, which is saved in" in log
    assert "Requeued job" in log
    assert "next is iteration 3 of 6" in log
    assert job.results() == [None] * tasks  # it raises if the job failed
    launching.use_forkserver(monkeypatch)
    launching.launch(
        launching.train, tasks, args=(str(tmp_path / "uninterrupted"),), timeout=launching.TIMEOUT
    )
    resumed, uninterrupted = (launching.read_model(tmp_path / name) for name in ("out", "uninterrupted"))
    assert resumed and all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    assert not launching.remaining_processes()


def test_signal_saves_before_the_job_is_requeued(tmp_path, monkeypatch):
    """Same as above, without submitit's own processes."""
    launching.use_forkserver(monkeypatch)
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(_SCRIPT)
    env = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "77"}
    job = SlurmJob(str(script), ["train_and_be_preempted_once", str(out)])
    for attempt, exit_code in enumerate((144, 0)):
        process = launching.start_with(env, str(tmp_path / f"log{attempt}"), _run_job, job)
        process.join(100)
        assert process.exitcode == exit_code, (tmp_path / f"log{attempt}").read_text()
        job = job.checkpoint().function
        if attempt == 0:
            assert (out / "last_checkpoint").read_text() == "model_0000002.pth"
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    resumed = [file for file in os.listdir(out) if file.startswith("model_")]
    assert "model_0000001.pth" in resumed and "model_0000003.pth" in resumed


def _run_job(job: SlurmJob) -> None:
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit(144))  # as submitit does after a requeue
    job()


@pytest.mark.slow
def test_failed_job_raises_the_error_of_the_script(tmp_path, monkeypatch):
    job = _submit(tmp_path, monkeypatch, 1, "no_such_function")
    with pytest.raises(Exception, match="no_such_function"):
        job.result()


def test_requeued_job_counts_its_restarts():
    job = SlurmJob("script.py", ["a", "b"]).checkpoint().function
    assert (job.argv, job.restarts) == (["a", "b"], 1)
    assert job.script == os.path.abspath("script.py")


def test_arguments_reach_sbatch(tmp_path, monkeypatch):
    """There is no sbatch here: check the arguments that submitit would pass to it."""
    submitit = pytest.importorskip("submitit")
    seen = {}

    class Executor:
        def __init__(self, **kwargs):
            seen.update(kwargs)

        def update_parameters(self, **kwargs):
            seen.update(kwargs)

        def submit(self, job):
            seen["job"] = job
            return argparse.Namespace(job_id="7", paths=argparse.Namespace(folder="logs"))

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    script = tmp_path / "train.py"
    script.write_text("")
    options = "--num-gpus 8 --num-machines 2 --slurm-partition gpu --slurm-timeout-min 60 --slurm-mem-gb 200"
    submit_script(
        [*options.split(), "--slurm-arg", "account=vision", "--slurm-arg", "no-kill=yes", str(script), "-x"]
    )
    job = seen.pop("job")
    assert (job.script, job.argv) == (str(script), ["-x"])
    assert seen == dict(
        folder="slurm",
        cluster="slurm",
        slurm_max_num_timeout=20,
        local_max_num_timeout=20,
        name="detlib",
        nodes=2,
        tasks_per_node=8,
        gpus_per_node=8,
        cpus_per_task=8,
        mem_gb=200.0,
        timeout_min=60,
        slurm_partition="gpu",
        slurm_signal_delay_s=120,
        slurm_additional_parameters={"account": "vision", "no_kill": "yes"},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_script.py"], "no_such_script.py"),
        (["--slurm-arg", "account", __file__], "must be KEY=VALUE, such as account=vision; got 'account'"),
    ],
)
def test_invalid_arguments_give_a_one_line_error(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        submit_script(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err
