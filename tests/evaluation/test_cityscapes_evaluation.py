"""Tests of the Cityscapes metrics against the package cityscapesscripts on generated images."""

import argparse
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from detlib.data import MetadataCatalog
from detlib.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from detlib.evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from detlib.structures import Instances
from tests.data import cityscapes_tree as tree

NAME = "cityscapes_evaluation_test"
THINGS = [c for c in CITYSCAPES_CATEGORIES if c["isthing"]]
NAMES = [f"aachen/aachen_{i:06d}_000019" for i in range(6)] + ["bonn/bonn_000000_000000"]


def objects(rng):
    """Return stuff and void regions, large and small objects, and groups, but no trains."""
    found = [
        {"label": "road", "polygon": tree.box(0, 32, 95, 63)},
        {"label": "sky", "polygon": tree.box(0, 0, 95, 31)},
        {"label": "parking", "polygon": tree.box(70, 40, 95, 63)},
    ]
    labels = ["car", "person", "bicycle", "rider", "truck", "cargroup", "persongroup", "trailer", "static"]
    for _ in range(14):
        x, y, w, h = rng.integers([0, 0, 4, 4], [75, 45, 28, 26]).tolist()
        found.append({"label": str(rng.choice(labels)), "polygon": tree.box(x, y, x + w, y + h)})
    return found


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("cityscapes")
    rng = np.random.default_rng(7)
    for name in NAMES:
        images, gt = tree.write(root, objects(rng) if name != NAMES[2] else [], [name])
    return root, images, gt


@pytest.fixture
def dataset(split, monkeypatch):
    if not hasattr(np, "in1d"):  # cityscapesscripts uses it, and NumPy 2 removed it
        monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    MetadataCatalog.get(NAME).set(gt_dir=split[2], thing_classes=[c["name"] for c in THINGS])
    yield split
    MetadataCatalog.remove(NAME)


def load_gt(split, name, suffix="instanceIds"):
    return np.asarray(Image.open(f"{split[2]}/{name}_gtFine_{suffix}.png")).astype(int)


def predictions(split, seed=0):
    """Return shifted objects and groups, duplicates, rectangles and empty masks, with tied scores."""
    rng = np.random.default_rng(seed)
    found = {}
    for name in NAMES:
        ids = load_gt(split, name)
        masks, classes = [], []
        for instance_id in np.unique(ids[ids >= 24]):
            label = instance_id // 1000 if instance_id >= 1000 else instance_id
            index = next((i for i, c in enumerate(THINGS) if c["id"] == label), None)
            for _ in range(rng.integers(0, 3)):
                shift = rng.integers(-2, 3, 2)
                masks.append(np.roll(ids == instance_id, shift, (0, 1)))
                classes.append(index if index is not None and rng.random() < 0.9 else rng.integers(8))
        for _ in range(4):
            x, y = rng.integers(0, 60, 2)
            masks.append(np.zeros(ids.shape, bool))
            masks[-1][y : y + 12, x : x + 14] = True
            classes.append(rng.integers(8))
        masks.append(np.zeros(ids.shape, bool))  # an empty mask
        classes.append(2)
        instances = Instances(ids.shape)
        instances.pred_masks = torch.from_numpy(np.stack(masks))
        instances.pred_classes = torch.tensor(classes)
        instances.scores = torch.from_numpy(rng.integers(1, 8, len(masks)) / 10)
        found[name] = instances
    return found


def file_name(split, name):
    return f"{split[1]}/{name}_leftImg8bit.png"


def run(evaluator, split, outputs, order=NAMES):
    evaluator.reset()
    for name in order:
        evaluator.process([{"file_name": file_name(split, name)}], [outputs[name]])
    (results,) = evaluator.evaluate().values()
    return results


def reference_instances(split, found, folder, monkeypatch):
    from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as reference

    # It fails to write its cache with new NumPy releases.
    monkeypatch.setattr(reference, "writeDict2JSON", lambda content, path: None)
    lists = []
    for name in NAMES:
        stem = name.replace("/", "_")
        lines = []
        for i, mask in enumerate(found[name].pred_masks.numpy()):
            Image.fromarray(mask.astype(np.uint8)).save(folder / f"{stem}_{i}.png")
            label = THINGS[found[name].pred_classes[i]]["id"]
            lines.append(f"{stem}_{i}.png {label} {found[name].scores[i].item()}\n")
        (folder / f"{stem}.txt").write_text("".join(lines))
        lists.append((str(folder / f"{stem}.txt"), f"{split[2]}/{name}_gtFine_instanceIds.png"))
    args = argparse.Namespace(**vars(reference.args))
    args.predictionPath, args.gtInstancesFile = str(folder), str(folder / "gtInstances.json")
    args.JSONOutput, args.quiet = False, True
    results = reference.evaluateImgLists(*map(list, zip(*lists)), args)
    return results["averages"], np.array(results["resultApMatrix"])[0]


def test_instance_ap_equals_cityscapesscripts(dataset, tmp_path, monkeypatch):
    found = predictions(dataset)
    averages, matrix = reference_instances(dataset, found, tmp_path, monkeypatch)
    evaluator = CityscapesInstanceEvaluator(NAME)
    results = run(evaluator, dataset, {name: {"instances": x} for name, x in found.items()})
    assert 5 < 100 * averages["allAp50%"] < 95 and np.isnan(matrix).any()
    assert results["AP"] == pytest.approx(100 * averages["allAp"], abs=1e-10)
    assert results["AP50"] == pytest.approx(100 * averages["allAp50%"], abs=1e-10)
    for category in THINGS:
        want = 100 * averages["classes"][category["name"]]["ap"]
        assert results[f"AP-{category['name']}"] == pytest.approx(want, abs=1e-10, nan_ok=True)

    shuffled = run(evaluator, dataset, {n: {"instances": x} for n, x in found.items()}, NAMES[::-1])
    np.testing.assert_equal(shuffled, results)


def test_perfect_instances_and_missing_image(dataset, caplog):
    found = {}
    for name in NAMES:
        ids = load_gt(dataset, name)
        known = [i for i in np.unique(ids) if i >= 1000 and any(c["id"] == i // 1000 for c in THINGS)]
        instances = Instances(ids.shape)
        instances.pred_masks = torch.from_numpy(np.array([ids == i for i in known]).reshape(-1, *ids.shape))
        index = [next(k for k, c in enumerate(THINGS) if c["id"] == i // 1000) for i in known]
        instances.pred_classes, instances.scores = torch.tensor(index).long(), torch.ones(len(known))
        found[name] = {"instances": instances}
    assert run(CityscapesInstanceEvaluator(NAME), dataset, found)["AP"] == pytest.approx(100.0)
    with caplog.at_level(logging.WARNING, "detlib.evaluation.cityscapes_evaluation"):
        some = run(CityscapesInstanceEvaluator(NAME), dataset, found, NAMES[:-1])
    assert "1 of 7 images" in caplog.text and 30 < some["AP"] < 99


def reference_labels(split, found, folder):
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as reference

    ids = np.zeros(256, np.uint8)
    for category in CITYSCAPES_CATEGORIES:
        ids[category["trainId"]] = category["id"]
    lists = []
    for name in NAMES:
        path = folder / (name.replace("/", "_") + ".png")
        Image.fromarray(ids[found[name]]).save(path)
        lists.append((str(path), f"{split[2]}/{name}_gtFine_labelIds.png"))
    args = argparse.Namespace(**vars(reference.args))
    args.JSONOutput, args.quiet = False, True
    return reference.evaluateImgLists(*map(list, zip(*lists)), args)


def test_semantic_iou_equals_cityscapesscripts(dataset, tmp_path):
    rng = np.random.default_rng(3)
    found, outputs = {}, {}
    for name in NAMES:
        labels = load_gt(dataset, name, "labelTrainIds")
        noise = rng.integers(0, 19, labels.shape)
        found[name] = np.where((rng.random(labels.shape) < 0.3) | (labels > 18), noise, labels)
        logits = torch.nn.functional.one_hot(torch.from_numpy(found[name]), 19).permute(2, 0, 1).float()
        outputs[name] = {"sem_seg": logits}
    want = reference_labels(dataset, found, tmp_path)
    evaluator = CityscapesSemSegEvaluator(NAME)
    results = run(evaluator, dataset, outputs)
    for key, name in (
        ("IoU", "averageScoreClasses"),
        ("iIoU", "averageScoreInstClasses"),
        ("IoU_sup", "averageScoreCategories"),
        ("iIoU_sup", "averageScoreInstCategories"),
    ):
        assert 5 < results[key] < 95
        assert results[key] == pytest.approx(100 * want[name], abs=1e-10)
    for category in CITYSCAPES_CATEGORIES:
        iou = 100 * want["classScores"][category["name"]]
        assert results[f"IoU-{category['name']}"] == pytest.approx(iou, abs=1e-10, nan_ok=True)
    np.testing.assert_equal(run(evaluator, dataset, outputs, NAMES[::-1]), results)


def test_images_without_prediction_count_as_missed(dataset):
    outputs = {}
    for name in NAMES:
        labels = torch.from_numpy(load_gt(dataset, name, "labelTrainIds")).clamp(max=18)
        outputs[name] = {"sem_seg": torch.nn.functional.one_hot(labels, 19).permute(2, 0, 1)}
    evaluator = CityscapesSemSegEvaluator(NAME)
    assert run(evaluator, dataset, outputs)["IoU"] == pytest.approx(100.0)
    assert run(evaluator, dataset, outputs, NAMES[1:])["IoU"] < 95


class TestErrors:
    def test_missing_folder(self):
        MetadataCatalog.get(NAME).set(gt_dir="nowhere", thing_classes=["car"])
        with pytest.raises(FileNotFoundError, match="gt_dir of dataset .* 'nowhere', does not exist"):
            CityscapesSemSegEvaluator(NAME)
        MetadataCatalog.remove(NAME)

    def test_unknown_image(self, dataset):
        with pytest.raises(ValueError, match="has no ground truth for the image 'x_leftImg8bit.png'"):
            CityscapesSemSegEvaluator(NAME).process(
                [{"file_name": "x_leftImg8bit.png"}], [{"sem_seg": torch.zeros(19, 2, 2)}]
            )

    def test_wrong_size_and_missing_output(self, dataset):
        image = {"file_name": file_name(dataset, NAMES[0])}
        with pytest.raises(ValueError, match=r"has the size \(64, 96\), the prediction \(2, 2\)"):
            CityscapesSemSegEvaluator(NAME).process([image], [{"sem_seg": torch.zeros(19, 2, 2)}])
        with pytest.raises(ValueError, match="have no 'sem_seg', only"):
            CityscapesSemSegEvaluator(NAME).process([image], [{"instances": 1}])
        instances = Instances((2, 2))
        instances.pred_masks, instances.scores = torch.ones(1, 2, 2, dtype=torch.bool), torch.ones(1)
        instances.pred_classes = torch.zeros(1, dtype=torch.int64)
        with pytest.raises(ValueError, match="have 4 pixels, but the ground truth .* has 6144"):
            CityscapesInstanceEvaluator(NAME).process([image], [{"instances": instances}])
