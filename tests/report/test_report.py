"""Complete reports of finished runs and of runs with missing parts."""

import csv
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from detlib.config import get_cfg
from detlib.report import make_report, write_report
from detlib.report.__main__ import main
from detlib.report.detection_plots import pr_curve, shown_classes
from detlib.report.detections import find_predictions, load_detections
from detlib.report.run import dataset_names
from detlib.report.training_plots import smooth
from tests.report.run_folder import ground_truth_and_results, make_run, record
from tests.report.test_page import check_page

FIGURES = ("losses", "learning_rate", "evaluation", "pr_curves", "f1_curve", "confusion_matrix", "labels")


def page_of(folder, cfg=None):
    path = write_report(str(folder), cfg)
    assert path == str(folder / "report" / "index.html")
    text = (folder / "report" / "index.html").read_text()
    return check_page(text), " ".join(check_page(text).texts)


def reference_stats(ground_truth, results, tmp_path):
    """Return pycocotools' metrics in percent, overall (key None) and per category."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    path = tmp_path / "reference.json"
    path.write_text(json.dumps({**ground_truth, "info": {}}))
    api = COCO(str(path))
    evaluation = COCOeval(api, api.loadRes([dict(r) for r in results]), "bbox")
    stats = {}
    for category in (None, *sorted(c["id"] for c in ground_truth["categories"])):
        evaluation.params.catIds = sorted(api.getCatIds()) if category is None else [category]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        stats[category] = 100 * evaluation.stats
    return stats


def test_report_of_finished_run_agrees_with_pycocotools(tmp_path, capsys):
    ground_truth, results = ground_truth_and_results(num_images=14)
    folder = tmp_path / "run"
    make_run(folder, ground_truth, results)
    stats = reference_stats(ground_truth, results, tmp_path)
    checked, text = page_of(folder)
    for name in (*FIGURES, *(f"{kind}_{k}" for kind in ("best", "worst") for k in range(1, 7))):
        assert min(Image.open(folder / "report" / f"{name}.png").size) > 250, name
    assert sum(tag == "img" for tag, _ in checked.tags) == len(FIGURES) + 12
    assert (
        "40 of 40, finished" in text and "RetinaNet" in text and "No " not in text and "Skipped" not in text
    )

    # AP by pycocotools, overall and per class.
    assert {f"{value:.2f}" for value in stats[None][:3]} <= set(checked.texts)
    rows = list(csv.DictReader(io.StringIO((folder / "report" / "per_class.csv").read_text())))
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    assert [row["class"] for row in rows] == [names[i] for i in sorted(names)]
    for row, category in zip(rows, sorted(names)):
        for column, k in (("AP", 0), ("AP50", 1), ("AP75", 2), ("APs", 3), ("APm", 4)):
            expected = stats[category][k]
            assert row[column] == ("" if expected < 0 else f"{round(expected, 2)}"), column
        annotations = [a for a in ground_truth["annotations"] if a["category_id"] == category]
        assert int(row["objects"]) == sum(not a["iscrowd"] for a in annotations)

    # The mean height of a curve is the AP.
    uri = f"coco:{folder}/ground_truth.json@{folder}/images"
    found = load_detections(str(folder / "inference" / "coco_instances_results.json"), uri)
    scores = found.scores("bbox")
    assert 100 * pr_curve(scores).mean() == pytest.approx(stats[None][0], abs=1e-9)
    assert 100 * pr_curve(scores, 0.5).mean() == pytest.approx(stats[None][1], abs=1e-9)
    for k, category in enumerate(sorted(names)):
        assert 100 * pr_curve(scores, None, k).mean() == pytest.approx(stats[category][0], abs=1e-9)
        assert 100 * pr_curve(scores, 0.5, k).mean() == pytest.approx(stats[category][1], abs=1e-9)


def test_masks_have_their_own_curves_and_columns(tmp_path):
    ground_truth, results = ground_truth_and_results(num_images=3)
    for row in (*ground_truth["annotations"], *results):
        x, y, w, h = row["bbox"]
        row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        row["iscrowd"] = 0
    from pycocotools import mask

    for row in results:
        rle = mask.merge(mask.frPyObjects(row["segmentation"], 96, 96))
        row["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        del row["iscrowd"]
    folder = tmp_path / "run"
    make_run(folder, ground_truth, results)
    page_of(folder)
    header, first = (folder / "report" / "per_class.csv").read_text().splitlines()[:2]
    assert "segm AP,segm AP50,segm AP75" in header
    heights = [Image.open(folder / "report" / f"{name}.png").height for name in ("pr_curves", "f1_curve")]
    assert heights[0] > 1.5 * heights[1]


def test_report_of_metrics_only(tmp_path):
    folder = tmp_path / "run"
    make_run(folder, lines=[record(19, **{"val/total_loss": 0.5}), record(39)[:50]], config="")
    checked, text = page_of(folder)
    assert sum(tag == "img" for tag, _ in checked.tags) == 2
    assert "there is no config.yaml" in text and "metrics.json has no evaluation results" in text
    assert "line 2" in text and "no validation losses" not in text


def test_report_of_running_run(tmp_path):
    ground_truth, _ = ground_truth_and_results()
    folder = tmp_path / "run"
    make_run(folder, ground_truth, lines=[record(9), record(19)])
    _, text = page_of(folder)
    assert "20 of 40: still running, or stopped early" in text
    assert "inference/ has no coco_instances_results.json" in text


def test_missing_dataset_skips_the_predictions(tmp_path, log):
    ground_truth, results = ground_truth_and_results(num_images=4)
    folder = tmp_path / "run"
    uri = make_run(folder, ground_truth, results)
    (folder / "ground_truth.json").unlink()
    _, text = page_of(folder)
    assert f"Skipped the report on predictions for {uri}: " in text and "does not exist" in text
    assert "losses.png" in [path.name for path in (folder / "report").iterdir()]
    assert "does not exist" in log.text


def test_report_of_predictions_without_image_files(tmp_path):
    ground_truth, results = ground_truth_and_results(num_images=8)
    folder = tmp_path / "run"
    make_run(folder, ground_truth, results, lines=[], with_images=False)
    _, text = page_of(folder)
    assert "there is no metrics.json" in text
    assert text.count("Skipped the comparison for") == 2 and "The remaining images were skipped." in text
    assert (folder / "report" / "confusion_matrix.png").exists()


def test_report_of_model_without_detections(tmp_path):
    ground_truth, _ = ground_truth_and_results(num_images=4)
    folder = tmp_path / "run"
    make_run(folder, ground_truth, [])
    assert "The model has no detections at all" in page_of(folder)[1]


def test_report_of_several_datasets(tmp_path):
    ground_truth, results = ground_truth_and_results(num_images=2)
    first, second = tmp_path / "first", tmp_path / "second"
    uris = [make_run(folder, ground_truth, results) for folder in (first, second)]
    inference = first / "inference"
    flat = inference / "coco_instances_results.json"
    assert find_predictions(str(first), uris) == {uris[1]: str(flat)}
    for k, uri in enumerate(uris):
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", uri)
        (inference / name).mkdir()
        (inference / name / flat.name).write_text(json.dumps(results[: 2 + k]))
    config = get_cfg()
    config.DATASETS.TEST = tuple(uris)
    _, text = page_of(first, config)
    for k, uri in enumerate(uris):
        assert f"Detections: {uri}" in text and f"{2 + k} detections in inference/" in text
    assert len(list((first / "report").glob("*/per_class.csv"))) == 2


@pytest.mark.parametrize("num_classes", [120, pytest.param(300, marks=pytest.mark.slow)])
def test_report_with_many_classes(tmp_path, num_classes):
    ground_truth, results = ground_truth_and_results(num_images=20, num_classes=num_classes)
    ground_truth["categories"][0]["name"] = "$x_1$ <b>&"
    ground_truth["categories"][1]["name"] = "a very long name " * 10
    folder = tmp_path / "run"
    make_run(folder, ground_truth, results, with_images=False)
    checked, _ = page_of(folder)
    assert len((folder / "report" / "per_class.csv").read_text().splitlines()) == num_classes + 1
    assert sum(tag == "td" for tag, _ in checked.tags) > num_classes * 10
    for name in FIGURES:
        width, height = Image.open(folder / "report" / f"{name}.png").size
        assert width < 2600 and height < 1400, name


def test_shown_classes_are_the_most_frequent():
    assert shown_classes(np.array([3, 0, 9, 1, 5]), 3).tolist() == [0, 2, 4]
    assert shown_classes(np.array([0, 2, 0]), 3).tolist() == [1]
    assert shown_classes(np.array([0, 0, 0]), 2).tolist() == [0, 1]


def test_smooth_is_a_moving_average():
    values = np.arange(40.0) ** 2
    slow = [values[max(0, i - 2) : i + 3].mean() for i in range(40)]
    np.testing.assert_allclose(smooth(values), slow)
    assert smooth([3.0, 1.0]).tolist() == [3.0, 1.0] and smooth([]).tolist() == []


def test_report_of_semantic_segmentation(tmp_path):
    scalars = {
        "sem_seg/mIoU": 50.0,
        "sem_seg/IoU-sky": 80.0,
        "sem_seg/IoU-road": 20.0,
        "sem_seg/ACC-sky": 1.0,
    }
    folder = tmp_path / "run"
    make_run(folder, lines=[record(19), record(20, **scalars)], config="DATASETS: {TEST: [nowhere]}")
    _, text = page_of(folder)
    assert "Classes: sem_seg" in text and "coco_instances_results" not in text
    rows = list(csv.DictReader(io.StringIO((folder / "report" / "per_class_sem_seg.csv").read_text())))
    assert {row["class"]: (row["IoU"], row["ACC"]) for row in rows} == {
        "sky": ("80.0", "1.0"),
        "road": ("20.0", ""),
    }


def test_report_with_lazy_config(tmp_path):
    ground_truth, _ = ground_truth_and_results(num_images=4)
    folder = tmp_path / "run"
    uri = make_run(folder, ground_truth, [])
    (folder / "config.yaml").write_text(
        f"data: {{name: '{uri}'}}\n"
        "dataloader: {test: {dataset: {names: '${data.name}'}}, train: {total_batch_size: 16}}\n"
        "model: {_target_: detlib.modeling.FCOS}\n"
        "train: {max_iter: 90, device: cuda}\n"
    )
    _, text = page_of(folder)
    assert f"Detections: {uri}" in text and "40 of 90" in text and "FCOS" in text

    (folder / "inference").rename(folder / "elsewhere")
    with (folder / "config.yaml").open("a") as file:
        file.write(f"out: '{folder}'\n")
    _, text = page_of(folder)
    assert f"Detections: {uri}" not in text and "inference/ has no coco_instances_results.json" in text
    changed = (folder / "config.yaml").read_text()
    changed = changed.replace("dataloader: {", "dataloader: {evaluator: {output_dir: '${out}/elsewhere'}, ")
    (folder / "config.yaml").write_text(changed)
    assert f"Detections: {uri}" in page_of(folder)[1]


def test_machine_and_config_file_come_from_the_log(tmp_path):
    folder = tmp_path / "run"
    make_run(folder)
    (folder / "log.txt").write_text(
        "[01/01 00:00:00] detlib INFO: Environment:\n-----\nPython  3.11\n"
        "torch   9.9 at /x/torch\nGPU 0   A Fast One, 80.0 GiB\n-----\n\noperator  cpu\n"
        "[01/01 00:00:00] detlib INFO: Command line arguments: Namespace(config_file='a/b.yaml')\n"
    )
    (folder / "config.yaml").write_text("MODEL: {DEVICE: cuda}\n")
    _, text = page_of(folder)
    assert "a/b.yaml" in text and "cuda: A Fast One, 80.0 GiB" in text and "torch 9.9, Python 3.11" in text


def test_write_report_logs_errors_instead_of_raising(tmp_path, log, monkeypatch):
    assert write_report(str(tmp_path / "nowhere")) == ""
    assert "nowhere is not a folder" in log.text
    folder = tmp_path / "run"
    make_run(folder)
    (folder / "report").write_text("a file where the folder should be")
    assert write_report(str(folder)) == ""
    (folder / "report").unlink()

    def broken(*_):
        raise ZeroDivisionError("broken")

    monkeypatch.setattr("detlib.report.writer.losses_figure", broken)
    (folder / "config.yaml").write_text("{: no yaml")
    _, text = page_of(folder)
    assert "Skipped the loss figure: ZeroDivisionError: broken" in text and "is not valid YAML" in text
    assert (folder / "report" / "learning_rate.png").exists()


def test_command_line(tmp_path, capsys):
    folder = tmp_path / "run"
    make_run(folder)
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip().endswith("index.html")
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="none of metrics.json"):
        make_report(str(tmp_path / "empty"))


@pytest.mark.parametrize("names", [5, 1e308, None, True, {}])
def test_datasets_of_a_wrong_type_in_the_config_are_none(names):
    assert dataset_names({"DATASETS": {"TEST": names}}) == ()
