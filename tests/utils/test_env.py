"""Threads and CPUs of the process."""

import os
import subprocess
import sys

import pytest
import torch

from detlib.utils import env


def test_available_cpus_respect_the_quota_of_a_container(tmp_path):
    file = tmp_path / "cpu.max"
    without = env.available_cpus(str(file))
    for text, expected in (("max 100000", without), ("50000 100000", 1), ("x", without), ("5 0", without)):
        file.write_text(text)
        assert env.available_cpus(str(file)) == expected


def test_threads_are_limited_and_an_overcommitted_machine_is_reported(monkeypatch, caplog):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(env, "available_cpus", lambda: 1)
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 9.0, 9.0))
    try:
        torch.set_num_threads(2)
        env.limit_threads()
        assert torch.get_num_threads() == 1 and "overcommitted" not in caplog.text
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)
        monkeypatch.setattr("os.getloadavg", lambda: (1000.0, 0.0, 0.0))
        env.limit_threads()
        assert torch.get_num_threads() == 2
        assert "overcommitted: a load of 1000.0" in caplog.text
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("load", "given", "expected"),
    [(1e6, {}, "passive"), (0.0, {}, "None"), (1e6, {"OMP_WAIT_POLICY": "active"}, "active")],
)
def test_waiting_threads_are_passive_on_a_busy_machine_unless_the_user_decides(load, given, expected):
    program = (
        f"import os; os.getloadavg = lambda: ({load}, 0.0, 0.0); import detlib; "
        "print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    variables = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert done.stdout.strip() == expected
