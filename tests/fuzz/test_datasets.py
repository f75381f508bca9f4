"""Damaged annotation files of every format: loader, checker, repair, converter and mapper."""

import functools
import json
import shutil

from detlib.config import get_cfg
from detlib.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detlib.data.check.__main__ import main as check_main
from detlib.data.convert import main as convert_main
from detlib.structures import BoxMode
from detlib.utils.file_io import PathManager
from tests.data import small_datasets
from tests.data.formats import test_csv, test_cvat, test_dota, test_labelme, test_via
from tests.fuzz import mutations
from tests.fuzz.engine import DOCUMENTED, Target, fuzz_tests


@functools.cache
def _mapper(mask_format):
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = mask_format != ""
    cfg.INPUT.MASK_FORMAT = mask_format or "polygon"
    cfg.INPUT.MIN_SIZE_TRAIN = (30,)
    cfg.INPUT.CROP.ENABLED = True
    return DatasetMapper(cfg, is_train=True)


def use(uri):
    """Load a dataset and map its images, with masks where all objects of a kind have them."""
    for record in DatasetCatalog.get(uri):
        objects = record["annotations"]
        for mode in {a["bbox_mode"] for a in objects}:
            _mapper("")(record | {"annotations": [a for a in objects if a["bbox_mode"] == mode]})
        drawn = [a for a in objects if a.get("segmentation") and a["bbox_mode"] != BoxMode.XYWHA_ABS]
        polygons = [a for a in drawn if isinstance(a["segmentation"], list)]
        for mask_format, chosen in (("polygon", polygons), ("bitmask", drawn)):
            if chosen:
                instances = _mapper(mask_format)(record | {"annotations": chosen})["instances"]
                if instances.has("gt_masks"):
                    instances.gt_masks.crop_and_resize(instances.gt_boxes.tensor, 14)


def read(uri, folder):
    """Load, check, repair and convert a dataset; the last error of a loader is raised at the end."""
    out = f"{folder}-out"
    known = {*MetadataCatalog.list()}
    failed = None
    try:
        code = check_main([uri, "--fix", f"{out}/fixed.json", "--all"])
        assert code in (0, 1, 2), code
        code_without_images = check_main([uri, "--no-images"])
        assert code_without_images in (0, 1, 2), code_without_images
        try:
            use(uri)
        except DOCUMENTED as error:
            failed = error
        for to in ("coco", "yolo", "voc"):
            assert convert_main([uri, "--to", to, f"{out}/{to}"]) in (0, 2)
        if failed is None:
            assert code != 2, "the loader reads what the checker cannot"
        if PathManager.isfile(f"{out}/fixed.json"):
            _use_repaired(f"{out}/fixed.json", folder)
    finally:
        for name in MetadataCatalog.list():
            if name not in known:
                MetadataCatalog.remove(name)
        shutil.rmtree(out, ignore_errors=True)
    if failed is not None:
        raise failed


def _use_repaired(path, folder):
    """Load the repaired dataset, unless nothing is left of it."""
    with open(path) as file:
        content = json.load(file)
    if content["images"] and content["categories"]:
        dicts = DatasetCatalog.get(f"coco:{path}@{folder}")
        assert len(dicts) == len(content["images"])


def _target(name, write, files, mutate, uri, **more):
    return Target(name, write, files, mutate, lambda folder: read(uri.format(folder), folder), **more)


def _write_coco(folder):
    content = small_datasets.coco_content()
    content["annotations"][0] |= {"keypoints": [3, 4, 2, 8, 5, 1], "num_keypoints": 2, "area": 38}
    content["categories"][2] |= {"keypoints": ["beak", "tail"], "skeleton": [[1, 2]]}
    content["annotations"].append({"id": 9, "image_id": 2, "category_id": 3, "bbox": [20, 15, 10, 5, 30]})
    small_datasets.write_coco(folder, content)


def _write_labelme(folder):
    shapes = (
        test_labelme.TRIANGLE,
        test_labelme.BOX,
        test_labelme.shape("jay", [[10, 10], [15, 10]], "circle"),
        test_labelme.shape("jay", [[1, 1]], "point"),
    )
    test_labelme.write_labelme(folder, *shapes)


def _write_via(folder):
    regions = [
        test_via.region(test_via.TRIANGLE, bird="wren"),
        test_via.region(test_via.rect(5, 6, 15, 19), bird="owl"),
        test_via.region({"name": "ellipse", "cx": 20, "cy": 15, "rx": 4, "ry": 3, "theta": 0.5}, bird="owl"),
        test_via.region({"name": "circle", "cx": 20, "cy": 15, "r": 4}, bird="owl"),
    ]
    test_via.write_via(folder, *regions)


def _write_cvat(folder):
    shapes = (
        test_cvat.POLYGON,
        test_cvat.box(5, 6, 20, 25),
        test_cvat.box(5, 6, 20, 25, rotation=30),
        test_cvat.tag("mask", rle="1, 2, 2, 1", left=4, top=6, width=3, height=2),
        test_cvat.tag("ellipse", cx=20, cy=15, rx=4, ry=3),
    )
    test_cvat.write_cvat(folder, test_cvat.image(*shapes))


def _write_csv(folder):
    test_csv.write_csv(folder, "a.jpg,40,30,wren,2,3,10,12", "a.jpg,40,30,owl,5,6,20,25")


def _write_open_images(folder):
    line = "abc,xclick,/m/01,1,0.05,0.25,0.1,0.4,0,0,1,0,0"
    test_csv.write_csv(
        folder, line, header=test_csv.OPEN_IMAGES, file="train-annotations-bbox.csv", images=("abc.jpg",)
    )
    small_datasets.write(f"{folder}/class-descriptions-boxable.csv", "/m/01,Wren\n/m/02,Owl\n")


def _write_yolo(folder):
    lines = "2 0.15 0.25 0.2 0.3\n0 0.1 0.1 0.5 0.1 0.5 0.5 0.3 0.6 0.1 0.5\n1 0.5 0.5 1 1\n"
    small_datasets.write_yolo(folder, {"a": lines, "b": "1 0.5 0.5 0.1 0.1\n"})


TARGETS = [
    _target(
        "coco", _write_coco, ("ann.json",), mutations.mutate_json, "coco:{0}/ann.json@{0}/images", count=200
    ),
    _target("voc", small_datasets.write_voc, ("Annotations/a.xml",), mutations.mutate_xml, "voc:{0}@train"),
    _target(
        "voc-list",
        small_datasets.write_voc,
        ("ImageSets/Main/train.txt",),
        mutations.mutate_text,
        "voc:{0}@train",
        count=40,
    ),
    _target("yolo-yaml", _write_yolo, ("data.yaml",), mutations.mutate_yaml, "yolo:{0}/data.yaml@train"),
    _target(
        "yolo-labels", _write_yolo, ("labels/train/a.txt",), mutations.mutate_text, "yolo:{0}/data.yaml@train"
    ),
    _target("labelme", _write_labelme, ("a.json",), mutations.mutate_json, "labelme:{0}"),
    _target("via", _write_via, ("via_region_data.json",), mutations.mutate_json, "via:{0}"),
    _target("cvat", _write_cvat, ("annotations.xml",), mutations.mutate_xml, "cvat:{0}"),
    _target(
        "dota",
        lambda folder: test_dota.write_dota(folder, test_dota.TURNED, test_dota.PLAIN),
        ("labelTxt/P0001.txt",),
        mutations.mutate_text,
        "dota:{0}",
    ),
    _target("csv", _write_csv, ("_annotations.csv",), mutations.mutate_text, "csv:{0}/_annotations.csv"),
    _target(
        "csv-open-images",
        _write_open_images,
        ("train-annotations-bbox.csv", "class-descriptions-boxable.csv"),
        mutations.mutate_text,
        "csv:{0}/train-annotations-bbox.csv",
        count=40,
    ),
    _target(
        "roboflow",
        small_datasets.write_roboflow,
        ("train/_annotations.coco.json",),
        mutations.mutate_json,
        "roboflow:{0}@train",
        count=40,
    ),
]

test_damaged_files_are_refused_or_read, test_damaged_files_for_five_minutes = fuzz_tests(TARGETS)
