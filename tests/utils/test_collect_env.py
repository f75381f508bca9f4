"""collect_env: the environment report."""

import torch

from detlib.ops import _library
from detlib.utils import collect_env
from detlib.utils.collect_env import collect_env_info


def test_report_has_versions_and_operator_implementations():
    report = collect_env_info()
    for line in (f"torch {torch.__version__}", "torchvision", "numpy", "fvcore", "Python"):
        assert line.split()[-1] in report
    for name in _library.OPERATORS:
        (row,) = [line.split() for line in report.splitlines() if line.split()[:1] == [name]]
        assert row[1] == _library.implementation(name, "cpu").split()[0]


def test_report_has_the_load_error_of_compiled_operators(monkeypatch):
    monkeypatch.setattr(_library, "native_load_error", "cannot be loaded: undefined symbol: f")
    assert "compiled operators: cannot be loaded: undefined symbol: f" in collect_env_info()


def test_cpu_torch_with_cuda_torchvision_is_reported(monkeypatch):
    error = "RuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(_library, "torchvision_ops", lambda: (None, error))
    monkeypatch.setattr(collect_env, "_torchvision_cuda", lambda: "13.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    report = collect_env_info()
    assert error in report
    assert "CPU torch with CUDA torchvision" in report and "built for CUDA 13.0" in report
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "a matching pair" in collect_env_info()
