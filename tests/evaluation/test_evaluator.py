"""Tests of the inference loop and of evaluator composition."""

import re
import time

import pytest
import torch
from torch import nn

from detlib.data import DatasetCatalog, build_detection_test_loader
from detlib.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
)
from detlib.structures import BitMasks, Boxes, Instances, PolygonMasks
from detlib.utils import comm


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.trained = nn.Dropout()
        self.frozen = nn.BatchNorm2d(2)
        self.frozen.eval()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        assert not any(module.training for module in self.modules())
        value = self.weight * 2
        assert not value.requires_grad
        return [{"value": value + x["x"]} for x in inputs]


class Sum(DatasetEvaluator):
    def __init__(self, task="sum"):
        self.task = task
        self.total = -1e9

    def reset(self):
        self.total = 0.0

    def process(self, inputs, outputs):
        assert [float(o["value"]) for o in outputs] == [i["x"] + 2 for i in inputs]
        self.total += sum(float(output["value"]) for output in outputs)

    def evaluate(self):
        return {self.task: {"total": self.total}}


LOADER = [[{"x": 1}, {"x": 2}], [{"x": 3}]]


def modes(model):
    return [module.training for module in model.modules()]


def test_results_are_returned_and_modes_restored():
    model = Model()
    before = modes(model)
    assert before == [True, True, False]
    assert inference_on_dataset(model, LOADER, Sum()) == {"sum": {"total": 12.0}}
    assert modes(model) == before
    assert torch.is_grad_enabled()


def test_multiple_evaluators_and_none():
    results = inference_on_dataset(Model(), LOADER, [Sum("a"), Sum("b")])
    assert results == {"a": {"total": 12.0}, "b": {"total": 12.0}}
    assert inference_on_dataset(Model(), LOADER, None) == {}
    with pytest.raises(ValueError, match="report the task 'a'"):
        DatasetEvaluators([Sum("a"), Sum("a")]).evaluate()


def test_other_processes_return_no_results(monkeypatch):
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert DatasetEvaluators([Sum()]).evaluate() == {}


def test_modes_are_restored_after_an_error():
    model = Model()
    with pytest.raises(RuntimeError, match="boom"), inference_context(model):
        assert modes(model) == [False] * 3
        raise RuntimeError("boom")
    assert modes(model) == [True, True, False]


def test_callbacks_are_called_in_order():
    calls = []
    names = ("on_start", "before_inference", "after_inference", "on_end")
    inference_on_dataset(
        Model(), LOADER, None, {name: lambda name=name: calls.append(name) for name in names}
    )
    assert calls == ["on_start", *["before_inference", "after_inference"] * 2, "on_end"]
    with pytest.raises(ValueError, match="at_end.*on_end"):
        inference_on_dataset(Model(), LOADER, None, {"at_end": print})


def test_progress_and_times_are_logged(log, monkeypatch):
    monkeypatch.setattr("detlib.evaluation.evaluator._SECONDS_BETWEEN_REPORTS", 0.05)

    def model(inputs):
        time.sleep(0.03)
        return [{} for _ in inputs]

    inference_on_dataset(model, [[{}, {}]] * 12, None)
    assert re.search(r"Inference done \d+/12\. Seconds per image: .* ETA 0:00:0\d", log.text)
    # Seven of the twelve batches are timed.
    pattern = r": 0:00:00 \((\d\.\d{6}) s / image per device, 1 devices, 14 images in this process"
    total = float(re.search("Total inference time" + pattern, log.text)[1])
    model_alone = float(re.search("Pure compute time" + pattern, log.text)[1])
    assert 0.014 < model_alone <= total < 0.2
    last = log.records[-1].getMessage()
    assert float(re.search(r"model (\d\.\d+)", last)[1]) == pytest.approx(model_alone, abs=1e-4)


def test_ground_truth_as_prediction_is_perfect(tmp_path, monkeypatch):
    """A dataset URI, the data loader, the inference loop and the evaluator work together."""
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path))
    name = "shapes:val?num=5&size=64"
    loader = build_detection_test_loader(DatasetCatalog.get(name), mapper=lambda record: record, batch_size=2)

    def oracle(inputs):
        outputs = []
        for record in inputs:
            annotations = record["annotations"]
            polygons = PolygonMasks([annotation["segmentation"] for annotation in annotations])
            instances = Instances(
                (64, 64),
                pred_boxes=Boxes(torch.tensor([annotation["bbox"] for annotation in annotations])),
                scores=torch.ones(len(annotations)),
                pred_classes=torch.tensor([annotation["category_id"] for annotation in annotations]),
                pred_masks=BitMasks.from_polygon_masks(polygons, 64, 64),
                pred_keypoints=torch.tensor([a["keypoints"] for a in annotations]).reshape(-1, 5, 3),
            )
            outputs.append({"instances": instances})
        return outputs

    results = inference_on_dataset(oracle, loader, COCOEvaluator(name))
    assert {task: metrics["AP"] for task, metrics in results.items()} == pytest.approx(
        {"bbox": 100, "segm": 100, "keypoints": 100}
    )
    assert results["bbox"]["AP-triangle"] == pytest.approx(100)
