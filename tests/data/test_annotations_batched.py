"""Annotations of an image transformed together must equal those transformed one by one, to the last bit."""

import copy

import numpy as np
import pytest

from detlib.data import DatasetMapper
from detlib.data import detection_utils as utils
from detlib.data import transforms as T
from detlib.data.detection_utils import transform_annotations_batched
from detlib.structures import BoxMode

SIZE, FLIP = (60, 80), [0, 2, 1]

CHAINS = {
    "nothing": [],
    "resize and flip": [T.ResizeTransform(60, 80, 101, 133), T.HFlipTransform(133)],
    "flip twice": [T.HFlipTransform(80), T.HFlipTransform(80), T.VFlipTransform(60)],
    "crop": [T.ResizeTransform(60, 80, 77, 91), T.CropTransform(11, 9, 50, 40), T.HFlipTransform(50)],
    "extent and pad": [T.ExtentTransform((3, 4, 61, 47), (39, 51)), T.PadTransform(3, 4, 5, 6)],
    "scale and colors": [
        T.ScaleTransform(60, 80, 33, 44, "bilinear"),
        T.BlendTransform(1, 0.5, 0.5),
        T.ColorTransform(np.abs),
        T.NoOpTransform(),
    ],
}


def annotations(rng, count=7, mode=BoxMode.XYWH_ABS, as_arrays=False, polygons=2, **changes):
    made = []
    for i in range(count):
        x0, y0 = rng.uniform(0, [60, 40])
        width, height = rng.uniform(2, [40, 30])
        far = [width, height] if mode == BoxMode.XYWH_ABS else [x0 + width, y0 + height]
        parts = [rng.uniform(0, 60, 2 * rng.integers(3, 9)) for _ in range((i + polygons) % 3)]
        keypoints = np.column_stack([rng.uniform(-5, 90, (3, 2)), rng.integers(0, 3, 3)]).reshape(-1)
        box = np.array([x0, y0, *far])
        made.append(
            {
                "bbox": box if as_arrays else box.tolist(),
                "bbox_mode": mode,
                "category_id": i,
                "segmentation": parts if as_arrays else [part.tolist() for part in parts],
                "keypoints": keypoints if as_arrays else keypoints.tolist(),
                **changes,
            }
        )
    return made


def check_equal(found, expected):
    assert [list(sorted(one)) for one in found] == [list(sorted(one)) for one in expected]
    for one, other in zip(found, expected):
        assert one["bbox_mode"] is other["bbox_mode"] and one["category_id"] == other["category_id"]
        for key in {"bbox", "keypoints"} & set(one):
            assert one[key].dtype == other[key].dtype == np.float64
            np.testing.assert_array_equal(one[key], other[key], strict=True)
        assert len(one.get("segmentation", [])) == len(other.get("segmentation", []))
        for part, other_part in zip(one.get("segmentation", []), other.get("segmentation", [])):
            np.testing.assert_array_equal(part, other_part, strict=True)


@pytest.mark.parametrize("as_arrays", [False, True])
@pytest.mark.parametrize("mode", [BoxMode.XYWH_ABS, BoxMode.XYXY_ABS])
@pytest.mark.parametrize("chain", CHAINS)
def test_equal_to_one_by_one(chain, mode, as_arrays):
    rng = np.random.default_rng(len(chain))
    transforms = T.TransformList(CHAINS[chain])
    size = transforms.apply_image(np.zeros(SIZE, dtype=np.uint8)).shape[:2]
    for kept in (("segmentation", "keypoints"), ("segmentation",), ("keypoints",), ()):
        given = [
            {key: value for key, value in one.items() if key.startswith(("bbox", "category")) or key in kept}
            for one in annotations(rng, mode=mode, as_arrays=as_arrays)
        ]
        before = copy.deepcopy(given)
        found = transform_annotations_batched(given, transforms, size, keypoint_hflip_indices=FLIP)
        expected = [
            utils.transform_instance_annotations(one, transforms, size, keypoint_hflip_indices=FLIP)
            for one in copy.deepcopy(given)
        ]
        check_equal(found, expected)
        for one, other in zip(given, before):
            np.testing.assert_equal(one, other)


def test_no_annotations_and_no_polygons():
    transforms = T.TransformList(CHAINS["resize and flip"])
    assert transform_annotations_batched([], transforms, (101, 133)) == []
    bare = annotations(np.random.default_rng(0), count=2, segmentation=[])
    found = transform_annotations_batched(bare, transforms, (101, 133), keypoint_hflip_indices=FLIP)
    assert [one["segmentation"] for one in found] == [[], []]


def test_whole_numbers():
    given = annotations(
        np.random.default_rng(0), count=3, bbox=[3, 4, 10, 7], segmentation=[[1, 2, 9, 2, 9, 8]]
    )
    transforms = T.TransformList(CHAINS["resize and flip"])
    found = transform_annotations_batched(given, transforms, (101, 133), keypoint_hflip_indices=FLIP)
    one_by_one = [
        utils.transform_instance_annotations(dict(one), transforms, (101, 133), keypoint_hflip_indices=FLIP)
        for one in given
    ]
    check_equal(found, one_by_one)


class Own(T.HFlipTransform):
    """What a user's transform does is not known."""


OTHERS = {
    "a rotated box": {"bbox": [9, 9, 5, 4, 30], "bbox_mode": BoxMode.XYWHA_ABS},
    "another mode": {"bbox_mode": BoxMode.XYXY_ABS},
    "relative": {"bbox_mode": BoxMode.XYXY_REL},
    "a short box": {"bbox": [1, 2, 3]},
    "short floats": {"bbox": [np.float32(0.1), np.float32(0.1), np.float32(9.7), np.float32(9.3)]},
    "an array of short floats": {"bbox": np.array([0.1, 0.1, 9.7, 9.3], dtype=np.float32)},
    "an RLE": {"segmentation": {"size": [60, 80], "counts": [0, 4800]}},
    "a broken polygon": {"segmentation": [[1, 2, 3, 4, 5]]},
    "more keypoints": {"keypoints": [1.0] * 12},
    "a word": {"bbox": ["a", 2, 3, 4]},
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_sorts_are_left_alone(other):
    given = annotations(np.random.default_rng(1), count=3)
    given[1].update(OTHERS[other])
    transforms = T.TransformList(CHAINS["resize and flip"])
    assert transform_annotations_batched(given, transforms, (101, 133), keypoint_hflip_indices=FLIP) is None


@pytest.mark.parametrize("step", [Own(80), T.RotationTransform(60, 80, 30)])
def test_other_transforms_are_left_alone(step):
    given = annotations(np.random.default_rng(1))
    assert transform_annotations_batched(given, T.TransformList([step]), SIZE) is None


def test_missing_keys_and_flips_are_left_alone():
    transforms = T.TransformList(CHAINS["resize and flip"])
    for key in ("bbox", "bbox_mode", "keypoints", "segmentation"):
        given = annotations(np.random.default_rng(1), count=3)
        del given[2][key]
        assert transform_annotations_batched(given, transforms, SIZE, keypoint_hflip_indices=FLIP) is None
    given = annotations(np.random.default_rng(1), count=3)
    assert transform_annotations_batched(given, transforms, SIZE) is None
    assert transform_annotations_batched(given, transforms, SIZE, keypoint_hflip_indices=[0, 1]) is None


def test_mapper_takes_both_ways():
    """One odd instance sends all of an image the other way; the figures of the rest stay."""
    mapper = DatasetMapper(
        True,
        augmentations=[],
        image_format="RGB",
        use_instance_mask=True,
        use_keypoint=True,
        keypoint_hflip_indices=FLIP,
        rotated_boxes=False,
    )
    given = annotations(np.random.default_rng(2), polygons=1)
    transforms = T.TransformList(CHAINS["resize and flip"])
    together = mapper._move_annotations({"annotations": given}, transforms, (101, 133))
    odd = {**given[0], "bbox": [30.0, 20.0, 8.0, 6.0, 25.0], "bbox_mode": BoxMode.XYWHA_ABS}
    one_by_one = mapper._move_annotations({"annotations": [*given, odd]}, transforms, (101, 133))
    check_equal(together, one_by_one[:-1])
    assert one_by_one[-1]["bbox"].shape == (4,)
