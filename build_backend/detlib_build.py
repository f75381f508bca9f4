"""Build backend (PEP 517, PEP 660): setuptools, plus torch and ninja as build requirements when it will
compile.

`DETLIB_BUILD` decides what is compiled:
    off   nothing, and no torch is needed at build time; PyTorch and torchvision stand in for the operators
    cpu   the C++ kernels
    cuda  the C++ and the CUDA kernels
    unset the C++ kernels if a C++ compiler is found; the CUDA ones too if nvcc fits the torch that is there
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

COMPILE_REQUIREMENTS = ["torch>=2.11", "ninja"]
MODES = ("off", "cpu", "cuda")


def requested_mode() -> str | None:
    """The value of DETLIB_BUILD, or None where it is unset or empty."""
    mode = os.environ.get("DETLIB_BUILD", "").strip().lower() or None
    if mode not in (None, *MODES):
        raise ValueError(f"DETLIB_BUILD must be one of {', '.join(MODES)} or unset, got {mode!r}")
    return mode


def will_compile() -> bool:
    """Whether anything is compiled: asked for, or not forbidden and a C++ compiler is there."""
    mode = requested_mode()
    if mode is not None:
        return mode != "off"
    compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    return any(shutil.which(name) for name in compiler)


def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, else what nvcc on the PATH belongs to, else the usual place."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    candidates = [Path(named)] if named else [Path(on_path).resolve().parents[1]] if on_path else []
    if not named:
        candidates.append(Path("/usr/local/cuda"))
    # nvcc on the PATH may be a wrapper script that lies outside the toolkit: the headers tell.
    for home in candidates:
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def get_requires_for_build_wheel(config_settings=None):
    """Requirements of building a wheel; torch and ninja only when something will be compiled."""
    extra = COMPILE_REQUIREMENTS if will_compile() else []
    return [*build_meta.get_requires_for_build_wheel(config_settings), *extra]


def get_requires_for_build_editable(config_settings=None):
    """Requirements of an editable install; torch and ninja only when something will be compiled."""
    extra = COMPILE_REQUIREMENTS if will_compile() else []
    return [*build_meta.get_requires_for_build_editable(config_settings), *extra]


def use_cuda(torch_cuda: str | None) -> tuple[bool, str]:
    """Whether to compile CUDA operators with a torch built for CUDA `torch_cuda`, and why."""
    mode, home = requested_mode(), cuda_home()
    if mode == "cuda":
        if home is None:
            raise FileNotFoundError("DETLIB_BUILD=cuda needs nvcc: put it on the PATH or set CUDA_HOME")
        return True, f"and the CUDA operators with {home}, as DETLIB_BUILD=cuda asks"
    if mode == "cpu":
        return False, "no CUDA operators, as DETLIB_BUILD=cpu asks"
    if home is None or torch_cuda is None:
        return False, f"no CUDA operators ({'this torch has no CUDA' if home else 'no CUDA toolkit found'})"
    nvcc = [home / "bin" / "nvcc", "--version"]
    version = subprocess.run(nvcc, capture_output=True, text=True, check=True).stdout
    if f"release {torch_cuda.split('.')[0]}." not in version:
        return (
            False,
            f"no CUDA operators, as {home} is of another major version than torch's CUDA {torch_cuda}",
        )
    return True, f"and the CUDA operators with {home}"
