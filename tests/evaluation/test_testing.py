"""Tests of printing, flattening and comparing results."""

import math

import pytest

from detlib.config import get_cfg
from detlib.evaluation import print_csv_format, verify_results
from detlib.evaluation.testing import flatten_results_dict

RESULTS = {"bbox": {"AP": 41.25, "AP50": 60.0, "AP-cat": 1.0}, "segm": {"AP": math.nan}}


def test_flatten_joins_nested_keys():
    assert flatten_results_dict({"bbox": {"AP": 1, "deep": {"x": 2}}, "n": 3}) == {
        "bbox/AP": 1,
        "bbox/deep/x": 2,
        "n": 3,
    }


def test_print_omits_class_metrics(log):
    print_csv_format({"bbox": RESULTS["bbox"], "score": 2})
    assert [record.getMessage() for record in log.records] == [
        "copypaste: Task: bbox",
        "copypaste: AP,AP50",
        "copypaste: 41.2500,60.0000",
        "copypaste: score=2",
    ]


def test_verify_accepts_results_within_tolerance():
    cfg = get_cfg()
    assert verify_results(cfg, RESULTS)
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 41.0, 0.25], ["bbox", "AP50", 60.0, 0.0]]
    assert verify_results(cfg, RESULTS)


@pytest.mark.parametrize(
    "expected",
    [["bbox", "AP", 41.0, 0.2], ["segm", "AP", 41.0, 99], ["keypoints", "AP", 1, 1], ["bbox", "APx", 1, 1]],
)
def test_verify_exits_on_unexpected_results(expected, log):
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = [expected]
    with pytest.raises(SystemExit) as end:
        verify_results(cfg, RESULTS)
    assert end.value.code == 1
    assert f"{expected[0]}/{expected[1]} is" in log.text
