"""Time COCOEvaluator, from predictions to the table, against faster-coco-eval called directly.

    python benchmarks/eval.py [--images 2000] [--detections 99000] [--runs 3] [--tasks bbox segm keypoints]

Both sides get the same ground truth and predictions in memory. faster-coco-eval gets result dicts, which are
prepared beforehand; COCOEvaluator gets `Instances` and converts them itself. Both run in turn, so that other
programs slow them down equally. The figures are the best of all runs, as wall-clock time and CPU time, and
both must compute the same AP. The keypoint task has one category with 17 keypoints, and the same number of
detections.
"""

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import platform
import tempfile
import time

import numpy as np
import torch
from pycocotools import mask as mask_utils

from detlib.data import MetadataCatalog
from detlib.evaluation import COCOEvaluator
from detlib.structures import Boxes, Instances

NAME, NUM_CLASSES, HEIGHT, WIDTH = "benchmark_of_evaluation", 80, 480, 640
NUM_KEYPOINTS = 17
TASKS = ("bbox", "segm", "keypoints")


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return (count, 4) float64 boxes, XYWH, of all sizes."""
    sizes = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * np.maximum([WIDTH, HEIGHT] - sizes, 1)
    return np.concatenate([corners, np.minimum(sizes, [WIDTH - 1, HEIGHT - 1])], axis=1).round(2)


def polygons(boxes: np.ndarray) -> list[list[list[float]]]:
    """Return an octagon for each box (XYWH), as COCO polygons."""
    angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    x = boxes[:, :1] + boxes[:, 2:3] * (0.5 + 0.5 * np.cos(angles))
    y = boxes[:, 1:2] + boxes[:, 3:] * (0.5 + 0.5 * np.sin(angles))
    return [[p] for p in np.stack([x, y], axis=2).reshape(len(boxes), -1).round(2).tolist()]


def make_keypoints(rng: np.random.Generator, boxes: np.ndarray) -> np.ndarray:
    """Return (R, 17, 3) keypoints inside boxes (XYWH); one in six is not labeled."""
    points = boxes[:, None, :2] + rng.random((len(boxes), NUM_KEYPOINTS, 2)) * boxes[:, None, 2:]
    visible = rng.choice([0, 1, 2, 2, 2, 2], (len(boxes), NUM_KEYPOINTS, 1))
    return np.concatenate([points.round() * (visible > 0), visible], axis=2)


def make_ground_truth(rng: np.random.Generator, num_images: int, num_classes: int = NUM_CLASSES) -> dict:
    """Return ground truth in COCO's format, with seven objects per image."""
    annotations = []
    for image_id in range(1, num_images + 1):
        boxes = random_boxes(rng, 7)
        keypoints = make_keypoints(rng, boxes).reshape(len(boxes), -1).astype(int).tolist()
        for box, polygon, points in zip(boxes.tolist(), polygons(boxes), keypoints):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.integers(1, num_classes + 1)),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": polygon,
                    "keypoints": points,
                    "num_keypoints": sum(v > 0 for v in points[2::3]),
                }
            )
    return {
        "info": {},
        "images": [
            {"id": i, "height": HEIGHT, "width": WIDTH, "file_name": f"{i}.jpg"}
            for i in range(1, num_images + 1)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, num_classes + 1)],
        "annotations": annotations,
    }


def make_results(rng: np.random.Generator, coco: dict, count: int, task: str) -> list[dict]:
    """Return detections in COCO's result format.

    Each object is detected twice, slightly moved. The others, up to `count`, are random.
    """
    num_classes = len(coco["categories"])
    results = []
    for annotation in coco["annotations"]:
        for _ in range(2):
            moved = np.array(annotation["bbox"]) + rng.normal(0, 3, 4)
            results.append([annotation["image_id"], annotation["category_id"], moved])
    others = random_boxes(rng, count - len(results))
    for box in others:
        image_id, category = rng.integers(1, [len(coco["images"]) + 1, num_classes + 1]).tolist()
        results.append([image_id, category, box])
    results.sort(key=lambda result: result[0])
    boxes = np.stack([box for _, _, box in results])
    boxes[:, 2:] = np.maximum(boxes[:, 2:], 2)
    boxes = boxes.astype(np.float32).astype(np.float64)
    scores = rng.random(len(results)).astype(np.float32).tolist()
    found = [
        {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
        for (image_id, category, _), box, score in zip(results, boxes.tolist(), scores)
    ]
    if task == "keypoints":
        keypoints = predict_keypoints(rng, coco, results, boxes).reshape(len(boxes), -1).tolist()
        for result, points in zip(found, keypoints):
            result["keypoints"] = points
    if task == "segm":
        for result, polygon in zip(found, polygons(boxes)):
            rle = mask_utils.merge(mask_utils.frPyObjects(polygon, HEIGHT, WIDTH))
            result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    return found


def predict_keypoints(
    rng: np.random.Generator, coco: dict, results: list[list], boxes: np.ndarray
) -> np.ndarray:
    """Return (R, 17, 3) keypoints: moved keypoints of the nearest object in the image, with a confidence.

    Values are rounded to float32 and returned as float64.
    """
    by_image: dict[int, list[dict]] = {}
    for annotation in coco["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    predicted = np.empty((len(boxes), NUM_KEYPOINTS, 3))
    for points, (image_id, _, _), box in zip(predicted, results, boxes):
        objects = by_image[image_id]
        distances = [np.abs(np.array(x["bbox"]) - box).sum() for x in objects]
        points[:] = np.reshape(objects[int(np.argmin(distances))]["keypoints"], (-1, 3))
        points[:, :2] += rng.normal(0, 3, (NUM_KEYPOINTS, 2))
    predicted[:, :, 2] = rng.random(predicted.shape[:2])
    return predicted.astype(np.float32).astype(np.float64)


def as_outputs(results: list[dict]) -> list[tuple[dict, dict]]:
    """Return the same detections as the inputs and outputs of a model; masks are lists of RLE dicts."""
    by_image: dict[int, list[dict]] = {}
    for result in results:
        by_image.setdefault(result["image_id"], []).append(result)
    pairs = []
    for image_id, group in by_image.items():
        boxes = torch.tensor([x["bbox"] for x in group], dtype=torch.float64)
        instances = Instances((HEIGHT, WIDTH))
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes.float())
        instances.scores = torch.tensor([x["score"] for x in group])
        instances.pred_classes = torch.tensor([x["category_id"] - 1 for x in group])
        if "segmentation" in group[0]:
            instances.pred_masks = [dict(x["segmentation"]) for x in group]
        if "keypoints" in group[0]:
            points = torch.tensor([x["keypoints"] for x in group]).view(len(group), NUM_KEYPOINTS, 3)
            points[:, :, :2] += 0.5  # from pixel indices to coordinates
            instances.pred_keypoints = points
        pairs.append(({"image_id": image_id}, {"instances": instances}))
    return pairs


def now() -> np.ndarray:
    """Return wall-clock time and CPU time in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def direct(coco: dict, results: list[dict], task: str) -> tuple[np.ndarray, float]:
    """Return the times (see `now`) and AP of faster-coco-eval."""
    from faster_coco_eval import COCO, COCOeval_faster

    results = [{k: v for k, v in x.items() if task == "bbox" or k != "bbox"} for x in results]
    with open(coco["path"]) as file:
        ground_truth = json.load(file)
    gc.collect()
    start = now()
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO(ground_truth)
        evaluation = COCOeval_faster(api, api.loadRes(results), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return now() - start, 100 * float(evaluation.stats[0])


def evaluator(pairs: list[tuple[dict, dict]], task: str) -> tuple[np.ndarray, float]:
    """Return the times (see `now`) and AP of COCOEvaluator."""
    ours = COCOEvaluator(NAME, (task,))
    ours._ground_truth  # noqa: B018 - reads the annotation file, which is not timed on either side
    gc.collect()
    start = now()
    for image, output in pairs:
        ours.process([image], [output])
    results = ours.evaluate()
    return now() - start, results[task]["AP"]


def compare(coco: dict, results: list[dict], task: str, runs: int) -> None:
    """Print the wall-clock and CPU times of both sides for one task."""
    pairs = as_outputs(results)
    times: dict[str, list[np.ndarray]] = {"direct": [], "ours": []}
    for _ in range(runs):
        seconds, want = direct(coco, results, task)
        times["direct"].append(seconds)
        seconds, found = evaluator(pairs, task)
        times["ours"].append(seconds)
        assert abs(want - found) < 1e-3, f"AP is {found}, but faster-coco-eval computes {want}"
    theirs, ours = (np.min(times[side], axis=0) for side in ("direct", "ours"))
    for name, one, other in zip(("wall", "CPU"), theirs, ours):
        print(
            f"{task:9s} {len(results)} detections, {name:4s}: faster-coco-eval {one:.2f} s, COCOEvaluator "
            f"{other:.2f} s, {other / one:.2f} times (AP {found:.3f})"
        )


def main() -> None:
    """Print two lines for each task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--detections", type=int, default=99000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    args = parser.parse_args()
    logging.getLogger("detlib").setLevel(logging.WARNING)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")

    for task in args.tasks:
        rng = np.random.default_rng(0)
        coco = make_ground_truth(rng, args.images, 1 if task == "keypoints" else NUM_CLASSES)
        with tempfile.TemporaryDirectory() as folder:
            coco["path"] = os.path.join(folder, "ground_truth.json")
            with open(coco["path"], "w") as file:
                json.dump(coco, file)
            MetadataCatalog.pop(NAME, None)
            MetadataCatalog.get(NAME).set(
                json_file=coco["path"],
                thing_classes=[category["name"] for category in coco["categories"]],
                thing_dataset_id_to_contiguous_id={x["id"]: x["id"] - 1 for x in coco["categories"]},
            )
            compare(coco, make_results(rng, coco, args.detections, task), task, args.runs)


if __name__ == "__main__":
    main()
