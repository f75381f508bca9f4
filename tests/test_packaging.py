"""The build backend, the contents of the wheel, and the CI script."""

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("setuptools", minversion="77")
    for variable in ("DETLIB_BUILD", "CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("detlib_build", ROOT / "build_backend" / "detlib_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_tool(directory, name, output="", status=0):
    tool = directory / "bin" / name
    tool.parent.mkdir(parents=True, exist_ok=True)
    tool.write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n")
    tool.chmod(0o755)
    return tool


def fake_cuda(directory, version):
    (directory / "include").mkdir(parents=True)
    (directory / "include" / "cuda_runtime.h").touch()
    fake_tool(directory, "nvcc", f"Cuda compilation tools, release {version}, V{version}.1")
    return directory


def test_torch_is_a_build_requirement_only_when_something_is_compiled(backend, monkeypatch, tmp_path):
    def required():
        names = [backend.get_requires_for_build_wheel(), backend.get_requires_for_build_editable()]
        assert ("ninja" in names[0]) == ("ninja" in names[1])
        return any(name.startswith("torch") for name in names[0]) and "ninja" in names[1]

    monkeypatch.setenv("PATH", str(tmp_path))
    assert not required()  # no compiler
    fake_tool(tmp_path, "g++")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert required()
    monkeypatch.setenv("DETLIB_BUILD", "off")
    assert not required()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DETLIB_BUILD", "cpu")
    assert required()  # requested, so a missing compiler must fail the build


def test_unknown_build_mode_is_rejected(backend, monkeypatch):
    monkeypatch.setenv("DETLIB_BUILD", "gpu")
    with pytest.raises(ValueError, match="DETLIB_BUILD must be one of off, cpu, cuda or unset, got 'gpu'"):
        backend.will_compile()


def test_cuda_is_compiled_when_the_toolkit_matches_torch(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert backend.use_cuda("13.0") == (False, "no CUDA operators (no CUDA toolkit found)")
    monkeypatch.setenv("CUDA_HOME", str(fake_cuda(tmp_path / "cuda", "13.0")))
    assert backend.use_cuda("13.2")[0]
    chosen, reason = backend.use_cuda("12.8")
    assert not chosen and "differs from torch's CUDA 12.8" in reason
    assert backend.use_cuda(None) == (False, "no CUDA operators (this torch has no CUDA)")
    monkeypatch.setenv("DETLIB_BUILD", "cpu")
    assert not backend.use_cuda("13.2")[0]
    monkeypatch.setenv("DETLIB_BUILD", "cuda")
    assert backend.use_cuda("12.8")[0]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="DETLIB_BUILD=cuda needs nvcc"):
        backend.use_cuda("13.2")


def test_nvcc_wrapper_outside_the_toolkit_does_not_define_its_location(backend, monkeypatch, tmp_path):
    toolkit = fake_cuda(tmp_path / "cuda", "13.0")
    monkeypatch.setenv("PATH", str(toolkit / "bin"))
    assert backend.cuda_home() == toolkit
    fake_tool(tmp_path / "local", "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "local" / "bin"))
    assert backend.cuda_home() in (None, Path("/usr/local/cuda"))


def test_wheel_built_without_torch_contains_package_and_configs(tmp_path):
    """Build with torch unimportable: DETLIB_BUILD=off must not need it."""
    pytest.importorskip("setuptools", minversion="77")
    (tmp_path / "shadow" / "torch").mkdir(parents=True)
    (tmp_path / "shadow" / "torch" / "__init__.py").write_text("raise ImportError('torch was imported')")
    environment = os.environ | {"DETLIB_BUILD": "off", "PYTHONPATH": str(tmp_path / "shadow")}
    code = (
        "import sys; sys.path.insert(0, 'build_backend'); import detlib_build;"
        f"print(detlib_build.build_wheel({str(tmp_path)!r}))"
    )
    source = tmp_path / "source"
    copy_sources(source)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("detlib-*-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = {str(path.relative_to(ROOT)) for path in (ROOT / "detlib").rglob("*.py")} - names
    assert not missing and "detlib/py.typed" in names
    files = [path for path in (ROOT / "configs").rglob("*.*") if path.is_file()]
    assert {path.suffix for path in files} == {".py", ".yaml"}
    assert {f"detlib/{path.relative_to(ROOT)}" for path in files} <= names
    assert not [name for name in names if name.startswith(("tests", "csrc", "tools", "build_backend"))]
    find_configs_of_wheel(wheel, tmp_path / "installed")


def find_configs_of_wheel(wheel, target):
    """Check that the model zoo of the unpacked wheel finds its own YAML and lazy configs."""
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "from detlib import model_zoo as zoo; print(zoo.get_config_file('Base-RCNN-FPN.yaml'));"
        "print(zoo.get_config('COCO-Detection/retinanet_R_50_FPN_1x.py').optimizer.lr)"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=target.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [str(target / "detlib" / "configs" / "Base-RCNN-FPN.yaml"), "0.01"]


def copy_sources(target):
    """Link the sources into `target`, so that the build leaves nothing in the tree."""
    for part in ("detlib", "configs", "csrc", "build_backend"):
        for path in (ROOT / part).rglob("*"):
            if path.is_file() and path.suffix != ".so" and "__pycache__" not in path.parts:
                link = target / path.relative_to(ROOT)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            (target / name).symlink_to(ROOT / name)


def test_setup_script_stays_small():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 60


def broken_linter(directory):
    """Return an interpreter that creates environments in which all checkers succeed, except mypy."""
    names = "".join(f"ln -s /bin/true $3/bin/{name}\n" for name in ("ruff", "codespell"))
    tool = directory / "python_with_checkers"
    python = f'mkdir -p "$3/bin"\nln -s {sys.executable} "$3/bin/python"\n'
    tool.write_text(f"#!/bin/sh\n{python}{names}ln -s /bin/false $3/bin/mypy\n")
    tool.chmod(0o755)
    return tool


def test_ci_runs_the_command_of_the_readme(tmp_path):
    """Check the fresh environment, the exit status and the last line, with short commands in the README."""
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci" / "run"
    script.write_text((ROOT / ".ci" / "run").read_text())
    script.chmod(0o755)

    shortcut = tmp_path / "python"  # makes an "environment" without pip
    shortcut.write_text(f'#!/bin/sh\nmkdir -p "$3/bin"\nln -s {sys.executable} "$3/bin/python"\n')
    shortcut.chmod(0o755)

    def run(block, python=shortcut):
        (tmp_path / "README.md").write_text(
            f"```\nfalse\n```\n\n<!-- test command -->\n```bash\n{block}\n```\n"
        )
        environment = os.environ | {"PYTHON": str(python)}
        done = subprocess.run([script], cwd="/", env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout.strip().splitlines()

    command = 'python -c "import sys; print(sys.prefix)"\necho "== 3 passed in 0.01s =="'
    status, lines = run(command, sys.executable)
    assert status == 0 and lines[-1] == ".ci/run: == 3 passed in 0.01s =="
    assert not Path(lines[-3]).exists() and "detlib-ci" in lines[-3]
    assert run('echo "1 failed, 2 passed in 1s"; exit 1')[0] == 1
    assert run("false\necho '3 passed'")[0] == 1
    assert run("echo nothing ran")[0] == 1
    status, lines = run("echo installing && echo '== 3 passed'")
    assert status == 0 and "installing" in lines and lines[-1] == ".ci/run: == 3 passed"
    assert lines.index("installing") < lines.index(".ci/run: === tests ===")
    assert run("false && echo '3 passed'")[0] == 1
    # A failing static check fails the run, but the tests still run.
    (tmp_path / "pyproject.toml").touch()
    status, lines = run("echo '== 3 passed'", broken_linter(tmp_path))
    assert status == 1 and ".ci/run: mypy failed" in lines and lines[-1] == ".ci/run: == 3 passed"
    (tmp_path / "pyproject.toml").unlink()
    (tmp_path / "README.md").write_text("no command here")
    assert subprocess.run([script], capture_output=True).returncode == 1


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="installed without its checkout")
def test_readme_marks_its_test_command():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines[lines.index("<!-- test command -->") + 1].startswith("```")


def test_ci_and_pre_commit_run_the_same_checks():
    script, hooks = (ROOT / ".ci" / "run").read_text(), (ROOT / ".pre-commit-config.yaml").read_text()
    entries = [line.split(": ", 1)[1] for line in hooks.splitlines() if line.strip().startswith("entry:")]
    checks = re.search(r"for check in (.*); do", script)[1]
    assert re.findall(r'"([^"]*)"', checks) == [entry for entry in entries if "pytest" not in entry]
