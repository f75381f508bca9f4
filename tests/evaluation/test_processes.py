"""Tests that all metrics are independent of the number of processes and of the order of images."""

import json
import zlib

import numpy as np
import pytest
import torch

from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.engine import launch
from detlib.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    inference_on_dataset,
)
from detlib.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from detlib.utils import comm

pytestmark = pytest.mark.distributed

NAME = "shapes:val?num=9&size=64&task=panoptic"


def predict(inputs):
    """Return noisy ground truth with duplicates and equal scores, which depends only on the image id."""
    outputs = []
    for record in inputs:
        rng = np.random.default_rng(zlib.crc32(str(record["image_id"]).encode()))
        annotations = [a for a in record["annotations"] for _ in range(rng.integers(1, 3))]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        points = np.array([a["keypoints"] for a in annotations]).reshape(len(annotations), -1, 3)
        polygons = PolygonMasks([a["segmentation"] for a in annotations])
        masks = BitMasks.from_polygon_masks(polygons, 64, 64).tensor
        instances = Instances((64, 64))
        instances.pred_boxes = Boxes(
            torch.tensor(boxes) + torch.from_numpy(rng.normal(0, 2, (len(boxes), 4)))
        )
        instances.scores = torch.from_numpy(rng.integers(1, 5, len(boxes)) / 5)
        classes = [a["category_id"] if rng.random() < 0.8 else rng.integers(3) for a in annotations]
        instances.pred_classes = torch.tensor(classes)
        instances.pred_masks = masks.roll(int(rng.integers(-3, 4)), 2)
        instances.pred_keypoints = torch.from_numpy(points + rng.normal(0, 1, points.shape)).float()
        num_stuff = len(MetadataCatalog.get(NAME).stuff_classes)
        ids = torch.zeros(64, 64, dtype=torch.int64)
        segments = []
        for number, (mask, category) in enumerate(zip(instances.pred_masks, classes), start=1):
            if (mask & (ids == 0)).any():
                ids[mask & (ids == 0)] = number
                segments.append({"id": number, "category_id": int(category), "isthing": True})
        outputs.append(
            {
                "instances": instances,
                "sem_seg": torch.from_numpy(rng.random((num_stuff, 64, 64))),
                "panoptic_seg": (ids, segments),
            }
        )
    return outputs


def evaluate(path: str, seed: int | None) -> None:
    """Evaluate this process's share of the images; the main process writes the results."""
    records = DatasetCatalog.get(NAME)
    order = np.arange(len(records)) if seed is None else np.random.default_rng(seed).permutation(len(records))
    mine = order[comm.get_rank() :: comm.get_world_size()]
    evaluators = [COCOEvaluator(NAME), SemSegEvaluator(NAME), COCOPanopticEvaluator(NAME)]
    results = inference_on_dataset(predict, [[records[i]] for i in mine], evaluators)
    voc = inference_on_dataset(predict, [[records[i]] for i in mine], PascalVOCDetectionEvaluator(NAME))
    if comm.is_main_process():
        with open(path, "w") as file:
            json.dump({**results, "voc": voc["bbox"]}, file)


@pytest.mark.parametrize("num_processes, seed", [(1, 3), (2, None), (2, 5)])
def test_metrics_are_independent_of_processes_and_order(tmp_path, monkeypatch, num_processes, seed):
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path))
    DatasetCatalog.get(NAME)
    evaluate(str(tmp_path / "want.json"), None)
    launch(evaluate, num_processes, dist_url="auto", args=(str(tmp_path / "found.json"), seed))
    want, found = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("want", "found"))
    assert want.keys() == {"bbox", "segm", "keypoints", "sem_seg", "panoptic_seg", "voc"}
    for task in ("bbox", "segm", "keypoints", "voc"):
        assert 1 < want[task]["AP"] < 99, task
    assert want["panoptic_seg"]["PQ"] > 1 and want["sem_seg"]["mIoU"] > 1
    np.testing.assert_equal(found, want)
