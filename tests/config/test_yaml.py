import logging

import pytest

from detlib.config import CfgNode, LazyConfig, get_cfg
from detlib.config._expression import evaluate

RETINANET_SIZES = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


def merged(path, **kwargs):
    cfg = get_cfg()
    cfg.merge_from_file(path, **kwargs)
    return cfg


def fails(path, kind, *words):
    cfg = get_cfg()
    with pytest.raises(kind) as error:
        cfg.merge_from_file(path)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert cfg == get_cfg()


def test_later_bases_override_earlier_ones(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write("a/first.yaml", "SOLVER: {BASE_LR: 0.1, GAMMA: 0.5, STEPS: [1, 2, 3]}\nSEED: 1")
    write("second.yaml", "SOLVER: {GAMMA: 0.25}\nSEED: 2")
    write("home/third.yaml", "SEED: 3\nVIS_PERIOD: 5")
    middle = write(
        "b/middle.yaml", "_BASE_: [../a/first.yaml, ../second.yaml, ~/third.yaml]\nSOLVER: {STEPS: [9]}"
    )
    cfg = merged(write("top.yaml", f"_BASE_: {middle}\nSOLVER:\n  MAX_ITER: 7\n"))
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA, cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == (
        0.1,
        0.25,
        (9,),
        7,
    )
    assert (cfg.SEED, cfg.VIS_PERIOD) == (3, 5)
    assert "_BASE_" not in cfg
    tree = CfgNode.load_yaml_with_base(str(tmp_path / "top.yaml"), allow_unsafe=True)
    assert tree["SOLVER"] == {"BASE_LR": 0.1, "GAMMA": 0.25, "STEPS": [9], "MAX_ITER": 7}


def test_missing_circular_or_wrong_base_fails(write, tmp_path):
    fails(write("a.yaml", "_BASE_: gone.yaml"), FileNotFoundError, "gone.yaml", "a.yaml", "_BASE_")
    write("one.yaml", "_BASE_: two.yaml")
    fails(write("two.yaml", "_BASE_: one.yaml"), ValueError, "Circular", "one.yaml", "two.yaml")
    fails(write("c.yaml", "_BASE_: 3"), ValueError, "c.yaml", "_BASE_", "3")
    write("flat.yaml", "SOLVER: 3")
    fails(write("d.yaml", "_BASE_: flat.yaml\nSOLVER: {GAMMA: 1}"), ValueError, "d.yaml", "SOLVER")


def test_missing_file_suggests_similar_paths(write, tmp_path, monkeypatch):
    write("configs/COCO/mask_rcnn.yaml", "SEED: 1")
    fails(
        str(tmp_path / "configs/COCO/mask_rcn.yaml"),
        FileNotFoundError,
        "mask_rcn.yaml",
        "COCO/mask_rcnn.yaml'?",
    )
    fails(str(tmp_path / "configs/Coco/mask_rcnn.yaml"), FileNotFoundError, "configs/COCO/mask_rcnn.yaml'?")
    fails(str(tmp_path / "configs/mask_rcnn.yaml"), FileNotFoundError, "configs/mask_rcnn.yaml")
    monkeypatch.chdir(tmp_path)
    fails("COCO/mask_rcnn.yaml", FileNotFoundError, "'COCO/mask_rcnn.yaml'", "'configs/COCO/mask_rcnn.yaml'?")
    fails("zzz.yaml", FileNotFoundError, "'zzz.yaml'", str(tmp_path))
    fails(str(tmp_path / "configs"), FileNotFoundError, "configs")


def test_error_names_the_file_with_the_wrong_value(write):
    write("base.yaml", "SOLVER: {BASE_LRR: 0.1}")
    top = write("top.yaml", "_BASE_: base.yaml\nSEED: 1")
    fails(top, KeyError, "SOLVER.BASE_LRR", "base.yaml", "SOLVER.BASE_LR")
    fails(write("a.yaml", "SOLVR: {BASE_LR: 0.1}"), KeyError, "SOLVR", "a.yaml", "SOLVER")
    fails(
        write("b.yaml", "SEED: 1\nSOLVER: {BASE_LR: fast}"), ValueError, "SOLVER.BASE_LR", "b.yaml", "'fast'"
    )
    fails(write("c.yaml", "SEED: 1\nSOLVER: [1]"), ValueError, "SOLVER", "section", "c.yaml")


def test_values_are_converted_to_the_type_of_the_key(write):
    text = """
    SOLVER: {BASE_LR: 1e-3, GAMMA: 1, STEPS: "(60, 80)", WEIGHT_DECAY_BIAS: 0.1}
    DATASETS: {TEST: name}
    MODEL: {MASK_ON: yes, PIXEL_STD: [1e-1, 2E+1, 3.e1]}
    INPUT:
    """
    cfg = merged(write("a.yaml", text))
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA, cfg.SOLVER.STEPS) == (0.001, 1.0, (60, 80))
    assert (cfg.DATASETS.TEST, cfg.MODEL.MASK_ON, cfg.SOLVER.WEIGHT_DECAY_BIAS) == (("name",), True, 0.1)
    assert cfg.MODEL.PIXEL_STD == [0.1, 20.0, 30.0]
    assert merged(write("empty.yaml", "")) == get_cfg()


def test_duplicate_key_is_logged(write, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detlib"), "propagate", True)
    assert merged(write("a.yaml", "SEED: 1\nVIS_PERIOD: 2\nSEED: 3")).SEED == 3
    assert "a.yaml" in caplog.text and "line 3" in caplog.text and "'SEED'" in caplog.text


def test_invalid_file_fails(write):
    fails(write("a.yaml", "SOLVER: [1, 2\nSEED: 1"), ValueError, "a.yaml", "line 2")
    fails(write("b.yaml", "- 1\n- 2"), ValueError, "b.yaml", "list")
    fails(write("c.yaml", "SEED: !thing 3"), ValueError, "c.yaml", "!thing")
    fails(write("d.yaml", "[" * 3000), ValueError, "d.yaml")
    fails(write("e.yaml", "VERSION: 3"), ValueError, "e.yaml", "VERSION", "3")
    fails(write("f.yaml", "VERSION: two"), ValueError, "f.yaml", "VERSION", "'two'")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"A: \x01", ["'\\x01' at position 3"]),
        (b"A: \xff\xfe", ["not utf-8 text"]),
        (b"SOLVER:\n  MAX_ITER: " + b"9" * 5000, ["line 2", "a number of 5000 digits"]),
        (b"SOLVER:\n  BASE_LR: 1" + b"0" * 400, ["SOLVER.BASE_LR", "401 digits"]),
        (b"A: 1" + b":1" * 600, ["line 1", "digits"]),
        (b"SOLVER: &a\n  X: *a", ["the anchor itself"]),
        (b"DATASETS:\n  TRAIN: &a [*a]", ["line 2", "the anchor itself"]),
        (b"? [1, 2]\n: 3", ["unhashable"]),
        (b"A: 2020-99-99", ["line 1", "'2020-99-99' is not a valid timestamp"]),
        (b"A: 0x_", ["'0x_' is not a valid int"]),
        (b"A: !!bool x", ["'x' is not a valid bool"]),
        (b"A: !!int ''", ["'' is not a valid int"]),
        (b"A: !!timestamp x", ["'x' is not a valid timestamp"]),
        (b'_BASE_: "a\\0b"', ["_BASE_", "null byte"]),
    ],
)
def test_damaged_file_fails_with_its_name(tmp_path, content, words):
    path = tmp_path / "damaged.yaml"
    path.write_bytes(content)
    fails(path, ValueError, "damaged.yaml", *words)


def test_file_in_utf_16_is_read(tmp_path):
    (tmp_path / "a.yaml").write_bytes("SOLVER: {MAX_ITER: 5}".encode("utf-16"))
    assert merged(tmp_path / "a.yaml").SOLVER.MAX_ITER == 5


@pytest.mark.parametrize(
    "text",
    [
        "{} [*a{n}, *a{n}, *a{n}, *a{n}, *a{n}, *a{n}, *a{n}, *a{n}, *a{n}]",
        "{} {{a: *a{n}, b: *a{n}, c: *a{n}}}",
        "{} {{<<: [*a{n}, *a{n}, *a{n}, *a{n}], x{n}: 1}}",
    ],
)
def test_aliases_that_expand_without_bound_are_refused(write, text):
    lines = ["a0: &a0 {x: 1}"] + [text.format(f"a{n + 1}: &a{n + 1}", n=n) for n in range(40)]
    path = write("bomb.yaml", "\n".join(lines))
    fails(path, ValueError, "bomb.yaml", "aliases would expand")
    with pytest.raises(ValueError, match=r"bomb.yaml.*aliases would expand"):
        LazyConfig.load(path)


def test_value_shared_by_an_alias_is_overridden_in_one_section_only(write):
    write("base.yaml", "SOLVER: {EMA: &ema {ENABLED: false}, AMP: *ema}")
    cfg = merged(write("a.yaml", "_BASE_: base.yaml\nSOLVER: {AMP: {ENABLED: true}}"))
    assert cfg.SOLVER.AMP.ENABLED and not cfg.SOLVER.EMA.ENABLED


def test_each_file_of_a_tree_of_bases_is_read_once(write):
    write("c0.yaml", "SEED: 0\nVIS_PERIOD: 7")
    for i in range(1, 40):
        write(f"c{i}.yaml", f"_BASE_: [c{i - 1}.yaml, c{max(0, i - 2)}.yaml, c{i - 1}.yaml]\nSEED: {i}")
    cfg = merged(write("a.yaml", "_BASE_: c39.yaml"))
    assert (cfg.SEED, cfg.VIS_PERIOD) == (39, 7)


def test_chain_of_too_many_bases_fails(write):
    for i in range(60):
        write(f"c{i}.yaml", f"_BASE_: c{i + 1}.yaml")
    write("c60.yaml", "SEED: 1")
    fails(write("c.yaml", "_BASE_: c0.yaml"), ValueError, "c.yaml", "more than 50 files")


@pytest.mark.parametrize("allow_unsafe", [True, False])
def test_eval_tag_is_evaluated_as_arithmetic(write, allow_unsafe):
    text = f'MODEL:\n  ANCHOR_GENERATOR:\n    SIZES: !!python/object/apply:eval ["{RETINANET_SIZES}"]\n'
    cfg = merged(write("a.yaml", text), allow_unsafe=allow_unsafe)
    sizes = [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)]
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == sizes


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {marker}']",
        "!!python/object/new:os.system ['touch {marker}']",
        "!!python/object/apply:subprocess.call [['touch', '{marker}']]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [1, 2]",
        "!!python/object/apply:eval [\"__import__('os').system('touch {marker}')\"]",
        "!!python/object/apply:eval [\"open('{marker}', 'w')\"]",
        "!!python/object/apply:eval ['1', '2']",
        "!!python/object/apply:eval {{args: ['1']}}",
    ],
)
def test_other_python_tags_are_refused(write, tmp_path, value):
    marker = tmp_path / "marker"
    path = write("a.yaml", "SEED: 1\nOUTPUT_DIR: " + value.format(marker=marker))
    fails(path, ValueError, "a.yaml", "line 2")
    with pytest.raises(ValueError):
        CfgNode.load_cfg(open(path))
    assert not marker.exists()


def test_error_names_the_refused_tag(write):
    fails(
        write("a.yaml", "SEED: !!python/object/apply:os.getcwd []"),
        ValueError,
        "!!python/object/apply:os.getcwd",
    )


def nested_comprehensions(depth):
    """Return an expression whose value has 9 ** depth items, which are shared lists."""
    text = "[1]"
    for _ in range(depth):
        text = f"[[x, x, x, x, x, x, x, x, x] for x in {text}]"
    return text


@pytest.mark.parametrize(
    "text",
    [
        nested_comprehensions(3),
        RETINANET_SIZES,
        "[x * y for x in [1, 2] for y in (3, 4)]",
        "[[a, b] for a in [1, 2] for b in [a, a + 1]]",
        "-2 ** 2 + 7 // 2 - 7 % 4 / 2",
        "(1, 'a', None, True, [])",
        "[[y + x for y in [1]] for x in [2]]",
    ],
)
def test_evaluate_agrees_with_python(text):
    assert evaluate(text) == eval(text)
    assert type(evaluate(text)) is type(eval(text))


@pytest.mark.parametrize(
    "text",
    [
        "print(1)",
        "(1).__class__",
        "x",
        "[y for x in [1]]",
        "[x for x in 5]",
        "[x for x in [1] if x]",
        "[a for a, b in [[1, 2]]]",
        "{x for x in [1]}",
        "[1] * 3",
        "'a' * 1000",
        "'%s' % 1",
        "True + 1",
        "1 if 1 else 2",
        "[1, 2][0]",
        "lambda: 1",
        "(y := 1)",
        "f'{1}'",
        "2 ** 65",
        "10 ** 30 * 10",
        "9 ** 60 ** 2",
        "1e400",
        "1j",
        "(-8) ** 0.5",
        "1 / 0",
        "b'a'",
        "...",
        "1 +",
        "[x for x in [1, 2, 3, 4, 5, 6, 7, 8, 9]" + " for x in [1, 2, 3, 4, 5, 6, 7, 8, 9]" * 8 + "]",
        "-" * 1500 + "1",
        "(" * 900 + ")" * 900,
        "1" * 2001,
        nested_comprehensions(10),
    ],
)
def test_evaluate_refuses_everything_else(text):
    with pytest.raises(ValueError, match="expression"):
        evaluate(text)


def test_dumped_config_can_be_loaded(write):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.STEPS", "(1, 2)", "MODEL.WEIGHTS", "a b: c"])
    again = get_cfg()
    again.merge_from_other_cfg(CfgNode.load_cfg(cfg.dump()))
    assert str(again) == str(cfg) and "!!" not in cfg.dump()
    path = write("a.yaml", cfg.dump(sort_keys=False))
    with open(path) as f:
        assert CfgNode.load_cfg(f).SOLVER.STEPS == [1, 2]
