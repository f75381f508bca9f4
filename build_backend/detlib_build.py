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


def nvcc_path() -> str | None:
    """The CUDA compiler: below CUDA_HOME, on the PATH, or in the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


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
    mode, nvcc = requested_mode(), nvcc_path()
    if mode == "cuda":
        if nvcc is None:
            raise FileNotFoundError("DETLIB_BUILD=cuda needs nvcc: put it on the PATH or set CUDA_HOME")
        return True, f"and the CUDA operators with {nvcc}, as DETLIB_BUILD=cuda asks"
    if mode == "cpu":
        return False, "no CUDA operators, as DETLIB_BUILD=cpu asks"
    if nvcc is None or torch_cuda is None:
        return False, f"no CUDA operators ({'torch has no CUDA' if nvcc else 'no nvcc found'})"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    if f"release {torch_cuda.split('.')[0]}." not in version:
        return (
            False,
            f"no CUDA operators, as {nvcc} is of another major version than torch's CUDA {torch_cuda}",
        )
    return True, f"and the CUDA operators with {nvcc}"
