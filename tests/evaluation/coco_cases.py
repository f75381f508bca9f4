"""Random COCO annotations and predictions, and the metrics that pycocotools computes from them."""

import contextlib
import io
import math

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detlib.evaluation.coco_json import instances_to_coco_json
from detlib.structures import Boxes, Instances

SIZE = 160  # height and width of every image
CATEGORY_IDS = [3, 7, 8]


def random_polygon(random, box):
    x, y, w, h = box
    angles = np.sort(random.uniform(0, 2 * np.pi, 8))
    points = np.stack([x + w / 2 + w / 2 * np.cos(angles), y + h / 2 + h / 2 * np.sin(angles)], axis=1)
    return points.ravel().tolist()


def _random_box(random):
    w, h = random.uniform(4, 110, 2)
    return [random.uniform(0, SIZE - w), random.uniform(0, SIZE - h), w, h]


def make_coco(random, num_images=12, num_keypoints=17):
    """Return random annotations with crowds, a class without objects and an image without objects."""
    images = [
        {"id": 10 + 3 * i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in range(num_images)
    ]
    annotations = []
    for image in images[1:]:
        for _ in range(random.randint(1, 9)):
            box = _random_box(random)
            polygon = random_polygon(random, box)
            rle = mask_utils.merge(mask_utils.frPyObjects([polygon], SIZE, SIZE))
            crowd = int(random.rand() < 0.15)
            visibility = random.randint(0, 3, num_keypoints) * int(random.rand() < 0.8)
            keypoints = np.concatenate(
                [random.uniform(0, SIZE, (num_keypoints, 2)), visibility[:, None]], axis=1
            )
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": CATEGORY_IDS[random.randint(2)],
                    "bbox": box,
                    "area": float(mask_utils.area(rle)),
                    "iscrowd": crowd,
                    "segmentation": {**rle, "counts": rle["counts"].decode()} if crowd else [polygon],
                    "keypoints": keypoints.ravel().tolist(),
                    "num_keypoints": int((visibility > 0).sum()),
                }
            )
    categories = [{"id": i, "name": f"class{i}"} for i in CATEGORY_IDS]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def make_predictions(random, coco, num_keypoints=17, extra=3, masks=True):
    """Return noisy copies of the ground truth and random detections, as {image id: Instances}."""
    outputs = {}
    for image in coco["images"]:
        boxes, classes, keypoints = [], [], []
        mine = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        for annotation in mine * 2:
            x, y, w, h = np.array(annotation["bbox"]) + random.normal(0, 4, 4)
            boxes.append([x, y, x + max(w, 1), y + max(h, 1)])
            classes.append(CATEGORY_IDS.index(annotation["category_id"]) if random.rand() < 0.9 else 2)
            points = np.array(annotation["keypoints"]).reshape(-1, 3) + random.normal(
                0, 3, (num_keypoints, 3)
            )
            keypoints.append(points)
        for _ in range(extra):
            x, y, w, h = _random_box(random)
            boxes.append([x, y, x + w, y + h])
            classes.append(random.randint(3))
            keypoints.append(random.uniform(0, SIZE, (num_keypoints, 3)))
        boxes = torch.tensor(np.array(boxes), dtype=torch.float32).clamp(0, SIZE)
        fields = {
            "pred_boxes": Boxes(boxes),
            # Rounded, so that some scores are equal.
            "scores": torch.tensor(random.rand(len(boxes)).round(2), dtype=torch.float32),
            "pred_classes": torch.tensor(classes),
            "pred_keypoints": torch.tensor(np.array(keypoints), dtype=torch.float32),
        }
        if masks:
            fields["pred_masks"] = _ellipses(boxes)
        outputs[image["id"]] = Instances((SIZE, SIZE), **fields)
    return outputs


def _ellipses(boxes):
    """Return the mask of the ellipse inside each box, (N, SIZE, SIZE) bool."""
    ys, xs = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
    return ((2 * xs - x0 - x1) / (x1 - x0)) ** 2 + ((2 * ys - y0 - y1) / (y1 - y0)) ** 2 <= 1


def feed(evaluator, outputs):
    evaluator.reset()
    for image_id, instances in outputs.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator


def reference(coco, outputs, task, max_dets=None, sigmas=None, img_ids=None):
    """Return pycocotools' stats and per-class AP, in percent, and its COCOeval object."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = coco
        gt.createIndex()
        results = []
        for image_id, instances in outputs.items():
            for result in instances_to_coco_json(instances, image_id):
                result["category_id"] = CATEGORY_IDS[result["category_id"]]
                if task == "segm":
                    del result["bbox"]
                results.append(result)
        evaluation = COCOeval(gt, gt.loadRes(results), task)
        if img_ids is not None:
            evaluation.params.imgIds = img_ids
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        if max_dets is not None:
            evaluation.params.maxDets = max_dets
        evaluation.evaluate()
        evaluation.accumulate()
        if max_dets is None:
            evaluation.summarize()
    per_class = []
    for k in range(len(CATEGORY_IDS)):
        values = evaluation.eval["precision"][:, :, k, 0, -1]
        per_class.append(values[values > -1].mean() * 100 if (values > -1).any() else math.nan)
    stats = [s * 100 if s > -1 else math.nan for s in evaluation.stats]
    return stats, per_class, evaluation
