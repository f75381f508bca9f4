"""Each transform moves a drawing as it moves the coordinates of what is drawn.

A shape is drawn on an image which is then transformed; or its coordinates are transformed and then drawn.
The two must cover the same pixels, but for those on the outline, which resampling may give to either side.
"""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from detlib.data import transforms as T
from detlib.data.detection_utils import transform_instance_annotations, transform_proposals
from detlib.structures import BoxMode, polygons_to_bitmask

HEIGHT, WIDTH = 60, 84


def make(kind, draw):
    """Draw a transform at random, for images of HEIGHT x WIDTH."""
    u = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    if kind == "resize":
        return T.ResizeTransform(HEIGHT, WIDTH, u(30, 150), u(30, 150))
    if kind == "scale":
        return T.ScaleTransform(HEIGHT, WIDTH, u(30, 150), u(30, 150), "bilinear")
    if kind == "hflip":
        return T.HFlipTransform(WIDTH)
    if kind == "vflip":
        return T.VFlipTransform(HEIGHT)
    if kind == "crop":
        x0, y0 = u(0, 30), u(0, 20)
        return T.CropTransform(x0, y0, u(20, WIDTH - x0), u(20, HEIGHT - y0))
    if kind == "pad":
        return T.PadTransform(u(0, 20), u(0, 20), u(0, 20), u(0, 20))
    if kind == "rotation":
        return T.RotationTransform(HEIGHT, WIDTH, u(-180, 180), expand=draw(st.booleans()))
    if kind == "extent":
        x0, y0 = u(-10, 20), u(-10, 15)
        return T.ExtentTransform((x0, y0, x0 + u(40, 90), y0 + u(30, 70)), (u(30, 100), u(30, 100)))
    if kind == "lsj":
        np.random.seed(u(0, 9999))
        size = (u(40, 90), u(40, 90))
        inputs = T.AugInput(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8))
        return inputs.apply_augmentations([T.ResizeScale(0.5, 2.0, *size), T.FixedSizeCrop(size)])
    if kind == "list":
        first = T.ResizeTransform(HEIGHT, WIDTH, u(40, 80), u(40, 80))
        return T.TransformList([first, T.HFlipTransform(first.new_w), T.CropTransform(5, 3, 30, 35)])
    if kind == "torchvision":
        affine = v2.RandomAffine(25, translate=(0.1, 0.1), scale=(0.8, 1.2))
        steps = [affine, v2.RandomHorizontalFlip(), v2.Resize((70, 90))]
        return T.TorchvisionTransform(v2.Compose(steps), u(0, 9999), HEIGHT, WIDTH)
    return T.ColorTransform(lambda image: image)


KINDS = (
    "resize", "scale", "hflip", "vflip", "crop", "pad", "rotation", "extent", "lsj", "list",
    "torchvision", "color",
)  # fmt: skip


@st.composite
def cases(draw, kind):
    center = np.array([draw(st.integers(25, 58)), draw(st.integers(20, 40))])
    count = draw(st.integers(3, 7))
    radii = np.array(draw(st.lists(st.integers(8, 18), min_size=count, max_size=count)))
    angles = np.arange(count) * 2 * np.pi / count + draw(st.floats(0, 1))
    polygon = center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return make(kind, draw), polygon


def same_but_for_outline(first, second, tolerance=1.6):
    """Check that pixels farther than the tolerance from both outlines agree."""
    first, second = first.astype(np.uint8), second.astype(np.uint8)
    size = 2 * int(np.ceil(tolerance)) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    padded = [np.pad(mask, 8) for mask in (first, second)]
    for one, other in (padded, padded[::-1]):
        inner = cv2.erode(one, kernel)
        assert (other[inner > 0] > 0).all()


def size_after(transform):
    return transform.apply_image(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)).shape[:2]


def tolerance_of(transform):
    """Return the tolerance, which grows with the size of pixels."""
    ends = transform.apply_coords(np.array([[0.0, 0.0], [WIDTH, 0.0], [0.0, HEIGHT]]))
    growth = max(np.linalg.norm(ends[1] - ends[0]) / WIDTH, np.linalg.norm(ends[2] - ends[0]) / HEIGHT)
    return 1.3 * max(growth, 1.0)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_masks_polygons_boxes_and_points(kind, data):
    transform, polygon = data.draw(cases(kind))
    drawn = polygons_to_bitmask([polygon.reshape(-1)], HEIGHT, WIDTH)
    size, tolerance = size_after(transform), tolerance_of(transform)
    x0, y0 = polygon.min(axis=0)
    x1, y1 = polygon.max(axis=0)
    annotation = {
        "bbox": [x0, y0, x1, y1],
        "bbox_mode": BoxMode.XYXY_ABS,
        "segmentation": [polygon.reshape(-1).tolist()],
        "keypoints": [*polygon.mean(axis=0), 2],
    }
    moved = transform_instance_annotations(dict(annotation), transform, size, keypoint_hflip_indices=[0])
    mask = transform_instance_annotations(
        {**annotation, "segmentation": drawn.astype(np.uint8)}, transform, size, keypoint_hflip_indices=[0]
    )["segmentation"]
    image = transform.apply_image(np.repeat(drawn.astype(np.uint8)[:, :, None] * 255, 3, axis=2))
    assert mask.shape == image.shape[:2] == size and image.shape[2] == 3

    again = np.zeros(size, dtype=bool)
    if moved["segmentation"]:
        again = polygons_to_bitmask(moved["segmentation"], *size).astype(bool)
    same_but_for_outline(again, mask, tolerance)
    same_but_for_outline(again, image[:, :, 0] > 150, tolerance)

    left, top, right, bottom = moved["bbox"]
    assert 0 <= left <= right <= size[1] and 0 <= top <= bottom <= size[0]
    rows, columns = np.nonzero(mask)
    if len(rows):  # the box holds the drawing, and no less than what is drawn
        assert left - tolerance <= columns.min() and columns.max() + 1 <= right + tolerance
        assert top - tolerance <= rows.min() and rows.max() + 1 <= bottom + tolerance
    x, y, visible = moved["keypoints"][0]
    inner = cv2.erode(drawn.astype(np.uint8), np.ones((5, 5), np.uint8))
    if visible and inner[int(polygon.mean(axis=0)[1]), int(polygon.mean(axis=0)[0])]:
        near = mask[max(int(y) - 1, 0) : int(y) + 2, max(int(x) - 1, 0) : int(x) + 2]
        assert near.any()


@pytest.mark.parametrize("kind", ["hflip", "vflip", "crop", "pad", "rotation", "resize", "lsj"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_rotated_boxes_and_semantic_maps(kind, data):
    transform = make(kind, data.draw)
    box = np.array([[40.0, 28.0, 30.0, 14.0, data.draw(st.integers(-180, 180))]])
    if kind in ("resize", "lsj"):  # a rectangle stays one only without rotation
        box[0, 4] = 90 * (box[0, 4] // 90)

    def corners(box):
        x, y, w, h, angle = box
        r = np.deg2rad(angle)
        along = np.array([np.cos(r), -np.sin(r)]) * w / 2, np.array([np.sin(r), np.cos(r)]) * h / 2
        return np.array([x, y]) + np.array(
            [a * along[0] + b * along[1] for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        )

    size = size_after(transform)
    drawn = polygons_to_bitmask([corners(box[0]).reshape(-1)], HEIGHT, WIDTH).astype(np.int32) * 3
    moved = transform.apply_rotated_box(box.copy())[0]
    labels = transform.apply_segmentation(drawn)
    assert set(np.unique(labels)) <= {0, 3} | ({255} if kind == "lsj" else set())
    polygon = T.CropTransform(0, 0, size[1], size[0]).apply_polygons([corners(moved)])
    again = polygons_to_bitmask([polygon[0].reshape(-1)], *size) if polygon else np.zeros(size)
    same_but_for_outline(again, labels == 3, tolerance_of(transform))

    record = {
        "proposal_boxes": np.array([[10.0, 5, 50, 40]]),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
        "proposal_objectness_logits": np.array([1.0]),
    }
    transform_proposals(record, size, transform, proposal_topk=5)
    expected = transform.apply_box(np.array([[10.0, 5, 50, 40]]))[0]
    expected = np.clip(expected, 0, [size[1], size[0]] * 2)
    if len(record["proposals"]):
        np.testing.assert_allclose(record["proposals"].proposal_boxes.tensor[0].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "transform, swapped",
    [
        (T.HFlipTransform(84), True),
        (T.TransformList([T.TransformList([T.HFlipTransform(84)]), T.NoOpTransform()]), True),
        (T.TransformList([T.HFlipTransform(84), T.HFlipTransform(84)]), False),
        (T.VFlipTransform(60), False),
        (T.TorchvisionTransform(v2.RandomHorizontalFlip(1.0), 0, 60, 84), True),
        (T.TorchvisionTransform(v2.RandomVerticalFlip(1.0), 0, 60, 84), False),
        (T.TorchvisionTransform(v2.RandomRotation((90, 90), expand=True), 0, 60, 84), False),
    ],
)
def test_left_and_right_keypoints(transform, swapped):
    annotation = {"bbox": [1, 2, 30, 40], "bbox_mode": BoxMode.XYXY_ABS, "keypoints": [3, 4, 2, 20, 30, 1]}
    size = size_after(transform)
    out = transform_instance_annotations(annotation, transform, size, keypoint_hflip_indices=[1, 0])
    assert out["keypoints"][:, 2].tolist() == ([1, 2] if swapped else [2, 1])


def test_torchvision_photometric_and_refused():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    np.random.seed(1)
    augmentation = T.TorchvisionAugmentation(v2.ColorJitter(0.5, 0.5, 0.5, 0.1))
    inputs = T.AugInput(image.copy(), sem_seg=np.arange(600).reshape(20, 30))
    transform = augmentation(inputs)
    torch.manual_seed(transform.seed)
    expected = v2.ColorJitter(0.5, 0.5, 0.5, 0.1)(torch.from_numpy(image).permute(2, 0, 1))
    np.testing.assert_array_equal(inputs.image, expected.permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(inputs.sem_seg, np.arange(600).reshape(20, 30))
    for refused in (v2.MixUp(num_classes=3), v2.Compose([v2.SanitizeBoundingBoxes()])):
        with pytest.raises(TypeError, match="TorchvisionAugmentation"):
            T.TorchvisionAugmentation(refused)
    with pytest.raises(ValueError, match="cannot be applied to images|turns images into Image"):
        T.TorchvisionAugmentation(v2.ToPILImage())(T.AugInput(image))
