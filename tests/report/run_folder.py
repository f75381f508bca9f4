"""Output folders like those of training runs, written without training."""

import json

import numpy as np
from PIL import Image

SIDE = 96


def ground_truth_and_results(num_images=12, num_classes=3, seed=0, rotated=False):
    """Return random COCO annotations (some are crowds) and predictions near them, some of them wrong."""
    rng = np.random.default_rng(seed)
    images = [
        {"id": 7 + i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in range(num_images)
    ]
    # Ids with gaps and unsorted, as in COCO.
    ids = [3 * k + 2 for k in range(num_classes)][::-1]
    categories = [{"id": i, "name": f"class {i}"} for i in ids]
    annotations, results = [], []
    for image in images[:-1]:  # the last image has no objects
        for _ in range(rng.integers(1, 6)):
            box = np.r_[rng.uniform(0, 50, 2), rng.uniform(10, 44, 2)]
            category = int(rng.choice(ids))
            if rotated:
                box = np.r_[box[:2] + box[2:] / 2, box[2:], rng.uniform(-90, 90)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box.round(2).tolist(),
                    "area": round(float(np.prod(box[2:4])), 2),
                    "iscrowd": int(rng.random() < 0.1 and not rotated),
                }
            )
            for _ in range(rng.integers(0, 4)):
                near = box.copy()
                near[:4] += rng.normal(0, 3, 4)
                found = category if rng.random() < 0.7 else int(rng.choice(ids))
                results.append(
                    {
                        "image_id": image["id"],
                        "category_id": found,
                        "bbox": near.round(2).tolist(),
                        # Two digits, so that some scores are equal.
                        "score": round(float(rng.uniform(0.05, 1)), 2),
                    }
                )
    ground_truth = {"images": images, "annotations": annotations, "categories": categories}
    return ground_truth, results


def record(iteration, **scalars):
    """Return a line of metrics.json as the trainer writes it."""
    values = {"iteration": iteration, "total_loss": 2.0 / (iteration + 1), "loss_cls": 1.0 / (iteration + 1)}
    return json.dumps({**values, "lr": 0.01, "time": 0.5, "rpn/num_pos_anchors": 3.0, **scalars}) + "\n"


def evaluation(iteration, **scalars):
    """Return the line of an evaluation after the last iteration."""
    return json.dumps({"iteration": iteration, **scalars}) + "\n"


def make_run(folder, ground_truth=None, results=None, lines=None, config=None, with_images=True):
    """Write an output folder that also contains the dataset, and return the dataset URI."""
    (folder / "inference").mkdir(parents=True)
    uri = f"coco:{folder}/ground_truth.json@{folder}/images"
    if ground_truth is not None:
        (folder / "ground_truth.json").write_text(json.dumps(ground_truth))
        (folder / "images").mkdir()
        rng = np.random.default_rng(0)
        for image in ground_truth["images"] if with_images else ():
            pixels = rng.integers(0, 255, (image["height"], image["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / image["file_name"])
    if results is not None:
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(results))
    if lines is None:
        lines = [record(19), record(39), evaluation(40, **{"bbox/AP": 12.5, "bbox/AP50": 30.0})]
    if lines:
        (folder / "metrics.json").write_text("".join(lines))
    if config is None:
        config = f"""
            DATASETS: {{TRAIN: ["{uri}"], TEST: ["{uri}"]}}
            MODEL: {{META_ARCHITECTURE: RetinaNet, DEVICE: cpu}}
            SOLVER: {{MAX_ITER: 40, IMS_PER_BATCH: 2}}
        """
    if config:
        (folder / "config.yaml").write_text(config)
    return uri
