"""Check that one wheel works with multiple PyTorch versions, by running the tests of the operators with each.

    python tools/check_abi.py                                      # new environments: torch 2.13.0 and newest
    python tools/check_abi.py --torch 2.13.0 --python bin/python   # one new and one existing environment

The C++ operators in the wheel are compiled against the torch of the interpreter that runs this script.
Existing environments are not changed; they need torch, numpy, pycocotools and pytest. Exits with 1 if any
test fails.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEST_REQUIREMENTS = ("numpy", "pycocotools", "pytest")
SOURCES = (
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "setup.py",
    "build_backend",
    "configs",
    "csrc",
)

SHOW = """
import torch
from detlib.ops import _library
assert _library.native_load_error is None, _library.native_load_error
print(f"torch {torch.__version__}: operators from {_library.__file__}", flush=True)
"""


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], check=True, **options)


def build_wheel(work: Path) -> Path:
    """Build the wheel from a copy of the sources, so that no files are added to the checkout."""
    copy = work / "source"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name)
        else:
            shutil.copy2(source, copy / name)
    shutil.copytree(ROOT / "detlib", copy / "detlib", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    arguments = "--no-build-isolation", "--no-deps", "--wheel-dir", work / "wheels", copy
    run(sys.executable, "-m", "pip", "wheel", "--quiet", *arguments, env=os.environ | {"DETLIB_BUILD": "cpu"})
    (wheel,) = (work / "wheels").glob("*.whl")
    if "-abi3-" not in wheel.name:
        raise RuntimeError(f"the wheel does not have the stable ABI tag of Python: {wheel.name}")
    return wheel


def new_environment(directory: Path, version: str, index_url: str | None) -> Path:
    """Create an environment with a version of torch, or the newest one, and return its interpreter."""
    venv.create(directory, with_pip=True)
    python = directory / ("Scripts" if os.name == "nt" else "bin") / "python"
    torch = "torch" if version == "newest" else f"torch=={version}"
    index = ("--index-url", index_url) if index_url else ()
    run(python, "-m", "pip", "install", "--quiet", torch, *index)
    run(python, "-m", "pip", "install", "--quiet", *TEST_REQUIREMENTS)
    return python


def tests_pass(python: Path, wheel: Path, work: Path) -> bool:
    """Run the tests of the operators with the content of the wheel, outside the checkout."""
    site = Path(tempfile.mkdtemp(dir=work))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    shutil.copytree(ROOT / "tests", site / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", site)
    environment = {key: value for key, value in os.environ.items() if key != "DETLIB_DISABLE_NATIVE"}
    environment["PYTHONPATH"] = str(site)
    try:
        run(python, "-c", SHOW, cwd=site, env=environment)
        run(python, "-m", "pytest", "-q", "tests/ops", cwd=site, env=environment)
    except subprocess.CalledProcessError as error:
        print(error, file=sys.stderr)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--torch", action="append", default=[], help="version of torch to install, or 'newest'"
    )
    parser.add_argument(
        "--python", action="append", type=Path, default=[], help="interpreter with torch installed"
    )
    parser.add_argument("--index-url", help="index URL from which pip installs torch")
    args = parser.parse_args()
    versions = args.torch or ([] if args.python else ["2.13.0", "newest"])
    with tempfile.TemporaryDirectory(prefix="detlib-abi-") as directory:
        work = Path(directory)
        wheel = build_wheel(work)
        print(f"wheel: {wheel.name}, {wheel.stat().st_size // 1024} KiB")
        pythons = {str(python): python.absolute() for python in args.python}
        for version in versions:
            pythons[f"torch {version}"] = new_environment(work / f"torch-{version}", version, args.index_url)
        results = {name: tests_pass(python, wheel, work) for name, python in pythons.items()}
    for name, passed in results.items():
        print(f"{name}: {'passed' if passed else 'FAILED'}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
