"""Rules for the structure of the code: import levels, cycles, sizes of files and functions, public names."""

import ast
import importlib
import re
import subprocess
import sys

import pytest

from tests import source_tree
from tests.source_tree import (
    FILES,
    ROOT,
    cycles,
    import_graph,
    importers,
    imports,
    package_of,
    parse,
    place,
)

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
    "visualization": 3,
    "evaluation": 4,
    "export": 4,
    "model_zoo": 4,
    "projects": 4,
    "tracking": 4,
    "engine": 5,
    "report": 5,
    "cli": 6,
    "compat": 6,
}

# Imports that are allowed within a level: (importing package, imported package).
ALLOWED_WITHIN_LEVEL = {("structures", "layers")}

# (file, imported package): reason.
EXCEPTIONS = {
    ("data/build.py", "modeling"): "reads which config keys hold the model's number of classes",
    ("utils/collect_env.py", "ops"): "reports which operators are compiled",
    ("utils/visualizer.py", "visualization"): "detectron2's path, imported on first use",
    ("modeling/test_time_augmentation.py", "data"): "re-exports names that need data, on first use",
    ("modeling/test_time_augmentation.py", "engine"): "re-exports names that need data, on first use",
    ("modeling/test_time_augmentation.py", "evaluation"): "re-exports names that need data, on first use",
}

MAX_LINES = 600
# Files that contain nothing but tables.
TABLES = {
    "data/datasets/builtin_meta.py",
    "data/datasets/lvis_v0_5_categories.py",
    "data/datasets/lvis_v1_categories.py",
}

MAX_FUNCTION_LINES = 60  # without the docstring
# (file, function): the reason.
LONG_FUNCTIONS = {
    ("modeling/backbone/mvit.py", "__init__"): "20 arguments, and one loop that builds the blocks",
    ("modeling/backbone/swin.py", "__init__"): "20 arguments, and one loop that builds the stages",
}

SMALL = 100  # lines
MAX_SMALL_MODULES = 27

# Files that contain dotted paths of detlib in strings, and why these are not hidden imports.
DOTTED_STRINGS = {
    "config/_lazy_text.py": "the name of a function in the Python code that it writes",
    "utils/safe_pickle.py": "names of classes in pickled files",
}

# Packages that are slow to import or optional, so they are imported inside the functions that use them.
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
# Files that are imported inside functions only, so they may import these packages at module level.
LAZY_FILES = {"evaluation/fast_eval_api.py"}
BANNED = {"detectron2": "this is its successor", "pkg_resources": "setuptools no longer has it"}

# Packages that only one file of detlib may import: (file, why).
ONE_DOOR = {"fvcore.nn": ("layers/fvcore_nn.py", "its import warns about something that users cannot change")}


def forbidden(path, name):
    """Return why a file may not import `name`, an absolute dotted name; None if it may."""
    parts = name.split(".")
    if parts[0] in BANNED:
        return BANNED[parts[0]]
    if parts[0] != "detlib" or len(parts) < 2 or parts[1] not in LEVELS:
        return None
    source, target = package_of(path), parts[1]
    if source is None:
        return None
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
        ("utils/visualizer.py", "detlib.visualization.visualizer", True),
        ("utils/visualizer.py", "detlib.structures.Boxes", False),
        ("visualization/canvas.py", "detlib.structures.Boxes", True),
        ("visualization/canvas.py", "detlib.data.catalog", False),
        ("modeling/matcher.py", "detlib.visualization.visualizer", False),
        ("report/writer.py", "detlib.engine.launch", False),
        ("utils/collect_env.py", "detlib.ops", True),
        ("utils/env.py", "detlib.ops", False),
        ("model_zoo/model_zoo.py", "pkg_resources", False),
        ("__init__.py", "detlib.utils.env", True),
    ],
)
def test_level_rules_accept_and_reject(file, name, legal):
    assert (forbidden(ROOT / "detlib" / file, name) is None) == legal


def test_relative_imports_are_resolved(tmp_path, monkeypatch):
    monkeypatch.setattr(source_tree, "ROOT", tmp_path)
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


def test_exceptions_to_the_levels_are_imported_inside_functions():
    found = [
        f"detlib/{place(path)}:{line} imports {name} at the top"
        for path in FILES
        for line, name, top in imports(path)
        if top and name.startswith("detlib.") and (place(path), name.split(".")[1]) in EXCEPTIONS
    ]
    assert not found, "\n".join(found)


def test_slow_packages_are_not_imported_at_module_level():
    found = [
        f"detlib/{place(path)}:{line} imports {name} at the top"
        for path in FILES
        for line, name, top in imports(path)
        if top and any(f"{name}.".startswith(f"{slow}.") for slow in LAZY) and place(path) not in LAZY_FILES
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", ONE_DOOR)
def test_package_is_imported_by_its_wrapper_only(package):
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
    if not public:
        return
    listed = getattr(module, "__all__", [])
    assert len(set(listed)) == len(listed), "a name is listed twice"
    assert public == public & set(listed), f"not in __all__: {sorted(public - set(listed))}"
    assert not [name for name in listed if not hasattr(module, name)]


def test_no_import_cycles():
    found = cycles(import_graph())
    assert not found, "\n".join(" <-> ".join(cycle) for cycle in found)


def test_cycles_are_found():
    graph = {"a": {"b", "c"}, "b": {"a"}, "c": {"d"}, "d": {"e"}, "e": {"c"}, "f": {"f", "a"}}
    assert cycles(graph) == [["a", "b"], ["c", "d", "e"]]


def test_imports_are_absolute():
    found = [
        f"detlib/{place(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not found, "relative imports:\n" + "\n".join(found)


LOADERS = ("import_module", "__import__", "locate")


def hidden_imports(tree):
    """Yield (line, text) of every string that is the dotted path of something in detlib, or is imported.

    Names of loggers do not count, nor sentences that contain a path, such as `python -m` command lines.
    """
    loggers = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        called, first = ast.unparse(node.func).rpartition(".")[2], ast.unparse(node.args[0]).lstrip("f")
        if called in ("getLogger", "setup_logger"):
            loggers.add(id(node.args[0]))
        elif called in LOADERS and first[1:].startswith(("detlib.{", ".")):
            yield node.lineno, ast.unparse(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in loggers:
            if re.fullmatch(r"detlib(\.\w+)+", node.value):
                yield node.lineno, node.value


def test_no_module_is_named_by_a_string():
    found = [
        f"detlib/{place(path)}:{line}: {text}"
        for path in FILES
        if place(path) not in DOTTED_STRINGS
        for line, text in hidden_imports(parse(path))
    ]
    assert not found, "\n".join(found)


def test_hidden_imports_are_found():
    text = """
logging.getLogger("detlib.utils.events")
importlib.import_module("detlib.data")
locate(f"detlib.{name}")
registry.get("detlib.data.catalog")
print("python -m detlib.data.check")
"""
    assert [line for line, _ in hidden_imports(ast.parse(text))] == [4, 3, 5]


def lines_of_code(function):
    """Return the number of lines of a function without its docstring."""
    length = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        length -= function.body[0].end_lineno - function.body[0].lineno + 1
    return length


def test_functions_are_short():
    found = [
        f"detlib/{place(path)}:{node.lineno}: {node.name} has {lines_of_code(node)} lines"
        for path in FILES
        for node in ast.walk(parse(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and lines_of_code(node) > MAX_FUNCTION_LINES
        and (place(path), node.name) not in LONG_FUNCTIONS
    ]
    assert not found, "\n".join(found)


def test_small_modules_have_several_importers():
    """A small module with a single importer belongs in that file, unless it is a separate concept."""
    users = importers()
    small = [
        place(path)
        for path in FILES
        if path.name not in ("__init__.py", "__main__.py")
        and len(users[place(path)]) <= 1
        and len(path.read_text().splitlines()) <= SMALL
    ]
    assert len(small) <= MAX_SMALL_MODULES, "\n".join(small)


@pytest.mark.parametrize("path", FILES, ids=place)
def test_file_follows_the_code_rules(path):
    text = path.read_text()
    if place(path) not in TABLES:
        assert len(text.splitlines()) <= MAX_LINES
    tree = parse(path)
    for node in ast.walk(tree):
        where = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Assert):
            assert node.msg is not None, f"{where}: an assertion needs a message"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: an except clause needs a type"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "torch.jit", f"{where}: torch.jit is deprecated"
    if text.strip():
        assert ast.get_docstring(tree), "a file starts with a docstring"
    for word in ("TODO", "FIXME"):
        assert word not in text, f"{word} must be resolved or filed"


TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))


def test_test_modules_import_builders_not_test_modules():
    found = []
    for path in TEST_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            for module in modules:
                parts = module.split(".")
                if parts[0] != "tests":
                    continue
                if parts[-1].startswith("test_") and path.name != "test_report.py":
                    found.append(f"{where} imports {module}")
                file = ROOT.joinpath(*parts)
                if not (file.is_dir() or file.with_suffix(".py").exists()):
                    found.append(f"{where} imports {module}, which does not exist")
    assert not found, "\n".join(found)
