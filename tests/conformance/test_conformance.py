"""Models built from the shipped configs give detectron2's numbers: every case in `cases/`."""

import pathlib

import pytest

from tests.conformance.harness import Case, run_case

HERE = pathlib.Path(__file__).resolve().parent
CASES = sorted((HERE / "cases").glob("*.json"))
# Cases that take long and have a quicker relative in the default run.
SLOW = {
    "COCO-Detection__retinanet_R_50_FPN_1x",
    "COCO-InstanceSegmentation__mask_rcnn_R_50_DC5_1x",
    "DINO__dino_R_50_4scale_12ep",
    "LVISv0.5-InstanceSegmentation__mask_rcnn_R_50_FPN_1x",
    "Misc__mask_rcnn_R_50_FPN_3x_gn",
    "Misc__semantic_R_50_FPN_1x",
    "PascalVOC-Detection__faster_rcnn_R_50_C4",
    "ViTDet__mask_rcnn_vitdet_b_100ep",
}


def as_param(path: pathlib.Path):
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])


@pytest.mark.parametrize("path", [as_param(path) for path in CASES])
def test_case(path):
    differences = run_case(Case.load(path), HERE.parents[1] / "configs")
    assert not differences, f"{len(differences)} differences:\n" + "\n".join(differences[:20])


def test_there_are_cases():
    assert len(CASES) >= 3
