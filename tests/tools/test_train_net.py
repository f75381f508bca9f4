"""The training script: its output files and its error messages."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.builders import tiny_cfg

_SCRIPT = Path(__file__).parents[2] / "tools" / "train_net.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_net", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write_config(folder) -> str:
    path = folder / "config.yaml"
    path.write_text(tiny_cfg(folder / "out").dump())
    return str(path)


def test_script_trains_resumes_and_evaluates(script, tmp_path, capsys):
    config, out = _write_config(tmp_path), tmp_path / "out"
    script.run(["--config-file", config, "SOLVER.MAX_ITER", "1"])
    printed = capsys.readouterr().out
    assert "Results, bbox:" in printed and "Results, segm:" in printed
    for name in ("model_final.pth", "last_checkpoint", "metrics.json", "config.yaml", "log.txt", "inference"):
        assert (out / name).exists(), name
    page = (out / "report" / "index.html").read_text()
    assert "1 of 1, finished" in page and "Best images" in page
    assert "total_loss" in json.loads((out / "metrics.json").read_text().splitlines()[0])
    visualizations = sorted((out / "predictions").iterdir())
    assert len(visualizations) == 4 and all(path.suffix == ".png" for path in visualizations)
    assert max(Image.open(visualizations[0]).size) >= 600

    script.run(["--config-file", config, "--resume", "SOLVER.MAX_ITER", "2", "TRAIN.REPORT", "False"])
    assert (out / "report" / "index.html").read_text() == page
    assert "Starting training from iteration 1 of 2" in capsys.readouterr().out
    assert torch.load(out / "model_final.pth", weights_only=True)["iteration"] == 1

    weights = str(out / "model_final.pth")
    other = tmp_path / "eval"
    script.run(["--config-file", config, "--eval-only", "MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(other)])
    assert "no metrics.json" in (other / "report" / "index.html").read_text()
    printed = capsys.readouterr().out
    assert "Results, bbox:" in printed and "Starting training" not in printed
    assert not (other / "model_final.pth").exists() and len(os.listdir(other / "predictions")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "/no/such/config.yaml"], "/no/such/config.yaml"),
        (["SOLVER.BASE_LRR", "0.1"], "SOLVER.BASE_LR"),
        (["SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR"),
        (["DATASETS.TEST", "('nowhere',)"], "nowhere"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["MODEL.WEIGHTS", "/no/such/weights.pth"], "/no/such/weights.pth"),
    ],
)
def test_config_error_prints_one_line_and_exits_with_2(script, tmp_path, capsys, arguments, message):
    config = [] if "--config-file" in arguments else ["--config-file", _write_config(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        script.run(config + arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "error: " in lines[0] and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_wrong_value_in_a_lazy_config_prints_one_line(script, tmp_path, capsys):
    config = str(_SCRIPT.parents[1] / "configs" / "Quickstart" / "fcos_R_18_FPN_shapes.py")
    for override, message in (
        ("train.max_iter=abc", "train.max_iter) must be an integer, got 'abc'"),
        ("train.max_iter=-5", "train.max_iter) must be at least 1, got -5"),
        ("optimizer.lr=inf", "optimizer.lr must be finite"),
        ("optimizer.lr=fast", "optimizer.lr must be a number, got 'fast'"),
    ):
        with pytest.raises(SystemExit) as stop:
            script.run(["--config-file", config, override, f"train.output_dir={tmp_path / 'out'}"])
        assert stop.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_output_folder_that_is_a_file_or_in_use_prints_one_line(script, tmp_path, capsys):
    config, out = _write_config(tmp_path), tmp_path / "out"
    out.write_text("")
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / ".training_lock").write_text('{"host": "node7", "pid": 12, "processes": 1}')
    for folder, message in ((out, "must be a folder"), (locked, "process 12 on host node7")):
        with pytest.raises(SystemExit) as stop:
            script.run(["--config-file", config, "OUTPUT_DIR", str(folder)])
        assert stop.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and "OUTPUT_DIR" in lines[0] and message in lines[0]
    assert len(list(locked.iterdir())) == 1


def test_script_runs_as_a_program():
    result = subprocess.run(
        [sys.executable, str(_SCRIPT), "--config-file", "/no/such.yaml"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_SCRIPT.parents[1])},
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and "/no/such.yaml" in result.stderr
