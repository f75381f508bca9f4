"""DatasetMapper: what it makes of a dataset dict, with explicit arguments and by config."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from detlib.config import get_cfg
from detlib.data import DatasetMapper, MetadataCatalog
from detlib.data import detection_utils as utils
from detlib.data import transforms as T
from detlib.structures import BoxMode, PolygonMasks


@pytest.fixture
def record(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    sem_seg = rng.integers(0, 5, (20, 30), dtype=np.uint8)
    Image.fromarray(sem_seg).save(tmp_path / "seg.png")

    def annotation(x, y, w, h, category_id, **kwargs):
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        return {
            "bbox": [x, y, w, h],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": category_id,
            "segmentation": [np.array(polygon, dtype=np.float64)],
            "keypoints": [x, y, 2, x + w, y + h, 1],
            **kwargs,
        }

    return {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 5,
        "height": 20,
        "width": 30,
        "sem_seg_file_name": str(tmp_path / "seg.png"),
        "annotations": [
            annotation(2, 3, 10, 8, 1),
            annotation(20, 10, 8, 5, 0),
            annotation(0, 0, 30, 20, 2, iscrowd=1),
        ],
        "note": "kept",
    }


FLIP_AND_DOUBLE = [T.HFlipTransform(30), T.Resize((40, 60))]


def test_training_output(record):
    before = copy.deepcopy(record)
    mapper = DatasetMapper(
        True,
        augmentations=FLIP_AND_DOUBLE,
        image_format="BGR",
        use_instance_mask=True,
        use_keypoint=True,
        keypoint_hflip_indices=[1, 0],
    )
    out = mapper(record)
    assert set(out) == {"file_name", "image_id", "height", "width", "note", "image", "sem_seg", "instances"}
    assert (out["file_name"], out["image_id"], out["height"], out["width"]) == (
        record["file_name"],
        5,
        20,
        30,
    )

    bgr = utils.read_image(record["file_name"], "BGR")
    expected = T.ResizeTransform(20, 30, 40, 60).apply_image(bgr[:, ::-1])
    assert out["image"].dtype == torch.uint8 and out["image"].is_contiguous()
    np.testing.assert_array_equal(out["image"].numpy(), expected.transpose(2, 0, 1))
    seg = utils.read_image(record["sem_seg_file_name"], "L")[:, ::-1, 0]
    assert out["sem_seg"].dtype == torch.int64
    np.testing.assert_array_equal(out["sem_seg"].numpy(), seg.repeat(2, axis=0).repeat(2, axis=1))

    instances = out["instances"]
    assert instances.image_size == (40, 60)
    assert instances.gt_boxes.tensor.tolist() == [[36, 6, 56, 22], [4, 20, 20, 30]]
    assert instances.gt_classes.tolist() == [1, 0]
    assert isinstance(instances.gt_masks, PolygonMasks)
    assert instances.gt_masks.get_bounding_boxes().tensor.tolist() == [[36, 6, 56, 22], [4, 20, 20, 30]]
    assert instances.gt_keypoints.tensor[0].tolist() == [[36, 22, 1], [56, 6, 2]]

    assert {k: v for k, v in record.items() if k != "annotations"} == {
        k: v for k, v in before.items() if k != "annotations"
    }
    for mine, theirs in zip(record["annotations"], before["annotations"]):
        np.testing.assert_array_equal(mine.pop("segmentation"), theirs.pop("segmentation"))
        assert mine == theirs


def test_test_output_has_no_annotations(record):
    out = DatasetMapper(is_train=False, augmentations=[], image_format="L")(record)
    assert "instances" not in out and "annotations" not in out
    assert out["image"].shape == (1, 20, 30)
    out["image"] += 1  # a tensor of its own


def test_masks_and_keypoints_only_when_asked(record):
    out = DatasetMapper(True, augmentations=[], image_format="RGB")(record)
    assert set(out["instances"].get_fields()) == {"gt_boxes", "gt_classes"}
    bits = DatasetMapper(
        True, augmentations=[], image_format="RGB", use_instance_mask=True, instance_mask_format="bitmask"
    )(record)["instances"].gt_masks
    assert bits.tensor.shape == (2, 20, 30)
    assert bits.tensor.sum(dim=(1, 2)).tolist() == [80, 40]


def test_crop_drops_what_is_gone_and_recomputes_boxes(record):
    triangle = np.array([2.0, 3, 12, 3, 12, 11])
    record["annotations"][0]["segmentation"] = [triangle]
    mapper = DatasetMapper(
        True,
        augmentations=[T.CropTransform(0, 0, 7, 20)],
        image_format="RGB",
        use_instance_mask=True,
        recompute_boxes=True,
    )
    instances = mapper(record)["instances"]
    assert instances.gt_classes.tolist() == [1]
    assert instances.gt_boxes.tensor.tolist() == [[2, 3, 7, 7]]  # the triangle is 4 high at x = 7
    record["annotations"] = []
    assert len(mapper(record)["instances"]) == 0
    with pytest.raises(ValueError, match="recompute_boxes"):
        DatasetMapper(True, augmentations=[], image_format="RGB", recompute_boxes=True)


def test_precomputed_proposals(record):
    record.update(
        proposal_boxes=np.array([[0.0, 0, 10, 10], [1, 1, 5, 5]]),
        proposal_bbox_mode=BoxMode.XYXY_ABS,
        proposal_objectness_logits=np.array([2.0, 1.0]),
    )
    mapper = DatasetMapper(
        False, augmentations=FLIP_AND_DOUBLE, image_format="RGB", precomputed_proposal_topk=1
    )
    proposals = mapper(record)["proposals"]
    assert proposals.proposal_boxes.tensor.tolist() == [[40, 0, 60, 20]]


def test_by_config(record):
    cfg = get_cfg()
    cfg.INPUT.CROP.ENABLED = True
    cfg.MODEL.MASK_ON = True
    mapper = DatasetMapper(cfg, is_train=True)
    assert [type(a).__name__ for a in mapper.augmentations.augs] == [
        "RandomCrop",
        "ResizeShortestEdge",
        "RandomFlip",
    ]
    assert mapper.is_train and mapper.recompute_boxes and mapper.use_instance_mask
    assert mapper.image_format == "BGR" and mapper.proposal_topk is None
    out = mapper(record)
    assert out["image"].shape[1:] == out["instances"].image_size
    assert min(out["instances"].image_size) == 800 or max(out["instances"].image_size) == 1333

    cfg.MODEL.LOAD_PROPOSALS = True
    test_mapper = DatasetMapper(cfg, False)
    assert [type(a).__name__ for a in test_mapper.augmentations.augs] == ["ResizeShortestEdge"]
    assert test_mapper.proposal_topk == 1000 and not test_mapper.recompute_boxes
    assert DatasetMapper(cfg, True).proposal_topk == 2000
    replaced = DatasetMapper(cfg, True, augmentations=[T.Resize((8, 9))], use_instance_mask=True)
    assert replaced(record)["image"].shape == (3, 8, 9)


def test_keypoints_by_config(record):
    MetadataCatalog.get("mapper_kpts").set(keypoint_names=["l", "r"], keypoint_flip_map=[("l", "r")])
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("mapper_kpts",)
    cfg.MODEL.KEYPOINT_ON = True
    try:
        mapper = DatasetMapper(cfg, True)
    finally:
        MetadataCatalog.remove("mapper_kpts")
    assert mapper.keypoint_hflip_indices == [1, 0]
    assert mapper(record)["instances"].gt_keypoints.tensor.shape == (2, 2, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bbox": None}, "annotation 0 of image file .*a.png"),
        ({"bbox_mode": "delete"}, "annotation 0 of image file .*a.png: the key 'bbox_mode' is missing"),
        ({"segmentation": 5}, "annotation 0 of image file .*a.png: segmentation of type int"),
        ({"segmentation": "delete"}, "a.png: 'segmentation' is missing in instance 0"),
        ({"segmentation": [[1, 2, 3]]}, "annotation 0 of image file .*a.png"),
        (
            {"segmentation": [[1, 2, 3, 4, 5, np.nan]]},
            "a.png: Object 0, polygon 0: .* NaN or infinite",
        ),
    ],
)
def test_faulty_annotations_are_named(record, change, message):
    ((key, value),) = change.items()
    if value == "delete":
        del record["annotations"][0][key]
    else:
        record["annotations"][0][key] = value
    with pytest.raises(ValueError, match=message):
        DatasetMapper(True, augmentations=[], image_format="RGB", use_instance_mask=True)(record)


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ([[1, 2, 3, 4, 5, np.inf]], "NaN or infinite"),
        ({"size": [20, 30], "counts": [-5, 605]}, "a run is shorter than 0"),
        ({"size": [20, 30], "counts": "~~~~"}, "not valid compressed runs"),
        ({"size": [20, 30], "counts": [10**30]}, "longer than any mask"),
    ],
)
def test_masks_that_crash_native_code_are_named(record, segmentation, message):
    record["annotations"][1]["segmentation"] = segmentation
    mapper = DatasetMapper(
        True, augmentations=[], image_format="RGB", use_instance_mask=True, instance_mask_format="bitmask"
    )
    with pytest.raises(ValueError, match=f"a.png: .*{message}"):
        mapper(record)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_polygons_far_outside_the_image_are_cut_off(record, mask_format):
    record["annotations"][0]["segmentation"] = [[-1e9, -1e9, 1e9, -1e9, 1e9, 1e9, -1e9, 1e9]]
    mapper = DatasetMapper(
        True, augmentations=[], image_format="RGB", use_instance_mask=True, instance_mask_format=mask_format
    )
    masks = mapper(record)["instances"].gt_masks
    assert masks.crop_and_resize(torch.tensor([[2.0, 3, 12, 11], [0, 0, 9, 9]]), 28)[0].all()


def test_wrong_size_is_named(record):
    record["width"] = 31
    with pytest.raises(utils.SizeMismatchError, match="image 5 .*a.png"):
        DatasetMapper(True, augmentations=[], image_format="RGB")(record)


def test_label_maps_with_a_palette_and_of_many_classes(record, tmp_path):
    mapper = DatasetMapper(True, augmentations=FLIP_AND_DOUBLE, image_format="RGB")
    labels = np.random.default_rng(1).integers(0, 5, (20, 30), dtype=np.uint8)
    image = Image.fromarray(labels).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 9, 9, 9, 200, 1, 2])
    image.save(tmp_path / "seg.png")
    expected = labels[:, ::-1].repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(mapper(record)["sem_seg"].numpy(), expected)
    Image.fromarray(labels.astype(np.uint16) * 100).save(tmp_path / "seg.png")
    np.testing.assert_array_equal(mapper(record)["sem_seg"].numpy(), expected.astype(int) * 100)
    Image.fromarray(labels[:10]).save(tmp_path / "seg.png")
    with pytest.raises(
        ValueError, match=r"seg.png has \(height, width\) = \(10, 30\), but its image .*a.png"
    ):
        mapper(record)


class OneClassMapper(DatasetMapper):
    """Changes annotations in place, and makes instances of its own."""

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        annos = dataset_dict.pop("annotations")
        for anno in annos:
            del anno["segmentation"], anno["keypoints"]
            anno["category_id"] = 7
            utils.transform_instance_annotations(anno, transforms, image_shape)
        dataset_dict["instances"] = utils.annotations_to_instances(annos[:2], image_shape)
        dataset_dict["seen"] = len(annos)


class CountingMapper(DatasetMapper):
    """Adds to what there is."""

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        dataset_dict["instances"].number = torch.arange(len(dataset_dict["instances"]))


def test_subclasses_may_make_the_instances(record):
    args = {"augmentations": FLIP_AND_DOUBLE, "image_format": "RGB"}
    want = DatasetMapper(True, **args)(record)
    before = copy.deepcopy(record)
    got = OneClassMapper(True, **args)(record)
    assert "annotations" not in got and got["seen"] == 3
    assert got["instances"].gt_classes.tolist() == [7, 7]
    assert torch.equal(got["instances"].gt_boxes.tensor, want["instances"].gt_boxes.tensor)
    assert str(record) == str(before)  # the dataset's own annotations

    got = CountingMapper(True, **args)(record)
    assert "annotations" not in got and got["instances"].number.tolist() == [0, 1]
    assert torch.equal(got["instances"].gt_boxes.tensor, want["instances"].gt_boxes.tensor)
    assert "instances" not in CountingMapper(False, **args)(record)
