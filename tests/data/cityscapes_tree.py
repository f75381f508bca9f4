"""A small generated Cityscapes split: images, polygons, and PNGs drawn by cityscapesscripts."""

import json

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 64, 96


def box(x0, y0, x1, y1):
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


# From the farthest to the nearest: a pole splits the car, the truck is hidden, one object is deleted.
OBJECTS = [
    {"label": "road", "polygon": box(0, 32, 95, 63)},
    {"label": "sky", "polygon": box(0, 0, 95, 31)},
    {"label": "truck", "polygon": box(22, 22, 30, 30)},
    {"label": "car", "polygon": box(20, 20, 60, 40)},
    {"label": "persongroup", "polygon": box(70, 30, 90, 50)},
    {"label": "person", "polygon": [[5, 30], [15, 30], [10, 50]]},
    {"label": "car", "polygon": box(50, 35, 75, 55)},
    {"label": "trailer", "polygon": box(80, 5, 90, 15)},
    {"label": "pole", "polygon": box(30, 10, 32, 60)},
    {"label": "license plate", "polygon": box(60, 45, 65, 48)},
    {"label": "rider", "polygon": box(0, 0, 90, 60), "deleted": 1},
]


def write(
    root, objects=OBJECTS, names=("aachen/aachen_000000_000019", "bonn/bonn_000001_000020"), split="val"
):
    """Write leftImg8bit and gtFine of a split below `root`, and return the paths of both folders."""
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    images, gt_dir = root / "leftImg8bit" / split, root / "gtFine" / split
    for number, name in enumerate(names):
        for folder in (images, gt_dir):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{name}_leftImg8bit.png")
        stem = str(gt_dir / f"{name}_gtFine_")
        with open(stem + "polygons.json", "w") as file:
            json.dump({"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": objects}, file)
        annotation = Annotation()
        annotation.fromJsonFile(stem + "polygons.json")
        ids = np.asarray(createInstanceImage(annotation, "ids")).astype(np.uint16)
        Image.fromarray(ids).save(stem + "instanceIds.png")
        createLabelImage(annotation, "ids").save(stem + "labelIds.png")
        createLabelImage(annotation, "trainIds").save(stem + "labelTrainIds.png")
    return str(images), str(gt_dir)
