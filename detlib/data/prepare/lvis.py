"""LVIS v0.5 restricted to COCO's 80 categories ("cocofied"), to compare the annotations of both."""

from __future__ import annotations

import json
import os
from typing import Any

from detlib.data.datasets.builtin_meta import COCO_CATEGORIES
from detlib.utils.atomic_write import write_bytes_atomically

__all__ = ["COCO_SYNSETS", "cocofy_lvis", "prepare_lvis_cocofied"]

# The WordNet synsets of COCO's classes in LVIS (https://www.lvisdataset.org). The synset of any other
# class is the first noun of its name.
_SYNSETS = {
    "fire hydrant": "fireplug.n.01",
    "cow": "beef.n.01",
    "handbag": "bag.n.04",
    "tie": "necktie.n.01",
    "suitcase": "bag.n.06",
    "skis": "ski.n.01",
    "sports ball": "ball.n.06",
    "kite": "kite.n.03",
    "wine glass": "wineglass.n.01",
    "bowl": "bowl.n.03",
    "banana": "banana.n.02",
    "hot dog": "frank.n.02",
    "donut": "doughnut.n.02",
    "cake": "cake.n.03",
    "couch": "sofa.n.01",
    "potted plant": "pot.n.04",
    "toilet": "toilet.n.02",
    "tv": "television_receiver.n.01",
    "mouse": "mouse.n.04",
    "remote": "remote_control.n.01",
    "keyboard": "computer_keyboard.n.01",
    "cell phone": "cellular_telephone.n.01",
    "microwave": "microwave.n.02",
    "toaster": "toaster.n.02",
    "refrigerator": "electric_refrigerator.n.01",
    "teddy bear": "teddy.n.01",
    "hair drier": "hand_blower.n.01",
}

COCO_SYNSETS = {
    _SYNSETS.get(category["name"], category["name"].replace(" ", "_") + ".n.01"): category
    for category in COCO_CATEGORIES
    if category["isthing"]
}
"""The COCO category of each synset."""


def cocofy_lvis(lvis: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an LVIS annotation file that belongs to COCO's classes, with COCO's ids and names.

    Args:
        lvis: content of a file whose categories have "synset"; it is not changed.

    Returns:
        A new dict with all images. Their `neg_category_ids` and `not_exhaustive_category_ids` are restricted
        to COCO's classes, too. Classes that LVIS does not have are left out (v0.5: hot dog and oven).

    Raises:
        ValueError: No category is one of COCO's.
    """
    ids, categories = {}, []
    for category in lvis["categories"]:
        coco = COCO_SYNSETS.get(category.get("synset"))
        if coco is not None:
            ids[category["id"]] = coco["id"]
            categories.append({**category, "id": coco["id"], "name": coco["name"]})
    if not ids:
        raise ValueError("none of the file's categories has the synset of one of COCO's 80 classes")
    lists = ("neg_category_ids", "not_exhaustive_category_ids")
    images = [
        {**image, **{key: [ids[i] for i in image[key] if i in ids] for key in lists if key in image}}
        for image in lvis["images"]
    ]
    kept = {
        "images": images,
        "categories": sorted(categories, key=lambda category: category["id"]),
    }
    if "annotations" in lvis:
        kept["annotations"] = [
            {**annotation, "category_id": ids[annotation["category_id"]]}
            for annotation in lvis["annotations"]
            if annotation["category_id"] in ids
        ]
    return {**lvis, **kept}


def prepare_lvis_cocofied(root: str, *, workers: int | None = None, overwrite: bool = False) -> int:
    """Derive `lvis_v0.5_{train,val}_cocofied.json` from LVIS v0.5, below `root`/lvis.

    Args:
        root: the folder of the datasets.
        workers: unused; there are only two files.
        overwrite: write existing files again.

    Returns:
        The number of files written.

    Raises:
        FileNotFoundError: There is no annotation file.
        ValueError: None of its categories is one of COCO's.
    """
    names = [os.path.join(root, "lvis", f"lvis_v0.5_{split}") for split in ("train", "val")]
    present = [name for name in names if os.path.isfile(name + ".json")]
    if not present:
        raise FileNotFoundError(f"None of the LVIS v0.5 files {[name + '.json' for name in names]} exists.")
    count = 0
    for name in present:
        target = name + "_cocofied.json"
        if os.path.exists(target) and not overwrite:
            continue
        with open(name + ".json") as file:
            lvis = json.load(file)
        try:
            text = json.dumps(cocofy_lvis(lvis))
        except ValueError as error:
            raise ValueError(f"{name}.json: {error}") from error
        content = text.encode()
        write_bytes_atomically(target, lambda file: file.write(content))  # noqa: B023
        print(f"wrote {target}")
        count += 1
    return count
