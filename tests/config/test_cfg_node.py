import copy
import pickle

import pytest

from detlib.config import CfgNode, get_cfg, global_cfg, set_global_cfg


def test_keys_are_attributes_and_dicts_are_sections():
    cfg = CfgNode({"A": {"B": 1}})
    assert cfg.A.B == cfg["A"]["B"] == 1 and isinstance(cfg.A, CfgNode)
    cfg.A.C = {"D": (1, 2)}
    assert isinstance(cfg.A.C, CfgNode) and cfg.A.C.D == (1, 2)
    assert hasattr(cfg, "A") and not hasattr(cfg, "Z")
    with pytest.raises(AttributeError, match="'BASE_LRR'.*'BASE_LR'"):
        _ = get_cfg().SOLVER.BASE_LRR
    with pytest.raises(TypeError, match="KEY.*set"):
        cfg.KEY = {1, 2}


def test_copies_are_independent():
    cfg = get_cfg()
    for other in (cfg.clone(), copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert other == cfg and type(other.MODEL.RPN) is CfgNode
        other.MODEL.RPN.IN_FEATURES.append("p9")
        other.SOLVER.BASE_LR = 7.0
        assert cfg.MODEL.RPN.IN_FEATURES == ["res4"] and cfg.SOLVER.BASE_LR == 0.001


def test_frozen_config_rejects_changes():
    cfg = get_cfg()
    cfg.freeze()
    with pytest.raises(AttributeError, match="BASE_LR.*frozen"):
        cfg.SOLVER.BASE_LR = 1.0
    with pytest.raises(AttributeError, match="frozen"):
        cfg.merge_from_list(["SOLVER.BASE_LR", 1.0])
    assert cfg.SOLVER.BASE_LR == 0.001 and cfg.clone().is_frozen()
    cfg.defrost()
    cfg.SOLVER.BASE_LR = 1.0
    assert cfg.SOLVER.BASE_LR == 1.0


def test_set_global_cfg():
    cfg = get_cfg()
    cfg.GLOBAL.HACK = 4.0
    set_global_cfg(cfg)
    assert global_cfg.GLOBAL.HACK == 4.0
    set_global_cfg(get_cfg())
    assert global_cfg.GLOBAL.HACK == 1.0


@pytest.mark.parametrize(
    ("key", "given", "stored"),
    [
        ("SOLVER.BASE_LR", "0.02", 0.02),
        ("SOLVER.BASE_LR", "1e-3", 0.001),
        ("SOLVER.BASE_LR", 1, 1.0),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.STEPS", "(10, 20)", (10, 20)),
        ("SOLVER.STEPS", "[10, 20]", (10, 20)),
        ("SOLVER.STEPS", [10, 20], (10, 20)),
        ("MODEL.RPN.IN_FEATURES", "('p2', 'p3')", ["p2", "p3"]),
        ("MODEL.RPN.IN_FEATURES", "p2", ["p2"]),
        ("DATASETS.TEST", "name", ("name",)),
        ("DATASETS.TEST", "('a', 'b')", ("a", "b")),
        ("DATASETS.TRAIN", "voc:../some dir@train", ("voc:../some dir@train",)),
        ("MODEL.MASK_ON", "True", True),
        ("MODEL.MASK_ON", "true", True),
        ("MODEL.MASK_ON", "false", False),
        ("MODEL.WEIGHTS", "", ""),
        ("MODEL.WEIGHTS", "''", ""),
        ("MODEL.WEIGHTS", "a/b.pkl", "a/b.pkl"),
        ("OUTPUT_DIR", "2024", "2024"),
        ("SOLVER.WEIGHT_DECAY_BIAS", "0.5", 0.5),
        ("SOLVER.WEIGHT_DECAY_BIAS", "None", None),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[16],[32]]", [[16], [32]]),
        ("INPUT.CROP", "{'ENABLED': True}", None),
    ],
)
def test_override_is_converted_to_the_type_of_the_key(key, given, stored):
    cfg = get_cfg()
    cfg.merge_from_list([key, given])
    section, _, name = key.rpartition(".")
    node = cfg
    for part in section.split(".") if section else []:
        node = node[part]
    if key == "INPUT.CROP":
        assert node.CROP.ENABLED is True and node.CROP.TYPE == "relative_range"
    else:
        assert node[name] == stored and type(node[name]) is type(stored)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        (["SOLVER.BASE_LRR", "1"], KeyError, ["SOLVER.BASE_LRR", "SOLVER.BASE_LR"]),
        (["SOLVER.NUM_CLASSES", "1"], KeyError, ["SOLVER.NUM_CLASSES", "MODEL.ROI_HEADS.NUM_CLASSES"]),
        (["MODEL.SOLVER.BASE_LR", "1"], KeyError, ["MODEL.SOLVER.BASE_LR", "Did you mean SOLVER.BASE_LR"]),
        (["BASE_LR", "1"], KeyError, ["BASE_LR", "SOLVER.BASE_LR"]),
        (["solver.base_lr", "1"], KeyError, ["SOLVER.BASE_LR"]),
        (["SOLVER.BASE_LR.X", "1"], KeyError, ["SOLVER.BASE_LR.X"]),
        (["MODEL.WEIGHT", "a"], KeyError, ["MODEL.WEIGHTS"]),
        (["SOLVER.BASE_LR", "fast"], ValueError, ["SOLVER.BASE_LR", "float", "'fast'", "str", "0.001"]),
        (["SOLVER.BASE_LR", True], ValueError, ["SOLVER.BASE_LR", "float", "bool"]),
        (["SOLVER.MAX_ITER", "1.5"], ValueError, ["SOLVER.MAX_ITER", "int", "1.5", "float"]),
        (["MODEL.MASK_ON", "1"], ValueError, ["MODEL.MASK_ON", "bool", "int"]),
        (["INPUT.MIN_SIZE_TRAIN", "240"], ValueError, ["INPUT.MIN_SIZE_TRAIN", "tuple", "(240,)"]),
        (["SOLVER.STEPS", "ten"], ValueError, ["SOLVER.STEPS", "tuple", "'ten'"]),
        (["TEST.EXPECTED_RESULTS", "AP"], ValueError, ["TEST.EXPECTED_RESULTS", "list"]),
        (["SOLVER", "1"], ValueError, ["SOLVER", "section"]),
        (["SOLVER.BASE_LR", "{'X': 1}"], ValueError, ["SOLVER.BASE_LR", "not a section"]),
        (["SOLVER.BASE_LR", {1}], ValueError, ["SOLVER.BASE_LR", "set"]),
        (["SOLVER.BASE_LR"], ValueError, ["KEY VALUE", "3 items"]),
        (["SOLVER.BASE_LR=1"], ValueError, ["SOLVER.BASE_LR 1"]),
        ([3, "SOLVER.BASE_LR"], ValueError, ["3"]),
    ],
)
def test_wrong_overrides_change_nothing(given, kind, words):
    cfg = get_cfg()
    with pytest.raises(kind) as error:
        cfg.merge_from_list(["SOLVER.GAMMA", "0.5", *given])
    for word in words:
        assert word in str(error.value)
    assert cfg == get_cfg()


def test_merge_from_other_cfg_copies_and_converts():
    cfg = get_cfg()
    other = CfgNode({"SOLVER": {"BASE_LR": 0.5, "STEPS": [1, 2]}})
    cfg.merge_from_other_cfg(other)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS) == (0.5, (1, 2))
    other.SOLVER.STEPS.append(3)
    assert cfg.SOLVER.STEPS == (1, 2)
    cfg.merge_from_other_cfg({"DATASETS": {"TEST": "name"}})
    assert cfg.DATASETS.TEST == ("name",)
    with pytest.raises(KeyError, match="_BASE_"):
        cfg.merge_from_other_cfg({"_BASE_": "x.yaml"})
    with pytest.raises(TypeError, match="str"):
        cfg.merge_from_other_cfg("x.yaml")


def test_section_with_new_allowed_accepts_new_keys():
    cfg = get_cfg()
    cfg.MODEL.MINE = CfgNode(new_allowed=True)
    cfg.merge_from_other_cfg({"MODEL": {"MINE": {"A": 1, "B": {"C": [2]}}}})
    assert cfg.MODEL.MINE.A == 1 and isinstance(cfg.MODEL.MINE.B, CfgNode) and cfg.MODEL.MINE.B.C == [2]
    cfg.merge_from_list(["MODEL.MINE.A", "3"])
    assert cfg.MODEL.MINE.A == 3


def test_deprecated_key_is_ignored_and_renamed_key_fails():
    cfg = get_cfg()
    cfg.register_deprecated_key("SOLVER.OLD")
    cfg.register_renamed_key("SOLVER.RATE", "SOLVER.BASE_LR")
    cfg.merge_from_other_cfg({"SOLVER": {"OLD": 1, "GAMMA": 0.5}})
    cfg.merge_from_list(["SOLVER.OLD", "2"])
    assert cfg.SOLVER.GAMMA == 0.5 and "OLD" not in cfg.SOLVER
    with pytest.raises(KeyError, match="SOLVER.RATE was renamed to SOLVER.BASE_LR"):
        cfg.merge_from_list(["SOLVER.RATE", "2"])
