import json
import sys

import pytest

from detlib.utils.registry import Registry, dotted_path, locate
from detlib.utils.suggest import near_names, suggest


@pytest.fixture
def table():
    registry = Registry("HEADS")

    @registry.register()
    class FastHead:
        pass

    @registry.register()
    def build_slow_head():
        return "slow"

    return registry


def test_register_and_get(table):
    assert table.get("FastHead").__name__ == "FastHead"
    assert table.get("build_slow_head")() == "slow"
    assert "FastHead" in table and "Fast" not in table
    assert [name for name, _ in table] == ["FastHead", "build_slow_head"]
    assert len(table) == 2 and "FastHead" in repr(table)

    class Later:
        pass

    assert table.register(Later) is Later
    assert table.get("Later") is Later


def test_taken_name_raises_and_names_both_objects(table):
    class FastHead:
        marker = "second"

    with pytest.raises(ValueError) as error:
        table.register(FastHead)
    message = str(error.value)
    assert message.count("FastHead") >= 3 and "HEADS" in message
    assert "table.<locals>.FastHead" in message and "names_both_objects.<locals>.FastHead" in message
    assert not hasattr(table.get("FastHead"), "marker")


def test_unknown_name_error_lists_similar_names(table):
    with pytest.raises(KeyError, match="'FastHaed'.*'HEADS'.*Did you mean 'FastHead'"):
        table.get("FastHaed")
    with pytest.raises(KeyError, match="Registered: FastHead, build_slow_head"):
        table.get("zzz")


def test_dotted_path(table):
    assert table.get("json.decoder.JSONDecoder") is json.JSONDecoder
    with pytest.raises(KeyError, match="'json.decoder' has no attribute 'JSONDecodr'.*'JSONDecoder'"):
        table.get("json.decoder.JSONDecodr")
    with pytest.raises(KeyError, match="no module 'no_such_package'"):
        table.get("no_such_package.Thing")


def test_locate():
    assert locate("json") is json
    assert locate("json.JSONDecoder.decode") is json.JSONDecoder.decode
    with pytest.raises(ImportError, match="not a dotted path"):
        locate("json..decoder")


@pytest.mark.parametrize(
    ("body", "error_type"),
    [("import absent_dependency", ModuleNotFoundError), ("from json import nope", ImportError)],
)
def test_import_errors_inside_a_module_are_passed_on(table, tmp_path, monkeypatch, body, error_type):
    name = f"broken_{error_type.__name__.lower()}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error_type, match="absent_dependency|nope"):
        table.get(f"{name}.Thing")
    sys.modules.pop(name, None)


def test_suggest():
    assert suggest("BASE_LRR", ["BASE_LR", "GAMMA"]) == " Did you mean 'BASE_LR'?"
    assert suggest("zzzz", ["BASE_LR"]) == ""
    assert suggest("base_lr", ["BASE_LR"]) == " Did you mean 'BASE_LR'?"
    assert suggest("aab", ["aac", "aad"]).count(" or ") == 1
    assert near_names("p2", ["p2", "p3"], n=1) == ["p2"]


def test_dotted_path_is_the_shortest():
    assert dotted_path(json.decoder.JSONDecoder) == "json.JSONDecoder"
    assert dotted_path(json.JSONDecoder.decode) == "json.JSONDecoder.decode"
    assert dotted_path(dict) == "builtins.dict" and dotted_path(dict.fromkeys) == "builtins.dict.fromkeys"


@pytest.mark.parametrize("obj", [lambda: 1, json.JSONDecoder(), 3])
def test_dotted_path_of_other_objects_raises(obj):
    with pytest.raises(ValueError, match="no dotted path|different object"):
        dotted_path(obj)
