"""Every public name of detectron2 that this project promises exists here and takes the same arguments.

`interface.json` lists detectron2's modules (below the package), their public names, and the parameters of
functions, constructors and methods. The lists below name what is not implemented yet; they may only get
shorter.
"""

import ast
import importlib
import importlib.util
import inspect
import json
from pathlib import Path

import pytest

INTERFACE = json.loads(Path(__file__).with_name("interface.json").read_text())

# Modules that are not implemented yet.
LATER_MODULES = {
    "export": "export",
    "modeling.mmdet_wrapper": "models of other libraries",
    "tracking": "tracking",
    "utils.analysis": "analysis",
    "utils.video_visualizer": "video",
}

# Names that are not implemented yet, in existing modules.
LATER_NAMES = {
    "modeling": {
        "MMDetBackbone",
        "MMDetDetector",
    },
}

# Methods that are not implemented yet.
LATER_METHODS = {}

# Intended differences and their reasons. A key is the start of a finding of `check`, after the module.
DIFFERENT = {
    "Backbone.forward: x": "detectron2's abstract method takes no input, though all that implement it do",
    "COCOevalMaxDets": "the evaluator asks its back end for the number of detections",
    "DenseDetector.visualize_training": "models do not draw; a hook of the trainer does",
    "GeneralizedRCNN.visualize_training": "models do not draw; a hook of the trainer does",
    "setup_logger: name": "the root logger has the name of this package",
}


def promised():
    """Yield (module, name, entry) of all names that must exist now."""
    for module, names in INTERFACE.items():
        if module in LATER_MODULES:
            continue
        for name, entry in names.items():
            if name not in LATER_NAMES.get(module, ()):
                yield module, name, entry


def get(module, name):
    return getattr(importlib.import_module(f"detlib.{module}"), name)


def parse(parameters):
    """Parse parameters as written in interface.json.

    Returns:
        The positional parameters as (name, source of the default or None), the keyword-only parameters
        likewise, and whether there is a `*args`.
    """
    args = ast.parse(f"def f({parameters}): pass").body[0].args
    positional = args.posonlyargs + args.args
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    keyword_only = list(zip(args.kwonlyargs, args.kw_defaults))
    pairs = [(a.arg, d and ast.unparse(d)) for a, d in zip(positional, defaults)]
    if pairs and pairs[0][0] in ("self", "cls"):
        pairs = pairs[1:]
    return pairs, [(a.arg, d and ast.unparse(d)) for a, d in keyword_only], args.vararg is not None


def differences(function, parameters):
    """Return the reasons why a call written for `parameters` may fail or differ with `function`."""
    ours = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    by_name = {p.name: p for p in ours}
    takes_any_keyword = any(p.kind is p.VAR_KEYWORD for p in ours)
    takes_any_position = any(p.kind is p.VAR_POSITIONAL for p in ours)
    our_positions = [p.name for p in ours if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positional, keyword_only, _ = parse(parameters)
    found = []
    for position, (name, _) in enumerate(positional):
        if name not in our_positions[position : position + 1] and not takes_any_position:
            found.append(f"{name} is not positional argument {position}")
    for name, default in positional + keyword_only:
        if name not in by_name:
            if not takes_any_keyword:
                found.append(f"{name} is missing")
            continue
        found += different_default(by_name[name], default)
    known = {name for name, _ in positional + keyword_only}
    for p in ours:
        if p.name not in known and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            if not parse(parameters)[2]:
                found.append(f"{p.name} has no default")
    return found


def different_default(parameter, source):
    """Compare the defaults if the source is a literal."""
    if source is None:
        return []
    if parameter.default is parameter.empty:
        return [f"{parameter.name} has no default, {source} is expected"]
    try:
        expected = ast.literal_eval(source)
    except ValueError:
        return []
    if expected is ... or parameter.default == expected:
        return []
    if isinstance(expected, (list, tuple)) and list(parameter.default or ()) == list(expected):
        return []
    return [f"{parameter.name}={parameter.default!r}, {source} is expected"]


def check(module, name, entry):
    """Return all differences of one public name as messages that start with its path."""
    target = get(module, name)
    found = []
    if entry["kind"] == "class":
        if not inspect.isclass(target):
            return [f"{module}.{name} is not a class"]
        for prop in entry.get("properties", ()):
            if not hasattr(target, prop):
                found.append(f"{module}.{name}.{prop} is missing")
        for method, parameters in entry.get("methods", {}).items():
            if method in LATER_METHODS:
                continue
            if not hasattr(target, method):
                found.append(f"{module}.{name}.{method} is missing")
            elif parameters is not None:
                found += [
                    f"{module}.{name}.{method}: {d}" for d in differences(getattr(target, method), parameters)
                ]
    # The parameters of PyTorch's own classes depend on the installed version.
    if "parameters" in entry and callable(target) and not target.__module__.startswith("torch."):
        function = target.__init__ if entry["kind"] == "class" else target
        found += [f"{module}.{name}: {d}" for d in differences(function, entry["parameters"])]
    return found


MODULES = sorted({module for module, _, _ in promised()})


@pytest.mark.parametrize("module", MODULES)
def test_names_and_parameters_are_those_of_detectron2(module):
    found = []
    for _, name, entry in (p for p in promised() if p[0] == module):
        if hasattr(importlib.import_module(f"detlib.{module}"), name):
            found += check(module, name, entry)
        else:
            found.append(f"{module}.{name} is missing")
    unexpected = [text for text in found if not text[len(module) + 1 :].startswith(tuple(DIFFERENT))]
    assert not unexpected, "\n".join(unexpected)


def test_names_listed_as_not_implemented_do_not_exist():
    """An implemented name must leave the lists, so that it is checked from then on."""
    here = [module for module in LATER_MODULES if exists(module)]
    for module, names in LATER_NAMES.items():
        here += [
            f"{module}.{name}" for name in names if hasattr(importlib.import_module(f"detlib.{module}"), name)
        ]
    assert not here, f"implemented now; remove them from the lists: {here}"


def exists(module):
    try:
        return importlib.util.find_spec(f"detlib.{module}") is not None
    except ModuleNotFoundError:
        return False


class TestComparison:
    """Tests of the comparison itself."""

    @pytest.mark.parametrize(
        "function, parameters, expected",
        [
            (lambda a, b=1: None, "a, b=1", []),
            (lambda a, b=1, *, c=None: None, "self, a, b=1", []),
            (lambda a, b=1: None, "a, *, b=1", []),
            (lambda a, **kwargs: None, "a, *, b=1", []),
            (lambda b, a: None, "a, b", ["a is not positional argument 0", "b is not positional argument 1"]),
            (lambda a: None, "a, b=1", ["b is not positional argument 1", "b is missing"]),
            (lambda a=2: None, "a=1", ["a=2, 1 is expected"]),
            (lambda a: None, "a=1", ["a has no default, 1 is expected"]),
            (lambda a, c: None, "a", ["c has no default"]),
            (lambda *, a: None, "a", ["a is not positional argument 0"]),
        ],
    )
    def test_differences_of_parameters_are_found(self, function, parameters, expected):
        assert differences(function, parameters) == expected
