"""The rules of the house that a machine can check: who may import whom, sizes of files, public names."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "detlib").rglob("*.py"))

# A package imports only from packages of lower levels.
LEVELS = {
    "utils": 0,
    "config": 1,
    "ops": 1,
    "layers": 2,
    "structures": 2,
    "checkpoint": 3,
    "data": 3,
    "modeling": 3,
    "solver": 3,
    "evaluation": 4,
    "export": 4,
    "model_zoo": 4,
    "engine": 5,
    "cli": 6,
    "compat": 6,
}

# Within a level there is this one permission.
ALLOWED_WITHIN_LEVEL = {("structures", "layers")}

# Files that sit elsewhere than their package: their own level, and all of detlib that they may import.
VISUALIZERS = ("utils/visualizer.py", "utils/video_visualizer.py", "utils/_vis_")
VISUALIZERS_MAY_IMPORT = {"structures", "utils"}

# (file, imported package): why.
EXCEPTIONS = {
    ("utils/collect_env.py", "ops"): "tells which operators are compiled",
    ("modeling/test_time_augmentation.py", "data"): "hands on what needs data transforms, on first use",
    ("modeling/test_time_augmentation.py", "engine"): "hands on what needs data transforms, on first use",
    ("modeling/test_time_augmentation.py", "evaluation"): "hands on what needs data transforms, on first use",
}

# Packages whose parts are for the package alone.
PRIVATE_PACKAGES = {"config/defaults/__init__.py"}

MAX_LINES = 600
# Files that are tables and nothing else.
TABLES = {
    "data/datasets/builtin_meta.py",
    "data/datasets/lvis_v0_5_categories.py",
    "data/datasets/lvis_v1_categories.py",
}

# Slow to import or not always installed, so they are imported where they are used.
LAZY = {
    "cv2",
    "faster_coco_eval",
    "matplotlib",
    "mlflow",
    "omegaconf",
    "onnx",
    "pandas",
    "panopticapi",
    "pycocotools",
    "scipy",
    "tensorboard",
    "timm",
    "torch.distributed.tensor",
    "wandb",
}
# Files that are themselves imported only where they are used.
LAZY_FILES = {"evaluation/fast_eval_api.py"}
BANNED = {"detectron2": "this is its successor", "pkg_resources": "it is gone from setuptools"}


# Packages that are imported through one file of detlib alone: why.
ONE_DOOR = {"fvcore.nn": ("layers/fvcore_nn.py", "its import warns of something that users cannot change")}


def place(path):
    return path.relative_to(ROOT / "detlib").as_posix()


def package_of(path):
    """The package of a file by its place; None for `detlib/__init__.py` and what lies beside it."""
    parts = path.relative_to(ROOT / "detlib").parts
    return parts[0] if len(parts) > 1 else None


def imports(path):
    """Yields (line, absolute name, whether outside functions) of every import; `from x import y` is x.y."""
    tree = ast.parse(path.read_text())
    in_functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    module = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(tree):
        top = id(node) not in in_functions
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module[: len(module) - node.level]) + "." if node.level else ""
            base += node.module or ""
            yield from ((node.lineno, f"{base.rstrip('.')}.{alias.name}", top) for alias in node.names)


def is_visualizer(path):
    return place(path).startswith(VISUALIZERS)


def forbidden(path, name):
    """Why a file may not import `name`, an absolute dotted name; None if it may."""
    parts = name.split(".")
    if parts[0] in BANNED:
        return BANNED[parts[0]]
    if parts[0] != "detlib" or len(parts) < 2 or parts[1] not in LEVELS:
        return None
    source, target = package_of(path), parts[1]
    if is_visualizer(path):
        return None if target in VISUALIZERS_MAY_IMPORT else "visualizers import structures and utils only"
    if source is None:
        return None
    if target == "utils" and parts[2:3] and parts[2] in ("visualizer", "video_visualizer"):
        return None if LEVELS[source] > 3 else "visualizers are at level 3"
    if source == target or (place(path), target) in EXCEPTIONS or (source, target) in ALLOWED_WITHIN_LEVEL:
        return None
    if LEVELS[target] < LEVELS[source]:
        return None
    return f"{source} is at level {LEVELS[source]}, {target} at level {LEVELS[target]}"


def test_every_package_has_a_level():
    packages = {path.name for path in (ROOT / "detlib").iterdir() if (path / "__init__.py").exists()}
    assert packages <= set(LEVELS)


def test_imports_go_down_the_ladder():
    found = [
        f"detlib/{place(path)}:{line} imports {name}: {reason}"
        for path in FILES
        for line, name, _ in imports(path)
        if (reason := forbidden(path, name))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "file, name, legal",
    [
        ("modeling/matcher.py", "detlib.layers.cat", True),
        ("modeling/matcher.py", "detlib.data.catalog", False),
        ("modeling/matcher.py", "detlib.engine", False),
        ("structures/boxes.py", "detlib.layers.nms", True),
        ("layers/nms.py", "detlib.structures.Boxes", False),
        ("ops/nms.py", "detlib.config.CfgNode", False),
        ("utils/events.py", "detlib.structures.Boxes", False),
        ("utils/visualizer.py", "detlib.structures.Boxes", True),
        ("utils/_vis_image.py", "detlib.data.catalog", False),
        ("modeling/matcher.py", "detlib.utils.visualizer.Visualizer", False),
        ("engine/hooks/visualize.py", "detlib.utils.visualizer.Visualizer", True),
        ("utils/collect_env.py", "detlib.ops", True),
        ("utils/env.py", "detlib.ops", False),
        ("model_zoo/model_zoo.py", "pkg_resources", False),
        ("__init__.py", "detlib.utils.env", True),
    ],
)
def test_the_ladder_itself(file, name, legal):
    assert (forbidden(ROOT / "detlib" / file, name) is None) == legal


def test_relative_imports_are_resolved(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "detlib" / "modeling" / "backbone" / "fpn.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from .. import matcher\nfrom ...data import catalog\ndef f():\n    import detlib.engine\n"
    )
    assert list(imports(path)) == [
        (1, "detlib.modeling.matcher", True),
        (2, "detlib.data.catalog", True),
        (4, "detlib.engine", False),
    ]


def test_exceptions_are_within_functions():
    found = [
        f"detlib/{place(path)}:{line} imports {name} at the top"
        for path in FILES
        for line, name, top in imports(path)
        if top and name.startswith("detlib.") and (place(path), name.split(".")[1]) in EXCEPTIONS
    ]
    assert not found, "\n".join(found)


def test_slow_packages_are_imported_where_they_are_used():
    found = [
        f"detlib/{place(path)}:{line} imports {name} at the top"
        for path in FILES
        for line, name, top in imports(path)
        if top and any(f"{name}.".startswith(f"{slow}.") for slow in LAZY) and place(path) not in LAZY_FILES
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", ONE_DOOR)
def test_packages_with_one_door(package):
    door, reason = ONE_DOOR[package]
    found = [
        f"detlib/{place(path)}:{line} imports {name}; use detlib/{door}, since {reason}"
        for path in FILES
        for line, name, _ in imports(path)
        if f"{name}.".startswith(f"{package}.") and place(path) != door
    ]
    assert not found, "\n".join(found)


def test_importing_the_library_is_silent_and_loads_nothing_slow():
    packages = sorted(
        path.parent.name for path in FILES if path.name == "__init__.py" and path.parents[2] == ROOT
    )
    code = f"import sys, {', '.join(f'detlib.{package}' for package in packages)}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert not LAZY & set(run.stdout.split())


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.name == "__init__.py" and p.parent.name != "detlib"], ids=place
)
def test_packages_list_their_public_names(path):
    tree = ast.parse(path.read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    public = {name for name in imported | defined if not name.startswith("_")}
    module = importlib.import_module(".".join(path.parent.relative_to(ROOT).parts))
    if not public or place(path) in PRIVATE_PACKAGES:
        return
    listed = getattr(module, "__all__", [])
    assert len(set(listed)) == len(listed), "a name is listed twice"
    assert public == public & set(listed), f"not in __all__: {sorted(public - set(listed))}"
    assert not [name for name in listed if not hasattr(module, name)]


@pytest.mark.parametrize("path", FILES, ids=place)
def test_files(path):
    text = path.read_text()
    if place(path) not in TABLES:
        assert len(text.splitlines()) <= MAX_LINES
    tree = ast.parse(text)
    for node in ast.walk(tree):
        where = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Assert):
            assert node.msg is not None, f"{where}: an assertion needs a message"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: an except needs a type"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "torch.jit", f"{where}: torch.jit is deprecated"
    if text.strip():
        assert ast.get_docstring(tree), "a file begins with what it is for"
    for word in ("TODO", "FIXME"):
        assert word not in text, f"{word} does not belong here"
