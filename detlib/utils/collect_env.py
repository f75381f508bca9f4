"""A report of the environment: versions, devices, and the implementation that serves each operator.

Run `python -m detlib.utils.collect_env` and include the output in bug reports.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

import torch
from tabulate import tabulate

__all__ = ["collect_env_info"]

PACKAGES = (
    "numpy",
    "Pillow",
    "opencv-python",
    "opencv-python-headless",
    "fvcore",
    "iopath",
    "yacs",
    "omegaconf",
    "pycocotools",
    "faster-coco-eval",
    "tensorboard",
    "safetensors",
)


def collect_env_info() -> str:
    """Return the report: a table of versions and devices, a table of operators, and remarks on problems."""
    from detlib.ops import _library  # here, because ops is a level above utils

    torchvision_error = _library.torchvision_ops()[1]
    parts = [tabulate(_versions(torchvision_error)), _operators(_library)]
    remark = _mismatch(torchvision_error)
    return "\n\n".join([*parts, remark] if remark else parts)


def _versions(torchvision_error: str | None) -> list[tuple[str, str]]:
    import detlib

    rows = [
        ("platform", platform.platform()),
        ("processor", f"{_processor()}, {os.cpu_count()} threads, {torch.get_num_threads()} used by torch"),
        ("Python", sys.version.split()[0]),
        ("detlib", f"{detlib.__version__} at {Path(detlib.__file__).parent}"),
        ("torch", f"{torch.__version__} at {Path(torch.__file__).parent}"),
        ("torch built for CUDA", torch.version.cuda or "no, CPU only"),
        ("CPU capability", torch.backends.cpu.get_cpu_capability()),
    ]
    if torch.cuda.is_available():
        rows += [(f"GPU {i}", _describe_gpu(i)) for i in range(torch.cuda.device_count())]
    else:
        mps = torch.backends.mps.is_available()
        rows.append(("GPU", "Apple MPS" if mps else "none available"))
    rows.append(("torchvision", f"{_version('torchvision')}, {torchvision_error or 'loads'}"))
    rows += [(name, version) for name in PACKAGES if (version := _version(name)) != "not installed"]
    return rows


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def _describe_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.1f} GiB, compute capability {properties.major}.{properties.minor}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _operators(library) -> str:
    """Return the table of operators and devices, and the reason if there are no compiled ones."""
    devices = ["cpu", "cuda"] if torch.version.cuda else ["cpu"]
    rows = [
        [name, *(library.implementation(name, device) for device in devices)] for name in library.OPERATORS
    ]
    lines = [tabulate(rows, headers=["operator", *devices])]
    if library.native_load_error:
        lines.append(f"compiled operators: {library.native_load_error}")
    elif "cuda" in devices and not library.has_native_kernel("nms", "cuda"):
        lines.append("compiled operators: built without CUDA kernels (nvcc at install time adds them)")
    return "\n".join(lines)


def _mismatch(torchvision_error: str | None) -> str | None:
    """Return advice if torchvision does not load, else None."""
    if torchvision_error is None:
        return None
    if _version("torchvision") == "not installed":
        return "torchvision is not installed; pip install torchvision installs a version that matches torch."
    cuda = _torchvision_cuda()
    if torch.version.cuda is None and cuda is not None:
        return (
            f"CPU torch with CUDA torchvision: torch {torch.__version__} has no CUDA, but the installed"
            f" torchvision was built for CUDA {cuda} and cannot load its operators. Install both from one"
            " index, e.g. pip install --force-reinstall torch torchvision, or for a CPU-only pair add"
            " --index-url https://download.pytorch.org/whl/cpu."
        )
    return (
        f"torchvision does not load with torch {torch.__version__}: the two versions must match. Install"
        " a matching pair with pip install --upgrade --force-reinstall torch torchvision."
    )


def _torchvision_cuda() -> str | None:
    """Return the CUDA version in torchvision's version file, without importing torchvision."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    version_file = Path(spec.origin).parent / "version.py"
    if not version_file.exists():
        return None
    found = re.search(r"\+cu(\d+)(\d)", version_file.read_text())
    return ".".join(found.groups()) if found else None


if __name__ == "__main__":
    print(collect_env_info())
