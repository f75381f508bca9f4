"""Processes that a launcher has started find each other, their ranks and the cause of a failure."""

import socket

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from detlib.engine import launch
from detlib.engine.distributed.environment import info_from_environment, restart_count
from tests.engine import launching

pytestmark = pytest.mark.distributed

_TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
}
_SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
}
_PLAIN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}


@pytest.fixture(autouse=True)
def quick_start(monkeypatch):
    launching.use_forkserver(monkeypatch)


def _summary(env):
    info = info_from_environment(env)
    return info and (info.rank, info.world_size, info.local_rank, info.local_size, info.url)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, None),
        (_TORCHRUN, (3, 4, 1, 2, "env://")),
        (_TORCHRUN | _SRUN, (3, 4, 1, 2, "env://")),
        (_TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 1, 2, "env://")),
        (_PLAIN, (1, 2, None, None, "tcp://head:1234")),
        (_PLAIN | {"RANK": "0", "WORLD_SIZE": "1"}, None),
        (_PLAIN | {"MASTER_ADDR": "fe80::1", "LOCAL_RANK": "0"}, (1, 2, 0, None, "tcp://[fe80::1]:1234")),
        (_SRUN, (5, 8, 1, None, "tcp://gpu07:23456")),
        (_SRUN | {"SLURM_STEP_NODELIST": "login"}, (5, 8, 1, None, "tcp://login:23456")),
        (_SRUN | {"SLURM_STEP_NODELIST": "a[3,5]-ib,b"}, (5, 8, 1, None, "tcp://a3-ib:23456")),
        (_SRUN | {"MASTER_ADDR": "x", "MASTER_PORT": "7"}, (5, 8, 1, None, "tcp://x:7")),
        (_SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        # The environment of an sbatch script, which is not an srun task.
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
    ],
)
def test_ranks_are_read_from_the_environment_of_launchers(env, expected):
    assert _summary(env) == expected


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (_PLAIN | {"RANK": "2"}, r"rank 2 for 2 processes; it must be in \[0, 1\]"),
        (_PLAIN | {"RANK": "one"}, "RANK must be an integer, got 'one'"),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}, "WORLD_SIZE is not set"),
    ],
)
def test_invalid_environment_variable_is_named_in_the_error(env, message):
    with pytest.raises(ValueError, match=message):
        info_from_environment(env)


def test_restart_count_is_read_from_the_launchers_variable():
    assert restart_count({}) == (0, "")
    assert restart_count({"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": "2"}) == (
        2,
        "SLURM_RESTART_COUNT",
    )


def test_launch_rejects_inconsistent_numbers_of_processes(monkeypatch):
    with pytest.raises(ValueError, match="num_gpus_per_machine >= 1"):
        launch(print, 0)
    with pytest.raises(ValueError, match="Multiple machines need a dist_url"):
        launch(print, 1, num_machines=2)
    with pytest.raises(ValueError, match="dist_url must be tcp://HOST:PORT.*got 'udp://x:1'"):
        launch(print, 2, dist_url="udp://x:1")
    for name, value in _TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match="torchrun has started 4 processes, 2 on this machine, but 3 on each"
    ):
        launch(print, 3)


def test_single_process_of_torchrun_calls_the_function_directly(monkeypatch):
    for name, value in (_TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    seen = []
    launch(seen.append, 1, args=(3,))
    assert seen == [3]


def _free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _start_all(folder, size: int, function, *args, srun: bool = False) -> list[str]:
    """Start processes as a cluster does, and return the output of each, followed by its exit code."""
    port, processes = _free_port(), []
    for rank in range(size):
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if srun:
            env |= {"SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(size)}
        else:
            env |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
        out = str(folder / f"out{rank}")
        processes.append(launching.start_with(env, out, launching.launched, function, *args))
    for process in processes:
        process.join(60)
    assert not launching.remaining_processes()
    return [(folder / f"out{rank}").read_text() + str(p.exitcode) for rank, p in enumerate(processes)]


@pytest.mark.parametrize("srun", [False, True])
def test_processes_of_a_cluster_find_their_ranks(tmp_path, srun):
    printed = _start_all(tmp_path, 2, launching.write_ranks, str(tmp_path), srun=srun)
    assert printed == ["0", "0"]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["0 2 0 2", "1 2 1 2"]


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_all_processes_of_a_cluster_report_the_first_failure(tmp_path, bad_rank):
    printed = _start_all(tmp_path, 2, launching.one_fails, bad_rank)
    good, bad = printed[1 - bad_rank], printed[bad_rank]
    assert "in fail_in_the_loss" in bad and "ValueError: the loss of this image is undefined\n" in bad
    cause = f"Process {bad_rank} of 2 failed with ValueError: the loss of this image is undefined\n"
    assert cause in good
    assert good.endswith("1") and bad.endswith("1")


def test_torchrun_reports_the_failed_process_as_root_cause(tmp_path, capfd):
    with pytest.raises(ChildFailedError) as error:
        launching.run_agent(launching.agent_config(2), launching.one_fails, 1)
    message = str(error.value)
    root = message.partition("Root Cause")[2]
    assert "rank      : 1 " in root and "in fail_in_the_loss" in root
    assert "ValueError: the loss of this image is undefined\n" in root
    assert not launching.remaining_processes()


def test_training_on_two_machines_of_torchrun(tmp_path):
    port, processes = _free_port(), []
    folder = str(tmp_path / "out")
    for node in range(2):
        config = launching.agent_config(1, nodes=2, endpoint=f"127.0.0.1:{port}")
        out = str(tmp_path / f"node{node}")
        run = launching.run_agent
        processes.append(launching.start_with({}, out, run, config, launching.train, folder))
    for process in processes:
        process.join(100)
    assert [p.exitcode for p in processes] == [0, 0], (tmp_path / "node0").read_text()
    assert launching.read_model(folder)
    assert not launching.remaining_processes()
