"""Small datasets in each format, on disk or in an object store. Each function returns the dataset URI."""

import io
import json

from PIL import Image

from detlib.utils.file_io import PathManager

SIZE = (40, 30)  # width, height
CLASSES = ["crow", "owl", "wren"]


def write(path, content):
    """Write text, bytes or an image, and create the folder."""
    path = str(path)
    PathManager.mkdirs(path.rpartition("/")[0])
    if isinstance(content, Image.Image):
        buffer = io.BytesIO()
        content.save(buffer, "PNG" if path.endswith("png") else "JPEG")
        content = buffer.getvalue()
    with PathManager.open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def make_image(size=SIZE, color=(10, 200, 90)):
    return Image.new("RGB", size, color)


def coco_content(**changes):
    """Return two images; the first has three birds, one of them a crowd, the second has none."""
    triangle = [2.0, 3.0, 10.0, 3.0, 2.0, 12.5]
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [2, 3, 8, 9.5], "segmentation": [triangle]},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 0, 40, 30]},
        {"id": 3, "image_id": 1, "category_id": 5, "bbox": [20, 10, 5, 5], "iscrowd": 1},
    ]
    annotations[1]["segmentation"] = [[0, 0, 40, 0, 40, 30, 0, 30]]
    annotations[2]["segmentation"] = {"size": [30, 40], "counts": [610, 5, 585]}
    return {
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 2, "file_name": "b.jpg", "width": 40, "height": 30},
        ],
        "categories": [{"id": 3, "name": "crow"}, {"id": 5, "name": "owl"}, {"id": 7, "name": "wren"}],
        "annotations": annotations,
        **changes,
    }


def write_coco(root, content=None, images=("a.jpg", "b.jpg")):
    write(f"{root}/ann.json", json.dumps(coco_content() if content is None else content))
    for i, name in enumerate(images):
        write(f"{root}/images/{name}", make_image(color=(i * 40, 90, 10)))
    return f"coco:{root}/ann.json@{root}/images"


def voc_xml(*objects, size=SIZE):
    written = ""
    for name, box in objects:
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
        written += f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
    sizes = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation>{sizes}{written}</annotation>"


def write_voc(root, **files):
    """Write a dataset in VOC's layout; `files` replaces the XML of the images a and b."""
    xml = {
        "b": voc_xml(("owl", (5, 6, 7, 8))),
        "a": voc_xml(("wren", (2, 3, 10, 12)), ("crow", (0, 0, 40, 30))),
    }
    for i, (name, text) in enumerate({**xml, **files}.items()):
        write(f"{root}/Annotations/{name}.xml", text)
        write(f"{root}/JPEGImages/{name}.jpg", make_image(color=(i * 40, 90, 10)))
    write(f"{root}/ImageSets/Main/train.txt", "b\na\n")
    return f"voc:{root}@train"


def write_yolo(root, labels=None, **keys):
    """Write a dataset in YOLO's layout; `labels` maps image names to the text of their label files."""
    labels = {"a": "2 0.15 0.25 0.2 0.3\n0 0.5 0.5 1 1\n", "b": None} if labels is None else labels
    data = {"train": "images/train", "val": "images/train", "names": CLASSES, **keys}
    write(f"{root}/data.yaml", json.dumps({k: v for k, v in data.items() if v is not None}))
    for i, (name, text) in enumerate(labels.items()):
        write(f"{root}/images/train/{name}.jpg", make_image(color=(i * 40, 90, 10)))
        if text is not None:
            write(f"{root}/labels/train/{name}.txt", text)
    return f"yolo:{root}/data.yaml@train"


def write_roboflow(root, split="train"):
    """Write a Roboflow export, whose first category stands for the entire dataset."""
    content = coco_content()
    content["categories"] = [
        {"id": 0, "name": "birds", "supercategory": "none"},
        *({**category, "supercategory": "birds"} for category in content["categories"]),
    ]
    write(f"{root}/{split}/_annotations.coco.json", json.dumps(content))
    for name in ("a.jpg", "b.jpg"):
        write(f"{root}/{split}/{name}", make_image())
    return f"roboflow:{root}@{split}"
