"""Build of the compiled extension. All other settings of the package are in pyproject.toml; see also
build_backend/detlib_build.py."""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent / "build_backend"))
import detlib_build  # noqa: E402

COMMANDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}


def extension() -> dict:
    """Return the arguments of `setup` for detlib/_C.abi3.so, which uses LibTorch's stable ABI."""
    if home := detlib_build.cuda_home():
        os.environ.setdefault("CUDA_HOME", str(home))  # torch only searches next to the nvcc on the PATH
    import torch
    from torch.utils import cpp_extension

    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    major, minor = min((2, 13), found)
    defines = [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"]
    options = {"sources": sorted(map(str, Path("csrc").rglob("*.cpp")))}
    cxx, link, nvcc_flags = [*defines, "-O3", "-g0", "-fvisibility=hidden"], ["-Wl,--as-needed", "-s"], []
    with_cuda, reason = detlib_build.use_cuda(torch.version.cuda)
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "7.5;8.0;9.0+PTX")
        options["sources"] += sorted(map(str, Path("csrc/cuda").rglob("*.cu")))
        options["library_dirs"] = [str(home / "lib64")]
        options["libraries"] = ["cudart_static", "rt", "dl", "pthread"]
        link.append("-Wl,--exclude-libs,ALL")
        if found < (2, 13):
            options["libraries"].append("torch_cuda")
            defines.append("-DUSE_CUDA")
        nvcc_flags = [*defines, "-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden"]
    print(f"detlib: compiling the C++ operators; {reason}", file=sys.stderr)
    options |= {"extra_compile_args": {"cxx": cxx, "nvcc": nvcc_flags}, "extra_link_args": link}
    module = cpp_extension.CppExtension("detlib._C", py_limited_api=True, **options)
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


build = extension() if detlib_build.will_compile() and COMMANDS & set(sys.argv) else {}
packages = [*find_packages(include=["detlib", "detlib.*"]), "detlib.configs"]
setup(packages=packages, package_dir={"detlib.configs": "configs"}, **build)
