"""Tests of LazyCall and LazyConfig."""

import functools
import textwrap

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from detlib.config import LazyCall, LazyConfig, instantiate
from detlib.config._override import parse_value
from detlib.layers import ShapeSpec


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


@pytest.fixture
def zoo(write):
    """Create a folder of configs that import one another; return the function that adds a file."""
    write(
        "common/model.py",
        """
        from torch import nn
        from detlib.config import LazyCall as L

        model = L(nn.Sequential)(_args_=[L(nn.Linear)(in_features=4, out_features=2)])
        sizes = dict(widths=[1, 2])
        _hidden = {"a": 1}
        """,
    )
    write("common/data/v0.5/train.py", "train = {'max_iter': 90}\nTIMES = 3\n")
    write("COCO-Odd name.v1/base.py", "from ..common.model import model, sizes\nsizes['widths'].append(3)\n")
    return write


class TestLazyCall:
    def test_call_is_deferred(self):
        node = LazyCall(nn.Linear)(in_features=4, out_features="${.in_features}")
        node.in_features = 7
        layer = instantiate(node)
        assert isinstance(layer, nn.Linear) and layer.weight.shape == (7, 7)

    def test_target_is_a_dotted_path_or_a_dataclass(self):
        assert isinstance(instantiate(LazyCall("torch.nn.ReLU")()), nn.ReLU)
        node = LazyCall(ShapeSpec)(channels="${.stride}", stride=4)
        assert node._target_ == "detlib.layers.ShapeSpec"
        assert instantiate(node) == ShapeSpec(channels=4, stride=4)

    def test_target_that_is_not_callable_fails(self):
        with pytest.raises(TypeError, match="takes a callable or the dotted path of one, got 3"):
            LazyCall(3)


class TestRelativeImports:
    def test_folders_may_have_any_name(self, zoo):
        path = zoo(
            "COCO-Odd name.v1/mask_1x.py",
            """
            from ..common import model as module
            from ..common.model import *
            from .base import sizes as changed
            import os.path
            model._args_[0].out_features = 5
            """,
        )
        cfg = LazyConfig.load(path)
        assert set(cfg) == {"model", "sizes", "changed"}
        assert cfg.changed.widths == [1, 2, 3] and cfg.sizes.widths == [1, 2]
        assert instantiate(cfg.model)[0].out_features == 5

    def test_each_importing_file_gets_its_own_copy(self, zoo):
        zoo("a.py", "from .common.model import model\nmodel._args_[0].out_features = 50\n")
        path = zoo(
            "b.py",
            "from .common.model import model, sizes\nfrom .a import model as other\n"
            "from .common.model import sizes as again\nsizes['widths'].append(9)\n",
        )
        cfg = LazyConfig.load(path)
        assert cfg.model._args_[0].out_features == 2 and cfg.other._args_[0].out_features == 50
        assert cfg.again.widths == [1, 2] and cfg.sizes.widths == [1, 2, 9]
        assert LazyConfig.load(path) == cfg

    def test_file_runs_once_per_load(self, write):
        write("base.py", "from sys import _lazy_runs as runs\nruns.append(1)\ncfg = {}\n")
        write("a.py", "from .base import cfg\n")
        path = write("b.py", "from .base import cfg\nfrom .a import cfg as other\n")
        import sys

        sys._lazy_runs = []
        try:
            LazyConfig.load(path)
            assert sys._lazy_runs == [1]
        finally:
            del sys._lazy_runs

    def test_names_of_one_import_share_objects(self, write):
        write("base.py", "a = [1]\nb = [a]\nc = dict(a=a)\n")
        path = write("top.py", "from .base import a, b, c\na.append(2)\nresult = dict(b=b, c=c.a)\n")
        assert LazyConfig.load(path).result == {"b": [[1, 2]], "c": [1]}  # c became a DictConfig, a copy

    def test_nothing_global_is_patched(self, write):
        import builtins
        import sys

        before, modules = builtins.__import__, set(sys.modules)
        path = write("bad.py", "import builtins\nseen = builtins.__import__\n1 / 0\n")
        with pytest.raises(ZeroDivisionError):
            LazyConfig.load(path)
        assert builtins.__import__ is before
        assert set(sys.modules) == modules

    def test_missing_file_suggests_similar_names(self, zoo):
        path = zoo("x/top.py", "from ..common.modle import model\n")
        with pytest.raises(ImportError, match=r"common/modle\.py'.*top\.py' imports.*'model\.py'") as info:
            LazyConfig.load(path)
        assert "import packages by their full name" in str(info.value)

    def test_packages_are_not_run_as_configs(self, zoo):
        zoo("mypkg/__init__.py", "")
        zoo("mypkg/heads/__init__.py", "class MyHead: pass\n")
        path = zoo("mypkg/configs/top.py", "from ..heads import MyHead\n")
        with pytest.raises(ImportError, match=r"top\.py' imports.*; write: from mypkg\.heads import MyHead"):
            LazyConfig.load(path)

    def test_missing_name_suggests_similar_names(self, zoo):
        path = zoo("top.py", "from .common.model import modle\n")
        with pytest.raises(ImportError, match=r"model\.py' has no 'modle', which .*top\.py'.*'model'\?"):
            LazyConfig.load(path)

    def test_syntax_error_names_both_files(self, write):
        write("base.py", "model = {\n  'a' 1}\n")
        path = write("top.py", "from .base import model\n")
        with pytest.raises(SyntaxError, match=r"base\.py', which .*top\.py' imports") as info:
            LazyConfig.load(path)
        assert info.value.filename.endswith("base.py") and info.value.lineno in (1, 2)

    def test_circular_import(self, write):
        write("a.py", "from .b import x\n")
        path = write("b.py", "from .a import y\n")
        with pytest.raises(ImportError, match=r"Circular import.*: .*b\.py -> .*a\.py -> .*b\.py"):
            LazyConfig.load(path)


class TestLoad:
    def test_keys_select_variables(self, zoo, tmp_path):
        path = str(tmp_path / "common/model.py")
        assert set(LazyConfig.load(path)) == {"model", "sizes"}
        assert OmegaConf.is_dict(LazyConfig.load(path, "sizes"))
        model, hidden = LazyConfig.load(path, ("model", "_hidden"))
        assert hidden.a == 1 and model._target_ is nn.Sequential
        assert LazyConfig.load(str(tmp_path / "common/data/v0.5/train.py"), "TIMES") == 3
        with pytest.raises(KeyError, match="has no 'size'. Did you mean 'sizes'"):
            LazyConfig.load(path, "size")

    def test_missing_file_or_wrong_extension_fails(self, zoo, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"Did you mean '.*common/model\.py'"):
            LazyConfig.load(str(tmp_path / "common/modle.py"))
        with pytest.raises(ValueError, match=r"must end in \.py, \.yaml or \.yml"):
            LazyConfig.load("config.json")

    def test_yaml_cannot_run_code(self, write):
        cfg = LazyConfig.load(write("a.yaml", "model: {_target_: torch.nn.ReLU}\nlr: 1e-3\n"))
        assert isinstance(instantiate(cfg.model), nn.ReLU) and cfg.lr == 1e-3
        with pytest.raises(ValueError, match="refused"):
            LazyConfig.load(write("b.yaml", "a: !!python/object/apply:os.getcwd []\n"))

    @pytest.mark.parametrize(
        "line",
        [
            "a{next}: ${{a{n}}}${{a{n}}}${{a{n}}}",
            "a{next}: {{x: '${{a{n}}}', y: '${{a{n}}}'}}",
            "a{next}: ['${{a{n}}}', '${{..a{n}}}']",
            "a{next}: {{x: '${{..a{n}}}', y: '${{a{n}}}'}}",
        ],
    )
    def test_interpolations_that_expand_without_bound_are_refused(self, write, line):
        lines = ["a0: {x: 1}"] + [line.format(n=n, next=n + 1) for n in range(40)]
        with pytest.raises(ValueError, match=r"bomb.yaml: the interpolations in a\d+.* expand to \d+ values"):
            LazyConfig.load(str(write("bomb.yaml", "\n".join(lines))))

    def test_usual_interpolations_are_read(self, write):
        text = (
            "n: 3\nm: {a: '${n}', b: ['${..a}', '${m.b[0]}'], c: '${.c}', d: '${x.y}', e: '${oc.env:HOME}'}\n"
        )
        cfg = LazyConfig.load(
            str(write("a.yaml", text + "\n".join(f"p{i}: '${{n}}/${{n}}'" for i in range(99))))
        )
        assert cfg.m.b[1] == 3 and cfg.p7 == "3/3"

    def test_load_rel_is_relative_to_the_calling_file(self, zoo, tmp_path):
        script = zoo(
            "script.py", "from detlib.config import LazyConfig as C\ndef f(p, k): return C.load_rel(p, k)"
        )
        names = {}
        exec(compile(open(script).read(), script, "exec"), names)
        assert names["f"]("common/model.py", "sizes").widths == [1, 2]
        exec("from detlib.config import LazyConfig\ndef f(): LazyConfig.load_rel('a.py')", names)
        with pytest.raises(ValueError, match="which is not a file"):
            names["f"]()


def build(width, depth=2, *, norm=None, sizes=(1, 2)):
    """Return the arguments; the target of the overrides."""
    return width, depth, norm, sizes


class TestOverrides:
    @pytest.fixture
    def cfg(self):
        model = LazyCall(build)(width=3, sizes=(1, 2), parts=[LazyCall(nn.Linear)(in_features=1)])
        return OmegaConf.create({"model": model, "train": {"max_iter": 90}}, flags={"allow_objects": True})

    @pytest.mark.parametrize(
        "text, value",
        [
            ("7", 7),
            ("-1_000", -1000),
            ("0x10", 16),
            ("1e-3", 1e-3),
            ("2.", 2.0),
            ("-inf", float("-inf")),
            ("null", None),
            ("None", None),
            ("true", True),
            ("False", False),
            ("", ""),
            ("BGR", "BGR"),
            ("1x", "1x"),
            ("e", "e"),
            ("a=b:c", "a=b:c"),
            ("https://host/x.pkl?a=1", "https://host/x.pkl?a=1"),
            ("'1'", "1"),
            (r'"a \"b\""', 'a "b"'),
            ("[1, [2,x], 'y, z', null]", [1, [2, "x"], "y, z", None]),
            ("(0.9,0.99,)", [0.9, 0.99]),
            ("[]", []),
            ("{a: 1, 'b c':[x,2], d:{}}", {"a": 1, "b c": ["x", 2], "d": {}}),
            ("[${.width}, ${a,b}]", ["${.width}", "${a,b}"]),
            ("[a] b", "[a] b"),
            ("${..width}", "${..width}"),
        ],
    )
    def test_value_syntax(self, text, value):
        cfg = OmegaConf.create({"a": 0})
        LazyConfig.apply_overrides(cfg, [f"a={text}"])
        got = OmegaConf.to_container(cfg, resolve=False)["a"]
        assert got == value and type(got) is type(value)

    @pytest.mark.parametrize("text", ["0b12", "0xg", "0o9", "+0x_"])
    def test_text_that_only_begins_like_a_number_is_a_text(self, text):
        assert parse_value(text) == text

    @pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000])
    def test_value_that_is_nested_too_deeply_fails(self, text):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_value(text)

    def test_path_syntax(self, cfg):
        result = LazyConfig.apply_overrides(
            cfg,
            [
                "train.max_iter=5",
                "model.parts.0.in_features=8",
                "model.parts[0].bias=false",
                "model.sizes.1=9",
            ],
        )
        assert result is cfg and cfg.train.max_iter == 5
        assert cfg.model.parts[0] == {"in_features": 8, "_target_": nn.Linear, "bias": False}
        assert list(cfg.model.sizes) == [1, 9]

    def test_arguments_of_the_target_may_be_added(self, cfg):
        LazyConfig.apply_overrides(cfg, ["model.depth=4", "model.norm.name=GN"])
        del cfg.model["parts"]
        assert instantiate(cfg.model)[:3] == (3, 4, {"name": "GN"})

    def test_marks_add_and_remove(self, cfg):
        LazyConfig.apply_overrides(cfg, ["+train.amp.enabled=true", "++train.max_iter=1", "~model.width"])
        assert cfg.train == {"max_iter": 1, "amp": {"enabled": True}} and "width" not in cfg.model
        LazyConfig.apply_overrides(cfg, ["~train.amp.enabled=true", "+model.parts.1=x"])
        assert cfg.train.amp == {} and cfg.model.parts[1] == "x"

    @pytest.mark.parametrize(
        "text, error, message",
        [
            (
                "train.max_itr=1",
                KeyError,
                r"train has no 'max_itr'\. Did you mean 'max_iter'\? Write \+train",
            ),
            ("model.widht=1", KeyError, r"model has no 'widht'\. Did you mean 'width'\?"),
            ("model.nrm=GN", KeyError, r"Did you mean 'norm'"),
            ("trian.max_iter=1", KeyError, r"the config has no 'trian'\. Did you mean 'train'"),
            ("train.max_iter.x=1", KeyError, r"train\.max_iter is not a section but 90, so it has no 'x'"),
            ("model.parts.3.bias=1", KeyError, r"model\.parts is a list of length 1 and has no item 3"),
            ("+train.max_iter=1", KeyError, r"train\.max_iter already exists"),
            ("~train.max_it", KeyError, r"no train\.max_it to remove\. Did you mean 'max_iter'"),
            ("~train.max_iter=1", ValueError, r"train\.max_iter is 90, so it is not removed"),
            ("train.max_iter", ValueError, r"has the form path\.to\.key=value, got 'train\.max_iter'"),
            ("train..max_iter=1", ValueError, "has an empty part"),
            ("train.max_iter=[1,", ValueError, r"'\[' is not closed"),
            ("train.max_iter=[[1] 2]", ValueError, r"Expected ',' or '\]' before '2\]'"),
            ("train.max_iter={a}", ValueError, "Expected ':' after the key 'a'"),
            ("train.max_iter='a", ValueError, "A ' is not closed"),
        ],
    )
    def test_wrong_override_changes_nothing(self, cfg, text, error, message):
        before = cfg.copy()
        with pytest.raises(error, match=message):
            LazyConfig.apply_overrides(cfg, [text])
        assert cfg == before

    def test_string_instead_of_list_fails(self, cfg):
        with pytest.raises(TypeError, match="overrides must be a list"):
            LazyConfig.apply_overrides(cfg, "train.max_iter=1")


class TestSave:
    def test_saved_config_builds_the_same_objects(self, tmp_path):
        cfg = OmegaConf.create(
            {
                "width": 6,
                "model": LazyCall(nn.Linear)(in_features="${..width}", out_features=(2)),
                "norm": functools.partial(nn.LayerNorm, eps=1e-6),
                "power": functools.partial(pow, 2),
                "kind": nn.ReLU,
                "shapes": [ShapeSpec(channels=3)],
                "betas": (0.9, 0.99),
                "dtype": None,
            },
            flags={"allow_objects": True},
        )
        path = str(tmp_path / "cfg.yaml")
        LazyConfig.save(cfg, path)
        loaded = LazyConfig.load(path)
        assert loaded.model._target_ == "torch.nn.Linear"
        made = instantiate(loaded)
        assert made["model"].in_features == 6 and made["norm"](4).eps == 1e-6 and made["power"](5) == 32
        assert made["kind"] is nn.ReLU and made["shapes"] == [ShapeSpec(channels=3)]
        assert made["betas"] == [0.9, 0.99] and made["dtype"] is None
        LazyConfig.save(loaded, str(tmp_path / "again.yaml"))
        assert (tmp_path / "again.yaml").read_text() == (tmp_path / "cfg.yaml").read_text()

    def test_values_that_cannot_be_saved_are_named(self, tmp_path):
        path = tmp_path / "cfg.yaml"
        path.write_text("old")
        cfg = LazyCall(nn.Sequential)(a=[1, lambda: 1], b={"c": torch.zeros(1)}, d=LazyCall(lambda: 1)())
        with pytest.raises(ValueError, match=r"a\[1\] \(.*<lambda>.*; b\.c \(.*; d\._target_ "):
            LazyConfig.save(cfg, str(path))
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_to_py_writes_assignments_and_calls():
    cfg = OmegaConf.create(
        {
            "train": {"amp": {"enabled": False}, "max_iter": 90},
            "model": LazyCall(nn.Sequential)(
                first=LazyCall(nn.Linear)(in_features="${..n}", out_features=[1, 2]),
                norm=functools.partial(nn.LayerNorm, eps=1e-06),
                activation=nn.ReLU,
                shape=ShapeSpec(channels=3),
            ),
        },
        flags={"allow_objects": True},
    )
    text = LazyConfig.to_py(cfg)
    assert text == textwrap.dedent(
        """\
        cfg.train.amp.enabled = False
        cfg.train.max_iter = 90
        cfg.model = torch.nn.Sequential(
            first=torch.nn.Linear(in_features='${..n}', out_features=[1, 2]),
            norm=functools.partial(torch.nn.LayerNorm, eps=1e-06),
            activation=torch.nn.ReLU,
            shape=detlib.layers.ShapeSpec(channels=3, height=None, width=None, stride=None),
        )
        """
    )
    assert LazyConfig.to_py(cfg, prefix="").startswith("train.amp.enabled = False\n")


def test_override_with_a_malformed_interpolation_is_named():
    cfg = LazyConfig.apply_overrides(OmegaConf.create({"a": "${b}", "b": 1}), ["a=2"])
    assert cfg.a == 2
    with pytest.raises(ValueError, match=r"'a=\$\{\.\.b': the interpolation is not valid"):
        LazyConfig.apply_overrides(OmegaConf.create({"a": "${b}", "b": 1}), ["a=${..b"])
