"""Time COCOEvaluator, from predictions to the table, against faster-coco-eval called directly.

    python benchmarks/eval.py [--images 2000] [--detections 99000] [--runs 3] [--tasks bbox segm]

Both sides get the same ground truth and predictions in memory: faster-coco-eval its result dicts, made ready
beforehand, COCOEvaluator `Instances`, which it converts itself. They run in turn, so that they meet the same
noise; the figures are the best of all runs, and in the end both must say the same AP.
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


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) float64 boxes, XYWH, of all sizes."""
    sizes = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * np.maximum([WIDTH, HEIGHT] - sizes, 1)
    return np.concatenate([corners, np.minimum(sizes, [WIDTH - 1, HEIGHT - 1])], axis=1).round(2)


def polygons(boxes: np.ndarray) -> list[list[list[float]]]:
    """An octagon in each box."""
    angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    x = boxes[:, :1] + boxes[:, 2:3] * (0.5 + 0.5 * np.cos(angles))
    y = boxes[:, 1:2] + boxes[:, 3:] * (0.5 + 0.5 * np.sin(angles))
    return [[p] for p in np.stack([x, y], axis=2).reshape(len(boxes), -1).round(2).tolist()]


def make_ground_truth(rng: np.random.Generator, num_images: int) -> dict:
    """Annotations in COCO's format, seven a picture."""
    annotations = []
    for image_id in range(1, num_images + 1):
        boxes = random_boxes(rng, 7)
        for box, polygon in zip(boxes.tolist(), polygons(boxes)):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.integers(1, NUM_CLASSES + 1)),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": polygon,
                }
            )
    return {
        "info": {},
        "images": [
            {"id": i, "height": HEIGHT, "width": WIDTH, "file_name": f"{i}.jpg"}
            for i in range(1, num_images + 1)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, NUM_CLASSES + 1)],
        "annotations": annotations,
    }


def make_results(rng: np.random.Generator, coco: dict, count: int, masks: bool) -> list[dict]:
    """Detections in COCO's result format: each object twice, a little moved, and others."""
    results = []
    for annotation in coco["annotations"]:
        for _ in range(2):
            moved = np.array(annotation["bbox"]) + rng.normal(0, 3, 4)
            results.append([annotation["image_id"], annotation["category_id"], moved])
    others = random_boxes(rng, count - len(results))
    for box in others:
        image_id, category = rng.integers(1, [len(coco["images"]) + 1, NUM_CLASSES + 1]).tolist()
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
    if masks:
        for result, polygon in zip(found, polygons(boxes)):
            rle = mask_utils.merge(mask_utils.frPyObjects(polygon, HEIGHT, WIDTH))
            result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    return found


def as_outputs(results: list[dict]) -> list[tuple[dict, dict]]:
    """The same detections as a model's inputs and outputs; masks are lists of RLE."""
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
        pairs.append(({"image_id": image_id}, {"instances": instances}))
    return pairs


def direct(coco: dict, results: list[dict], task: str) -> tuple[float, float]:
    """Seconds and AP of faster-coco-eval."""
    from faster_coco_eval import COCO, COCOeval_faster

    results = [{k: v for k, v in x.items() if task == "bbox" or k != "bbox"} for x in results]
    with open(coco["path"]) as file:
        truth = json.load(file)
    gc.collect()
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO(truth)
        evaluation = COCOeval_faster(api, api.loadRes(results), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return time.perf_counter() - start, 100 * float(evaluation.stats[0])


def evaluator(pairs: list[tuple[dict, dict]], task: str) -> tuple[float, float]:
    """Seconds and AP of COCOEvaluator."""
    ours = COCOEvaluator(NAME, (task,))
    ours._ground_truth  # noqa: B018 - reading the annotation file is left out on both sides
    gc.collect()
    start = time.perf_counter()
    for image, output in pairs:
        ours.process([image], [output])
    results = ours.evaluate()
    return time.perf_counter() - start, results[task]["AP"]


def main() -> None:
    """Prints one line for each task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--detections", type=int, default=99000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=["bbox", "segm"], choices=["bbox", "segm"])
    args = parser.parse_args()
    logging.getLogger("detlib").setLevel(logging.WARNING)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")

    rng = np.random.default_rng(0)
    coco = make_ground_truth(rng, args.images)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "truth.json")
        with open(path, "w") as file:
            json.dump(coco, file)
        coco["path"] = path
        MetadataCatalog.get(NAME).set(
            json_file=path,
            thing_classes=[category["name"] for category in coco["categories"]],
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(NUM_CLASSES)},
        )
        for task in args.tasks:
            results = make_results(rng, coco, args.detections, task == "segm")
            pairs = as_outputs(results)
            times: dict[str, list[float]] = {"direct": [], "ours": []}
            for _ in range(args.runs):
                seconds, want = direct(coco, results, task)
                times["direct"].append(seconds)
                seconds, found = evaluator(pairs, task)
                times["ours"].append(seconds)
                assert abs(want - found) < 1e-3, f"AP is {found}, faster-coco-eval says {want}"
            best = {side: min(values) for side, values in times.items()}
            print(
                f"{task:5s} {len(results)} detections: faster-coco-eval {best['direct']:.2f} s, "
                f"COCOEvaluator {best['ours']:.2f} s, {best['ours'] / best['direct']:.2f} times "
                f"(AP {found:.3f})"
            )


if __name__ == "__main__":
    main()
