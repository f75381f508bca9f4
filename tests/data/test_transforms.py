"""Transforms: values against Pillow, OpenCV, torch and slow formulas; inverses; errors."""

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from detlib.data import transforms as T
from detlib.data.transforms.transform import clip_polygon


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (30, 44, 3), dtype=np.uint8)


def points(n=20, size=(30, 44), seed=0):
    return np.random.default_rng(seed).uniform(0, 1, (n, 2)) * [size[1], size[0]]


@pytest.mark.parametrize(
    "interp", [Image.Resampling.BILINEAR, Image.Resampling.NEAREST, Image.Resampling.BICUBIC]
)
@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_resize_of_uint8_equals_pillow(channels, interp):
    shape = (30, 44) if channels is None else (30, 44, channels)
    img = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    out = T.ResizeTransform(30, 44, 21, 63, interp).apply_image(img)
    planes = img[:, :, None] if channels is None else img
    expected = [
        np.asarray(Image.fromarray(planes[:, :, c]).resize((63, 21), interp)) for c in range(planes.shape[2])
    ]
    assert out.dtype == np.uint8
    assert out.shape == (21, 63) + shape[2:]
    # An RGBA image's colors are weighted by its alpha in Pillow; the other kinds resize by plane.
    if channels != 4:
        np.testing.assert_array_equal(out.reshape(21, 63, -1), np.stack(expected, axis=2))
    else:
        np.testing.assert_array_equal(out, np.asarray(Image.fromarray(img).resize((63, 21), interp)))


@pytest.mark.parametrize("shape", [(30, 44), (30, 44, 1), (30, 44, 3), (2, 30, 44, 3)])
def test_resize_of_float_equals_interpolate(shape):
    img = np.random.default_rng(2).uniform(0, 1, shape).astype(np.float32)
    out = T.ResizeTransform(30, 44, 21, 63).apply_image(img)
    batch = torch.from_numpy(img).reshape(-1, 30, 44, shape[-1] if len(shape) > 2 else 1).permute(0, 3, 1, 2)
    expected = F.interpolate(batch, (21, 63), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    assert out.dtype == np.float32
    assert out.shape == shape[:-3] + (21, 63) + (shape[-1:] if len(shape) > 2 else ())
    np.testing.assert_allclose(out, expected.numpy().reshape(out.shape))


def test_resize_takes_flipped_views(image):
    flipped = image[:, ::-1, ::-1]
    resize = T.ResizeTransform(30, 44, 15, 22)
    np.testing.assert_array_equal(resize.apply_image(flipped), resize.apply_image(flipped.copy()))
    as_float = image.astype(np.float32)[:, ::-1]
    np.testing.assert_array_equal(resize.apply_image(as_float), resize.apply_image(as_float.copy()))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, bool])
def test_resize_of_ids_picks_what_pillow_picks(dtype):
    ids = np.random.default_rng(3).integers(0, 2 if dtype is bool else 250, (30, 44))
    resize = T.ResizeTransform(30, 44, 21, 63)
    out = resize.apply_segmentation(ids.astype(dtype))
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, resize.apply_segmentation(ids.astype(np.uint8)).astype(dtype))


def test_resize_rounds_integers():
    img = np.random.default_rng(4).integers(0, 60000, (30, 44, 3)).astype(np.uint16)
    resize = T.ResizeTransform(30, 44, 21, 63)
    out = resize.apply_image(img)
    assert out.dtype == np.uint16
    np.testing.assert_array_equal(out, np.rint(resize.apply_image(img.astype(np.float32))))


def test_resize_coords_and_inverse():
    resize = T.ResizeTransform(30, 44, 60, 11)
    np.testing.assert_allclose(resize.apply_coords(points()), points() * [0.25, 2.0])
    np.testing.assert_allclose(resize.inverse().apply_coords(resize.apply_coords(points())), points())


def test_resize_refuses_another_size(image):
    with pytest.raises(ValueError, match=r"height 31 and width 44.*\(30, 44, 3\)"):
        T.ResizeTransform(31, 44, 10, 10).apply_image(image)


@pytest.mark.parametrize("center", [None, (10.0, 4.0)])
@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("angle", [30, -75.5, 180, 271])
def test_rotation_moves_coords_by_the_formula(angle, expand, center):
    h, w = 30, 44
    rotation = T.RotationTransform(h, w, angle, expand=expand, center=center)
    pivot = np.array([w / 2, h / 2]) if center is None or expand else np.array(center)
    rad = np.deg2rad(angle)
    matrix = np.array([[np.cos(rad), np.sin(rad)], [-np.sin(rad), np.cos(rad)]])  # y points down
    expected = (points() - pivot) @ matrix.T
    expected += [rotation.bound_w / 2, rotation.bound_h / 2] if expand else pivot
    np.testing.assert_allclose(rotation.apply_coords(points()), expected, atol=1e-9)


def test_rotation_by_quarter_turns_equals_rot90(image):
    for turns in (1, 2, 3):
        out = T.RotationTransform(30, 44, 90 * turns).apply_image(image)
        np.testing.assert_array_equal(out, np.rot90(image, turns))
        labels = np.arange(30 * 44, dtype=np.int16).reshape(30, 44)
        seg = T.RotationTransform(30, 44, 90 * turns).apply_segmentation(labels)
        np.testing.assert_array_equal(seg, np.rot90(labels, turns))
    gray = T.RotationTransform(30, 44, 90).apply_image(image[:, :, :1])
    np.testing.assert_array_equal(gray, np.rot90(image[:, :, :1]))


def test_rotation_image_and_coords_agree():
    img = np.zeros((60, 80), dtype=np.uint8)
    cv2.circle(img, (55, 20), 4, 255, -1)
    rotation = T.RotationTransform(60, 80, 40)
    moved = rotation.apply_image(img)
    rows, cols = np.nonzero(moved > 127)
    seen = np.array([cols.mean() + 0.5, rows.mean() + 0.5])
    np.testing.assert_allclose(rotation.apply_coords(np.array([[55.5, 20.5]]))[0], seen, atol=0.15)


@pytest.mark.parametrize("expand", [True, False])
def test_rotation_inverse(expand):
    rotation = T.RotationTransform(30, 44, 33, expand=expand)
    back = rotation.inverse().apply_coords(rotation.apply_coords(points()))
    # With a frame that grew, the way back goes through whole pixels.
    np.testing.assert_allclose(back, points(), atol=1.0 if expand else 1e-9)


def test_extent_inside_is_a_crop_and_outside_is_filled(image):
    extent = T.ExtentTransform((4, 6, 24, 26), (20, 20))
    np.testing.assert_array_equal(extent.apply_image(image), image[6:26, 4:24])
    np.testing.assert_array_equal(extent.apply_segmentation(image[:, :, 0]), image[6:26, 4:24, 0])
    outside = T.ExtentTransform((-10, 0, 34, 30), (30, 44), fill=7).apply_image(image)
    assert (outside[:, :10] == 7).all()
    np.testing.assert_array_equal(outside[:, 10:], image[:, :34])
    zoom = T.ExtentTransform((4, 6, 14, 26), (60, 50))
    np.testing.assert_allclose(zoom.apply_coords(np.array([[4.0, 6.0], [14.0, 26.0]])), [[0, 0], [50, 60]])


def test_color_transforms_change_only_colors(image):
    color = T.ColorTransform(lambda img: 255 - img)
    np.testing.assert_array_equal(color.apply_image(image), 255 - image)
    np.testing.assert_array_equal(color.apply_coords(points()), points())
    assert color.apply_segmentation(image[:, :, 0]) is not None
    assert isinstance(color.inverse(), T.NoOpTransform)
    gray = T.PILColorTransform(lambda img: img.convert("L"))
    np.testing.assert_array_equal(gray.apply_image(image), np.asarray(Image.fromarray(image).convert("L")))
    with pytest.raises(TypeError, match="callable"):
        T.ColorTransform(3)


def star(seed, n=14, size=40):
    """Return a concave polygon around the middle of a square, reaching beyond it here and there."""
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, n))
    radius = rng.uniform(0.1, 0.75, n) * size
    return np.stack([size / 2 + radius * np.cos(angle), size / 2 + radius * np.sin(angle)], axis=1)


def polygon_area(p):
    x, y = p.T
    return 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


@pytest.mark.parametrize("seed", range(8))
def test_clipped_polygon_covers_polygon_and_rectangle(seed):
    polygon = star(seed)
    before = polygon.copy()
    clipped = clip_polygon(polygon, 7, 11, 31, 29)
    np.testing.assert_array_equal(polygon, before)
    # Area against a fine raster of the polygon, cut to the rectangle.
    fine = 16
    raster = np.zeros((60 * fine, 60 * fine), dtype=np.uint8)
    shifted = np.rint((polygon + 10) * fine * 16 - 8).astype(np.int32)
    cv2.fillPoly(raster, [shifted], 1, shift=4)
    covered = raster[(11 + 10) * fine : (29 + 10) * fine, (7 + 10) * fine : (31 + 10) * fine].sum() / fine**2
    assert polygon_area(clipped) == pytest.approx(covered, rel=0.01, abs=0.5)
    assert (clipped >= [7, 11]).all() and (clipped <= [31, 29]).all()


def test_crop_of_polygons_keeps_the_mask():
    # A "U" of which the crop leaves two legs: one polygon with an edge without area.
    legs = np.array([[2, 2], [8, 2], [8, 20], [14, 20], [14, 2], [20, 2], [20, 26], [2, 26]], dtype=float)
    crop = T.CropTransform(0, 4, 24, 10)
    (cropped,) = crop.apply_polygons([legs.copy()])
    mask = mask_util.decode(mask_util.merge(mask_util.frPyObjects([cropped.reshape(-1).tolist()], 10, 24)))
    full = mask_util.decode(mask_util.merge(mask_util.frPyObjects([legs.reshape(-1).tolist()], 40, 24)))
    np.testing.assert_array_equal(mask, full[4:14])
    assert polygon_area(cropped) == 2 * 6 * 10
    assert crop.apply_polygons([np.array([[0.0, 20], [5, 20], [5, 25]])]) == []


def test_crop_and_pad_are_inverse(image):
    crop = T.CropTransform(5, 6, 20, 15, orig_w=44, orig_h=30)
    np.testing.assert_array_equal(crop.apply_image(image), image[6:21, 5:25])
    back = crop.inverse()
    np.testing.assert_allclose(back.apply_coords(crop.apply_coords(points())), points())
    pad = T.PadTransform(2, 3, 4, 5, orig_w=44, orig_h=30, pad_value=9)
    padded = pad.apply_image(image)
    assert padded.shape == (38, 50, 3)
    np.testing.assert_array_equal(pad.inverse().apply_image(padded), image)
    assert (padded[:3] == 9).all()
    with pytest.raises(ValueError, match="orig_w"):
        T.PadTransform(2, 3, 4, 5).inverse()


def test_list_of_transforms_and_its_inverse(image):
    tfms = T.TransformList(
        [T.ResizeTransform(30, 44, 60, 88), T.HFlipTransform(88), T.TransformList([T.VFlipTransform(60)])]
    )
    assert [type(t).__name__ for t in tfms.transforms] == [
        "ResizeTransform",
        "HFlipTransform",
        "VFlipTransform",
    ]
    box = tfms.apply_box(np.array([[1.0, 2.0, 11.0, 6.0]]))
    np.testing.assert_allclose(box, [[66, 48, 86, 56]])
    np.testing.assert_allclose(tfms.inverse().apply_box(box), [[1, 2, 11, 6]])
    assert tfms.apply_image(image).shape == (60, 88, 3)
