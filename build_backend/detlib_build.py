"""Build backend (PEP 517, PEP 660): setuptools, with torch and ninja as build requirements if it compiles.

`DETLIB_BUILD` determines what is compiled:
    off   nothing, and torch is not needed to build; PyTorch and torchvision replace the operators
    cpu   the C++ kernels
    cuda  the C++ and the CUDA kernels
    unset the C++ kernels if a C++ compiler is found, and the CUDA kernels if nvcc matches the installed torch
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
    """Return the value of DETLIB_BUILD, or None if it is unset or empty."""
    mode = os.environ.get("DETLIB_BUILD", "").strip().lower() or None
    if mode not in (None, *MODES):
        raise ValueError(f"DETLIB_BUILD must be one of {', '.join(MODES)} or unset, got {mode!r}")
    return mode


def will_compile() -> bool:
    """Return whether anything is compiled: if requested, or if not disabled and there is a C++ compiler."""
    mode = requested_mode()
    if mode is not None:
        return mode != "off"
    compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    return any(shutil.which(name) for name in compiler)


def cuda_home() -> Path | None:
    """Return the CUDA toolkit: CUDA_HOME, else that of the nvcc on the PATH, else the default location."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    candidates = [Path(named)] if named else [Path(on_path).resolve().parents[1]] if on_path else []
    if not named:
        candidates.append(Path("/usr/local/cuda"))
    # The nvcc on the PATH may be a wrapper script outside the toolkit, so check for the headers.
    for home in candidates:
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def get_requires_for_build_wheel(config_settings=None):
    """Return the requirements to build a wheel, with torch and ninja only if something is compiled."""
    extra = COMPILE_REQUIREMENTS if will_compile() else []
    return [*build_meta.get_requires_for_build_wheel(config_settings), *extra]


def get_requires_for_build_editable(config_settings=None):
    """Return the requirements of an editable install, with torch and ninja only if something is compiled."""
    extra = COMPILE_REQUIREMENTS if will_compile() else []
    return [*build_meta.get_requires_for_build_editable(config_settings), *extra]


def use_cuda(torch_cuda: str | None) -> tuple[bool, str]:
    """Return whether to compile CUDA operators with a torch built for CUDA `torch_cuda`, and the reason."""
    mode, home = requested_mode(), cuda_home()
    if mode == "cuda":
        if home is None:
            raise FileNotFoundError("DETLIB_BUILD=cuda needs nvcc: put it on the PATH or set CUDA_HOME")
        return True, f"and the CUDA operators with {home}, since DETLIB_BUILD=cuda"
    if mode == "cpu":
        return False, "no CUDA operators, since DETLIB_BUILD=cpu"
    if home is None or torch_cuda is None:
        return False, f"no CUDA operators ({'this torch has no CUDA' if home else 'no CUDA toolkit found'})"
    nvcc = [home / "bin" / "nvcc", "--version"]
    version = subprocess.run(nvcc, capture_output=True, text=True, check=True).stdout
    if f"release {torch_cuda.split('.')[0]}." not in version:
        return (
            False,
            f"no CUDA operators, since the major version of {home} differs from torch's CUDA {torch_cuda}",
        )
    return True, f"and the CUDA operators with {home}"
