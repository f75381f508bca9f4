"""Tests of SemSegEvaluator against sets of pixels."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.evaluation import SemSegEvaluator
from detlib.evaluation.sem_seg_evaluation import load_image_into_numpy_array
from detlib.utils import comm

NAME = "sem_seg_evaluation_test"
CLASSES = ["sky", "road", "tree", "never"]
IGNORED = 200
HEIGHT, WIDTH = 60, 80
REACH = 2  # in pixels: 2 % of the diagonal of 100 pixels


def blocks(random, num_classes=3, side=12) -> np.ndarray:
    labels = random.randint(0, num_classes, (HEIGHT // side + 1, WIDTH // side + 1))
    return labels.repeat(side, axis=0).repeat(side, axis=1)[:HEIGHT, :WIDTH].astype(np.uint8)


@pytest.fixture
def data(tmp_path):
    """A registered dataset of three label maps, and mostly correct predictions."""
    random = np.random.RandomState(0)
    records, predictions = [], []
    for i in range(3):
        gt = blocks(random)
        pred = np.roll(gt, 2, axis=1)
        pred[20:31, 10:42] = 3 if i == 0 else 1
        gt[:9, 30:50] = IGNORED
        path = tmp_path / f"{i}.png"
        Image.fromarray(gt).save(path)
        records.append({"file_name": f"{i}.jpg", "sem_seg_file_name": str(path)})
        predictions.append(pred)
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(
        stuff_classes=CLASSES,
        ignore_label=IGNORED,
        stuff_dataset_id_to_contiguous_id={10: 0, 20: 1, 25: 2, 30: 3},
    )
    yield records, predictions
    DatasetCatalog.pop(NAME)
    MetadataCatalog.pop(NAME)


def output(pred: np.ndarray) -> dict:
    """Return logits whose argmax is the prediction."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(CLASSES), *pred.shape, generator=generator)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(pred.astype(np.int64)), len(CLASSES))
    return {"sem_seg": noise + 2 * one_hot.permute(2, 0, 1)}


def run(evaluator, records, predictions):
    evaluator.reset()
    for record, pred in zip(records, predictions):
        evaluator.process([{"file_name": record["file_name"]}], [output(pred)])
    return evaluator.evaluate()["sem_seg"]


def near_outline(labels, y, x) -> bool:
    for v in range(y - REACH, y + REACH + 1):
        for u in range(x - REACH, x + REACH + 1):
            if not (0 <= v < HEIGHT and 0 <= u < WIDTH) or labels[v, u] != labels[y, x]:
                return True
    return False


def slow_counts(records, predictions, only_near=False):
    """Return the sets of ground truth, predicted, and correct pixels of each class."""
    gt_pixels, found, both = ([set() for _ in CLASSES] for _ in range(3))
    for record, pred in zip(records, predictions):
        gt = np.asarray(Image.open(record["sem_seg_file_name"]))
        for y in range(HEIGHT):
            for x in range(WIDTH):
                if gt[y, x] == IGNORED:
                    continue
                pixel = (record["file_name"], y, x)
                if not only_near or near_outline(gt, y, x):
                    gt_pixels[gt[y, x]].add(pixel)
                if not only_near or near_outline(pred, y, x):
                    found[pred[y, x]].add(pixel)
    for c in range(len(CLASSES)):
        both[c] = gt_pixels[c] & found[c]
    return gt_pixels, found, both


def test_metrics_equal_slow_counts(data):
    results = run(SemSegEvaluator(NAME), *data)
    gt_pixels, found, both = slow_counts(*data)
    total = sum(map(len, gt_pixels))
    iou, accuracy, weighted = [], [], 0
    for c, name in enumerate(CLASSES[:3]):
        iou.append(100 * len(both[c]) / len(gt_pixels[c] | found[c]))
        accuracy.append(100 * len(both[c]) / len(gt_pixels[c]))
        weighted += iou[-1] * len(gt_pixels[c]) / total
        assert results[f"IoU-{name}"] == pytest.approx(iou[-1])
        assert results[f"ACC-{name}"] == pytest.approx(accuracy[-1])
        assert results[f"Precision-{name}"] == pytest.approx(100 * len(both[c]) / len(found[c]))
    assert results["mIoU"] == pytest.approx(np.mean(iou)) and results["fwIoU"] == pytest.approx(weighted)
    assert results["mACC"] == pytest.approx(np.mean(accuracy))
    assert results["pACC"] == pytest.approx(100 * sum(map(len, both)) / total)
    # The class is predicted but does not occur, so it has no IoU and is not in the means.
    assert math.isnan(results["IoU-never"]) and math.isnan(results["ACC-never"])
    assert results["Precision-never"] == 0


def test_boundary_iou_equals_slow_counts(data):
    results = run(SemSegEvaluator(NAME), *data)
    gt_pixels, found, both = slow_counts(*data, only_near=True)
    for c, name in enumerate(CLASSES[:3]):
        want = 100 * len(both[c]) / len(gt_pixels[c] | found[c])
        assert results[f"BoundaryIoU-{name}"] == pytest.approx(want)
        assert 0 < want < results[f"IoU-{name}"] == pytest.approx(results[f"IoU-{name}"])
        assert results[f"min(IoU, B-Iou)-{name}"] == pytest.approx(min(want, results[f"IoU-{name}"]))


def test_perfect_predictions(data):
    records, _ = data
    labels = [np.asarray(Image.open(r["sem_seg_file_name"])) for r in records]
    results = run(SemSegEvaluator(NAME), records, [np.where(t == IGNORED, 1, t) for t in labels])
    assert results["mIoU"] == results["pACC"] == results["fwIoU"] == results["mACC"] == 100


def test_reset_discards_counts_and_batches_add_up(data):
    records, predictions = data
    evaluator = SemSegEvaluator(NAME, distributed=False)
    first = run(evaluator, records, predictions)
    again = run(evaluator, records, predictions)
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(first.values(), again.values()))
    evaluator.reset()
    inputs = [{"file_name": r["file_name"]} for r in records]
    evaluator.process(inputs, [output(p) for p in predictions])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == first["mIoU"]


def test_counts_of_all_processes_are_added(data, monkeypatch):
    records, predictions = data
    want = run(SemSegEvaluator(NAME), records, predictions)
    first, second = (SemSegEvaluator(NAME) for _ in range(2))
    run(second, records[1:], predictions[1:])
    other = (second._confusion, second._boundary_confusion, second._predictions)
    monkeypatch.setattr(comm, "all_gather", lambda mine: [mine, other])
    assert run(first, records[:1], predictions[:1]) == pytest.approx(want, nan_ok=True)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert first.evaluate() is None
    alone = SemSegEvaluator(NAME, distributed=False)
    assert run(alone, records, predictions) == pytest.approx(want, nan_ok=True)


def test_written_files_have_the_predicted_classes(data, tmp_path):
    records, predictions = data
    run(SemSegEvaluator(NAME, output_dir=str(tmp_path / "out")), records, predictions)
    written = json.loads((tmp_path / "out" / "sem_seg_predictions.json").read_text())
    labels = {10: 0, 20: 1, 25: 2, 30: 3}
    assert len(written) == sum(len(np.unique(p)) for p in predictions)
    for entry in written:
        pred = predictions[int(entry["file_name"][0])]
        mask = mask_utils.decode(entry["segmentation"])
        np.testing.assert_array_equal(mask, pred == labels[entry["category_id"]])
    results = torch.load(tmp_path / "out" / "sem_seg_evaluation.pth", weights_only=True)
    assert 0 < results["mIoU"] < 100


def test_custom_loading_function_is_used(data):
    records, predictions = data
    custom = SemSegEvaluator(
        NAME, sem_seg_loading_fn=lambda path: load_image_into_numpy_array(path, dtype=np.int64)
    )
    assert (
        run(custom, records, predictions)["mIoU"] == run(SemSegEvaluator(NAME), records, predictions)["mIoU"]
    )
    array = load_image_into_numpy_array(records[0]["sem_seg_file_name"], copy=True)
    array[0] = 0
    assert array.dtype == np.uint8


def test_invalid_arguments_and_inputs_raise(data, tmp_path):
    records, predictions = data
    with pytest.raises(ValueError, match="num_classes is 3, but .*4 stuff_classes"):
        SemSegEvaluator(NAME, num_classes=3)
    with pytest.raises(ValueError, match="no stuff_classes"):
        SemSegEvaluator("sem_seg_evaluation_unknown")
    MetadataCatalog.pop("sem_seg_evaluation_unknown")
    evaluator = SemSegEvaluator(NAME)
    for image, out, message in (
        ({"file_name": "x.jpg"}, output(predictions[0]), "no label map for the image 'x.jpg'"),
        ({"file_name": "0.jpg"}, output(predictions[0][:9]), r"0.png' has the size \(60, 80\).*\(9, 80\)"),
        ({"file_name": "0.jpg"}, {"instances": 0}, r"no 'sem_seg', only \['instances'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluator.process([image], [out])
    Image.fromarray(np.full((HEIGHT, WIDTH), 4, np.uint8)).save(records[0]["sem_seg_file_name"])
    with pytest.raises(ValueError, match=r"0.png' has labels \[4\], but there are 4 stuff_classes.*is 200"):
        evaluator.process([{"file_name": "0.jpg"}], [output(predictions[0])])
    with pytest.raises(ValueError, match=r"classes \[9\] are not in stuff_dataset_id_to_contiguous_id"):
        evaluator.encode_json_sem_seg(np.full((4, 4), 9), "0.jpg")
    for record in records:
        del record["sem_seg_file_name"]
    with pytest.raises(ValueError, match="has no 'sem_seg_file_name'"):
        SemSegEvaluator(NAME).process([{"file_name": "0.jpg"}], [output(predictions[0])])
