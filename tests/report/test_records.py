"""metrics.json: damaged lines, resumed runs, and the types of scalars."""

import json
import math

import pytest

from detlib.report.records import EvaluationName, parse_evaluation, read_records
from tests.report.run_folder import record


def read(tmp_path, *lines):
    path = tmp_path / "metrics.json"
    path.write_text("".join(lines))
    return read_records(str(path))


def test_missing_file_gives_empty_records(tmp_path):
    records = read_records(str(tmp_path / "metrics.json"))
    assert records.by_iteration == {} and records.last_iteration == -1 and records.training_seconds() == 0


def test_truncated_lines_are_skipped(tmp_path):
    cut = record(59)[:40]
    records = read(tmp_path, record(19), cut + "\n", "17\n", '{"lr": 1}\n', "\n", record(39), cut)
    assert list(records.by_iteration) == [19, 39]
    assert records.skipped_lines == [2, 3, 4, 7]
    assert records.series("total_loss") == ([19, 39], [2.0 / 20, 2.0 / 40])


def test_lines_that_no_number_type_holds_are_skipped(tmp_path):
    huge = "1" + "0" * 400
    lines = ["[" * 100000, f'{{"iteration": {huge}}}', f'{{"iteration": 3, "a": {huge}, "b": 2}}']
    (tmp_path / "metrics.json").write_text("\n".join(lines) + "\n")
    records = read_records(tmp_path / "metrics.json")
    assert records.by_iteration == {3: {"b": 2.0}} and records.skipped_lines == [1, 2]


def test_resumed_run_replaces_earlier_lines(tmp_path):
    first = [record(i, source=1) for i in (9, 19, 29, 39)]
    # Resumed from iteration 20 with another logging period; then killed and resumed again.
    second = [record(i, source=2) for i in (24, 34, 44)]
    third = [record(i, source=3) for i in (44, 54)]
    records = read(tmp_path, *first, *second, *third)
    assert records.series("source") == ([9, 19, 24, 34, 44, 54], [1, 1, 2, 2, 3, 3])
    assert records.restarts == [24]


def test_repeated_iteration_drops_its_earlier_scalars(tmp_path):
    first = [record(9), record(19, **{"bbox/AP": 1.0}), record(29)]
    records = read(tmp_path, *first, record(19), record(29))
    assert "bbox/AP" not in records.names and list(records.by_iteration) == [9, 19, 29]


def test_lines_of_one_iteration_are_put_together(tmp_path):
    records = read(tmp_path, record(19), json.dumps({"iteration": 19, "bbox/AP": 5.0, "lr": 0.5}) + "\n")
    assert records.by_iteration[19]["bbox/AP"] == 5.0
    assert records.by_iteration[19]["lr"] == 0.5 and records.by_iteration[19]["total_loss"] == 0.1


def test_values_that_are_not_numbers_are_left_out_of_curves(tmp_path):
    records = read(
        tmp_path, record(0, total_loss=math.nan), record(1, total_loss=math.inf), record(2, note="text")
    )
    assert records.series("total_loss") == ([2], [2.0 / 3])
    assert "note" not in records.names


def test_training_seconds_cover_all_iterations(tmp_path):
    # 20 iterations of 0.5 s, 20 of 0.25 s.
    records = read(tmp_path, record(19), record(39, time=0.25), '{"iteration": 40, "bbox/AP": 1.0}\n')
    assert records.training_seconds() == pytest.approx(15.0)


def test_scalars_are_sorted_into_losses_rates_and_metrics(tmp_path):
    scalars = {
        "loss_box_reg": 0.1,
        "val/loss_cls": 0.2,
        "val/coco:a/b.json@c/loss_cls": 0.2,
        "validation_loss": 0.3,
        "lr/backbone": 0.001,
        "eta_seconds": 5.0,
        "data_time": 0.1,
        "mask_rcnn/accuracy": 0.9,
        "stage0/roi_head/num_fg_samples": 1.0,
        "bbox/AP": 1.0,
        "bbox/AP-T-shirt": 2.0,
        "coco:a/b.json@c/segm/AP": 3.0,
        "ours/score": 4.0,
    }
    records = read(tmp_path, record(19, **scalars))
    assert records.losses() == ["total_loss", "loss_box_reg", "loss_cls"]
    assert records.validation_losses() == {
        "loss_cls": ["val/coco:a/b.json@c/loss_cls", "val/loss_cls"],
        "total_loss": ["validation_loss"],
    }
    assert records.learning_rates() == ["lr", "lr/backbone"]
    assert records.evaluations() == {
        "bbox": {"AP": "bbox/AP"},
        "coco:a/b.json@c/segm": {"AP": "coco:a/b.json@c/segm/AP"},
        "ours": {"score": "ours/score"},
    }
    assert records.per_class() == {"bbox": {"T-shirt": {"AP": 2.0}}}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("bbox/AP50", ("", "bbox", "AP50", "")),
        ("bbox_TTA/APl", ("", "bbox_TTA", "APl", "")),
        ("bbox/AP-a/b-c", ("", "bbox", "AP", "a/b-c")),
        ("shapes:val?num=4/sem_seg/mIoU", ("shapes:val?num=4", "sem_seg", "mIoU", "")),
        ("sem_seg/min(IoU, B-Iou)-sky", ("", "sem_seg", "min(IoU, B-Iou)", "sky")),
        ("panoptic_seg/PQ_th", ("", "panoptic_seg", "PQ_th", "")),
    ],
)
def test_parse_evaluation(name, parts):
    assert parse_evaluation(name) == EvaluationName(*parts)


@pytest.mark.parametrize("name", ["lr", "time", "rpn/num_pos_anchors", "val/loss_cls", "val/total_loss"])
def test_parse_evaluation_of_other_scalars_is_none(name):
    assert parse_evaluation(name) is None
