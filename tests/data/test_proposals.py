"""Files of precomputed proposals."""

import enum
import pickle
import sys
import types

import numpy as np
import pytest

from detlib.data import load_proposals_into_dataset
from detlib.structures import BoxMode

RECORDS = [{"image_id": 7}, {"image_id": "a"}]
CONTENT = {
    "ids": ["a", 7, 8],
    "boxes": [np.arange(8.0).reshape(2, 4), np.arange(12.0).reshape(3, 4), np.zeros((0, 4))],
    "objectness_logits": [np.array([0.0, 1.0]), np.array([0.5, -1.0, 2.0]), np.zeros(0)],
    "bbox_mode": BoxMode.XYWH_ABS.value,
}


def write(folder, content=CONTENT, **changes):
    path = folder / "proposals.pkl"
    path.write_bytes(pickle.dumps({**content, **changes} if isinstance(content, dict) else content))
    return str(path)


def load(path):
    return load_proposals_into_dataset([dict(r) for r in RECORDS], path)


def test_best_first(tmp_path):
    first, second = load(write(tmp_path))
    np.testing.assert_array_equal(first["proposal_objectness_logits"], [2.0, 0.5, -1.0])
    np.testing.assert_array_equal(first["proposal_boxes"][:, 0], [8, 0, 4])
    np.testing.assert_array_equal(second["proposal_boxes"][:, 0], [4, 0])
    assert first["proposal_bbox_mode"] is BoxMode.XYWH_ABS


def test_names_of_detectron_and_default_mode(tmp_path):
    old = {
        "indexes": np.array([7, 8]),
        "boxes": CONTENT["boxes"][1:],
        "scores": CONTENT["objectness_logits"][1:],
    }
    (record,) = load_proposals_into_dataset([{"image_id": 7}], write(tmp_path, old))
    assert record["proposal_bbox_mode"] is BoxMode.XYXY_ABS
    np.testing.assert_array_equal(record["proposal_objectness_logits"], [2.0, 0.5, -1.0])


class ElsewhereMode(enum.IntEnum):
    """Pickled by the name that such modes have in files made elsewhere."""

    XYWH_ABS = 1


ElsewhereMode.__module__, ElsewhereMode.__qualname__ = "detectron2.structures.boxes", "BoxMode"


@pytest.mark.parametrize("mode", [BoxMode.XYWH_ABS, ElsewhereMode.XYWH_ABS])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_the_mode_may_be_an_enumeration(tmp_path, monkeypatch, mode, protocol):
    # pickle looks a class up where it says that it is.
    for name in ("detectron2", "detectron2.structures", "detectron2.structures.boxes"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["detectron2.structures.boxes"].BoxMode = ElsewhereMode
    path = tmp_path / "proposals.pkl"
    path.write_bytes(pickle.dumps({**CONTENT, "bbox_mode": mode}, protocol=protocol))
    assert load(str(path))[0]["proposal_bbox_mode"] is BoxMode.XYWH_ABS


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "must have ids, boxes, objectness_logits, but has list"),
        ({"ids": [], "boxes": []}, r"but has \['boxes', 'ids'\]"),
        ({**CONTENT, "ids": [7, 8]}, "one entry for each image, but have 2, 3 and 3"),
        ({**CONTENT, "ids": [7, 8, 9]}, "no proposals for 1 of 2 images, such as image 'a'"),
        (
            {**CONTENT, "boxes": [np.zeros(4)] * 3},
            r"'a' has boxes of shape \(4,\) and logits .*\(2,\)",
        ),
        ({**CONTENT, "ids": 7}, "'ids' must be a list with one entry for each image, not a int"),
        ({**CONTENT, "ids": ["a", 7, None]}, "image ids must be strings or integers .*, not a NoneType"),
        ({**CONTENT, "ids": ["a", 7, 10**400]}, "image ids must be strings or integers of up to 64 bits"),
        ({**CONTENT, "boxes": [[[1, 2], [3]]] * 3}, "'a' has boxes or logits that are not arrays"),
        (
            {**CONTENT, "boxes": [np.full((2, 4), np.nan)] * 3},
            "'a' has boxes with values that are not finite",
        ),
        ({**CONTENT, "boxes": [np.full((2, 4), 1e308)] * 3}, "finite numbers up to 10000000"),
        ({**CONTENT, "boxes": [np.full((2, 4), "x")] * 3}, "'a' has boxes with values that are not finite"),
        ({**CONTENT, "boxes": [np.zeros((2, 5))] * 3}, "'a' has boxes of 5 numbers; in its bbox_mode .* 4"),
        ({**CONTENT, "objectness_logits": [np.full(2, np.nan)] * 3}, "'a' has logits that are not numbers"),
        ({**CONTENT, "bbox_mode": [1]}, r"bbox_mode must be one of 0 \(XYXY_ABS\), .*, not \[1\]"),
        ({**CONTENT, "bbox_mode": 77}, "bbox_mode must be one of .*, not 77"),
        (Evil(), "is not a proposal file: it imports 'builtins.print', which is refused"),
    ],
)
def test_bad_files(tmp_path, content, message, capsys):
    with pytest.raises(ValueError, match=f"proposals.pkl.*{message}"):
        load(write(tmp_path, content))
    assert "executed" not in capsys.readouterr().out


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pkl.*PROPOSAL_FILES_TRAIN"):
        load(str(tmp_path / "none.pkl"))
