"""The built-in datasets, with the names and paths of detectron2.

They are stored below one folder: `$DETLIB_DATASETS`, else `$DETECTRON2_DATASETS`, else `./datasets`. The
variable is read when detlib.data is imported.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from detlib.data.catalog import DatasetCatalog, MetadataCatalog
from detlib.data.datasets.builtin_meta import _get_builtin_metadata
from detlib.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic
from detlib.data.datasets.cityscapes_panoptic import register_all_cityscapes_panoptic
from detlib.data.datasets.coco import load_coco_json, load_sem_seg
from detlib.data.datasets.coco_panoptic import register_coco_panoptic, register_coco_panoptic_separated
from detlib.data.datasets.lvis import get_lvis_instances_meta, load_lvis_json
from detlib.data.datasets.pascal_voc import CLASS_NAMES, load_voc_instances
from detlib.utils.file_io import PathManager

__all__ = [
    "register_all_ade20k",
    "register_all_cityscapes",
    "register_all_cityscapes_panoptic",
    "register_all_coco",
    "register_all_lvis",
    "register_all_pascal_voc",
]

_ROOT_VARIABLES = ("DETLIB_DATASETS", "DETECTRON2_DATASETS")

# Metadata name -> dataset name -> (image folder, annotation file).
_COCO: dict[str, dict[str, tuple[str, str]]] = {
    "coco": {
        "coco_2014_train": ("train2014", "instances_train2014"),
        "coco_2014_val": ("val2014", "instances_val2014"),
        "coco_2014_minival": ("val2014", "instances_minival2014"),
        "coco_2014_valminusminival": ("val2014", "instances_valminusminival2014"),
        "coco_2017_train": ("train2017", "instances_train2017"),
        "coco_2017_val": ("val2017", "instances_val2017"),
        "coco_2017_test": ("test2017", "image_info_test2017"),
        "coco_2017_test-dev": ("test2017", "image_info_test-dev2017"),
        "coco_2017_val_100": ("val2017", "instances_val2017_100"),
    },
    "coco_person": {
        "keypoints_coco_2014_train": ("train2014", "person_keypoints_train2014"),
        "keypoints_coco_2014_val": ("val2014", "person_keypoints_val2014"),
        "keypoints_coco_2014_minival": ("val2014", "person_keypoints_minival2014"),
        "keypoints_coco_2014_valminusminival": ("val2014", "person_keypoints_valminusminival2014"),
        "keypoints_coco_2017_train": ("train2017", "person_keypoints_train2017"),
        "keypoints_coco_2017_val": ("val2017", "person_keypoints_val2017"),
        "keypoints_coco_2017_val_100": ("val2017", "person_keypoints_val2017_100"),
    },
}

# Dataset with images and instances -> (folder of segment ids, panoptic annotations, folder of stuff maps).
COCO_PANOPTIC_FILES = {
    "coco_2017_train": ("panoptic_train2017", "panoptic_train2017", "panoptic_stuff_train2017"),
    "coco_2017_val": ("panoptic_val2017", "panoptic_val2017", "panoptic_stuff_val2017"),
    "coco_2017_val_100": ("panoptic_val2017_100", "panoptic_val2017_100", "panoptic_stuff_val2017_100"),
}

# Name -> annotation file. The images are COCO's; the annotations state their folder.
_LVIS = {
    "lvis_v1_train": "lvis_v1_train",
    "lvis_v1_val": "lvis_v1_val",
    "lvis_v1_test_dev": "lvis_v1_image_info_test_dev",
    "lvis_v1_test_challenge": "lvis_v1_image_info_test_challenge",
    "lvis_v0.5_train": "lvis_v0.5_train",
    "lvis_v0.5_val": "lvis_v0.5_val",
    "lvis_v0.5_val_rand_100": "lvis_v0.5_val_rand_100",
    "lvis_v0.5_test": "lvis_v0.5_image_info_test",
    "lvis_v0.5_train_cocofied": "lvis_v0.5_train_cocofied",
    "lvis_v0.5_val_cocofied": "lvis_v0.5_val_cocofied",
}

_CITYSCAPES_SPLITS = ("train", "val", "test")

# Name -> folder in `images` and `annotations_detectron2`.
_ADE20K = {"ade20k_sem_seg_train": "training", "ade20k_sem_seg_val": "validation"}

_VOC_SPLITS = {"2007": ("trainval", "train", "val", "test"), "2012": ("trainval", "train", "val")}


def _check_exists(name: str, path: str, prepared_by: str | None = None) -> None:
    """Raise FileNotFoundError if a path does not exist; the message names the command that prepares it."""
    if not PathManager.exists(path):
        hint = (
            f" Derive it from the download by `python -m detlib.data.prepare {prepared_by}`."
            if prepared_by
            else ""
        )
        raise FileNotFoundError(
            f"Dataset {name!r} needs {path!r}, which does not exist. Built-in datasets are stored below the "
            f"folder given by the environment variable {_ROOT_VARIABLES[0]} (or {_ROOT_VARIABLES[1]}), by "
            f"default below './datasets'.{hint}"
        )


@dataclass(frozen=True)
class _BuiltinCoco:
    """Loads one of COCO's own datasets."""

    name: str
    json_file: str
    image_root: str

    def check(self) -> None:
        _check_exists(self.name, self.json_file)

    def __call__(self) -> list[dict]:
        self.check()
        # COCO's own training set has two boxes without area.
        return load_coco_json(self.json_file, self.image_root, self.name, empty_boxes="drop")


@dataclass(frozen=True)
class _BuiltinLvis:
    """Loads one of LVIS's own datasets."""

    name: str
    json_file: str
    image_root: str

    def check(self) -> None:
        _check_exists(self.name, self.json_file, "lvis-cocofied" if "cocofied" in self.name else None)

    def __call__(self) -> list[dict]:
        self.check()
        return load_lvis_json(self.json_file, self.image_root, self.name, empty_boxes="drop")


@dataclass(frozen=True)
class _Checked:
    """Checks that a file or folder exists, then calls the loading function."""

    name: str
    path: str
    load: Callable[[], list[dict]]
    prepared_by: str | None = None

    def check(self) -> None:
        _check_exists(self.name, self.path, self.prepared_by)

    def __call__(self) -> list[dict]:
        self.check()
        return self.load()


@dataclass(frozen=True)
class _BuiltinVoc:
    """Loads one of Pascal VOC's own datasets."""

    name: str
    dirname: str
    split: str

    def check(self) -> None:
        _check_exists(self.name, os.path.join(self.dirname, "ImageSets", "Main", self.split + ".txt"))

    def __call__(self) -> list[dict]:
        self.check()
        return load_voc_instances(self.dirname, self.split, CLASS_NAMES)


def register_all_coco(root: str) -> None:
    """Register COCO 2014 and 2017 below `root`/coco: instances, person keypoints, panoptic segments."""
    for metadata_name, datasets in _COCO.items():
        metadata: dict[str, Any] = _get_builtin_metadata(metadata_name)
        for name, (folder, file_name) in datasets.items():
            image_root = os.path.join(root, "coco", folder)
            json_file = os.path.join(root, "coco", "annotations", file_name + ".json")
            DatasetCatalog.register(name, _BuiltinCoco(name, json_file, image_root))
            MetadataCatalog.get(name).set(
                json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata
            )

    for name in COCO_PANOPTIC_FILES:
        _register_coco_panoptic(root, name)


def _register_coco_panoptic(root: str, instances_name: str) -> None:
    """Register the three panoptic variants of a COCO dataset, whose instances are already registered."""
    instances = MetadataCatalog.get(instances_name)
    folder, file_name, stuff_folder = COCO_PANOPTIC_FILES[instances_name]
    panoptic_root = os.path.join(root, "coco", folder)
    panoptic_json = os.path.join(root, "coco", "annotations", file_name + ".json")
    sem_seg_root = os.path.join(root, "coco", stuff_folder)
    name = instances_name + "_panoptic"
    register_coco_panoptic(
        name,
        _get_builtin_metadata("coco_panoptic_standard"),
        instances.image_root,
        panoptic_root,
        panoptic_json,
        instances.json_file,
    )
    register_coco_panoptic_separated(
        name,
        _get_builtin_metadata("coco_panoptic_separated"),
        instances.image_root,
        panoptic_root,
        panoptic_json,
        sem_seg_root,
        instances.json_file,
        empty_boxes="drop",
    )
    for suffix, path, prepared_by in (
        ("", panoptic_json, None),
        ("_separated", sem_seg_root, "coco-stuff"),
        ("_stuffonly", sem_seg_root, "coco-stuff"),
    ):
        full = name + suffix
        DatasetCatalog.register(full, _Checked(full, path, DatasetCatalog[full], prepared_by), overwrite=True)


def register_all_lvis(root: str) -> None:
    """Register LVIS v1 and v0.5: annotations below `root`/lvis, images below `root`/coco."""
    image_root = os.path.join(root, "coco/")
    for name, file_name in _LVIS.items():
        json_file = os.path.join(root, "lvis", file_name + ".json")
        DatasetCatalog.register(name, _BuiltinLvis(name, json_file, image_root))
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=image_root,
            evaluator_type="lvis",
            **get_lvis_instances_meta(name),
        )


def register_all_pascal_voc(root: str) -> None:
    """Register Pascal VOC 2007 and 2012 below `root`/VOC2007 and `root`/VOC2012."""
    for year, splits in _VOC_SPLITS.items():
        dirname = os.path.join(root, f"VOC{year}")
        for split in splits:
            name = f"voc_{year}_{split}"
            DatasetCatalog.register(name, _BuiltinVoc(name, dirname, split))
            MetadataCatalog.get(name).set(
                thing_classes=list(CLASS_NAMES),
                dirname=dirname,
                year=int(year),
                split=split,
                evaluator_type="pascal_voc",
            )


def register_all_cityscapes(root: str) -> None:
    """Register Cityscapes' fine annotations below `root`/cityscapes: instances and label maps."""
    metadata = _get_builtin_metadata("cityscapes")
    for split in _CITYSCAPES_SPLITS:
        image_dir = os.path.join(root, f"cityscapes/leftImg8bit/{split}/")
        gt_dir = os.path.join(root, f"cityscapes/gtFine/{split}/")
        folders: dict[str, Any] = {"image_dir": image_dir, "gt_dir": gt_dir}

        name = f"cityscapes_fine_instance_seg_{split}"
        load = functools.partial(load_cityscapes_instances, image_dir, gt_dir)
        DatasetCatalog.register(name, _Checked(name, gt_dir, load))
        MetadataCatalog.get(name).set(**folders, evaluator_type="cityscapes_instance", **metadata)

        name = f"cityscapes_fine_sem_seg_{split}"
        load = functools.partial(load_cityscapes_semantic, image_dir, gt_dir)
        DatasetCatalog.register(name, _Checked(name, gt_dir, load))
        MetadataCatalog.get(name).set(
            **folders, evaluator_type="cityscapes_sem_seg", ignore_label=255, **metadata
        )


def register_all_ade20k(root: str) -> None:
    """Register ADE20K's label maps of 150 classes below `root`/ADEChallengeData2016.

    The label maps have classes from 0, and 255 for no label. Those of the download have classes from 1.
    """
    for name, folder in _ADE20K.items():
        image_root = os.path.join(root, "ADEChallengeData2016", "images", folder)
        sem_seg_root = os.path.join(root, "ADEChallengeData2016", "annotations_detectron2", folder)
        load = functools.partial(load_sem_seg, sem_seg_root, image_root)
        DatasetCatalog.register(name, _Checked(name, sem_seg_root, load, "ade20k"))
        MetadataCatalog.get(name).set(
            image_root=image_root,
            sem_seg_root=sem_seg_root,
            evaluator_type="sem_seg",
            ignore_label=255,
            **_get_builtin_metadata("ade20k_sem_seg"),
        )


def _check_when_loaded(names: Iterable[str], key: str, prepared_by: str) -> None:
    """Make registered datasets check the file or folder under `key` of their metadata before loading."""
    for name in names:
        path = getattr(MetadataCatalog.get(name), key)
        DatasetCatalog.register(name, _Checked(name, path, DatasetCatalog[name], prepared_by), overwrite=True)


def _root() -> str:
    found = next((os.environ[name] for name in _ROOT_VARIABLES if os.environ.get(name)), "datasets")
    return os.path.expanduser(found)


register_all_ade20k(_root())
register_all_cityscapes(_root())
register_all_cityscapes_panoptic(_root())
_check_when_loaded(
    ("cityscapes_fine_panoptic_train", "cityscapes_fine_panoptic_val"), "panoptic_json", "cityscapes"
)
register_all_coco(_root())
register_all_lvis(_root())
register_all_pascal_voc(_root())
