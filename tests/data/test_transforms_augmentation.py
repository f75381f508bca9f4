"""Augmentations: the machinery, sizes, ranges and distributions."""

import numpy as np
import pytest

from detlib.data import transforms as T
from detlib.data.transforms import augmentation_impl


@pytest.fixture(autouse=True)
def seed():
    np.random.seed(0)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (30, 44, 3), dtype=np.uint8)


def draw(aug, image, n=200):
    return [aug.get_transform(image) for _ in range(n)]


@pytest.mark.parametrize(
    "size, short, max_size, expected",
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((300, 1000), 800, 1333, (400, 1333)),
        ((1000, 300), 800, 1333, (1333, 400)),
        ((500, 500), 800, 1333, (800, 800)),
        ((400, 667), 800, 1333, (799, 1333)),  # would be 1334
        ((100, 101), 50, 10**9, (50, 51)),  # 50.5 is rounded up
        ((100, 103), 50, 10**9, (50, 52)),  # 51.5 as well, not to even
        ((3, 1000), 800, 1333, (4, 1333)),
        ((1, 6000), 800, 1333, (1, 1333)),  # 0.2 would be none
        ((6000, 2), 800, 1333, (1333, 1)),
        ((375, 500), 240, 1333, (240, 320)),
    ],
)
def test_shortest_edge_sizes(size, short, max_size, expected):
    assert T.ResizeShortestEdge.get_output_shape(*size, short, max_size) == expected
    tfm = T.ResizeShortestEdge(short, max_size, "choice").get_transform(np.zeros((*size, 3), dtype=np.uint8))
    assert (tfm.h, tfm.w, tfm.new_h, tfm.new_w) == (*size, *expected)


def test_shortest_edge_draws_from_range_or_choice(image):
    assert {t.new_h for t in draw(T.ResizeShortestEdge((10, 13)), image)} == {10, 11, 12, 13}
    assert {t.new_h for t in draw(T.ResizeShortestEdge((10, 13), sample_style="choice"), image)} == {10, 13}
    assert isinstance(T.ResizeShortestEdge(0).get_transform(image), T.NoOpTransform)
    with pytest.raises(ValueError, match="sample_style must be 'range' or 'choice', got 'all'"):
        T.ResizeShortestEdge(10, sample_style="all")
    with pytest.raises(ValueError, match="short_edge_length must be"):
        T.ResizeShortestEdge((1, 2, 3))


def test_flip(image):
    for kwargs, cls, axis in [
        ({}, T.HFlipTransform, 1),
        ({"horizontal": False, "vertical": True}, T.VFlipTransform, 0),
    ]:
        (tfm,) = {type(t) for t in draw(T.RandomFlip(1.0, **kwargs), image)}
        assert tfm is cls
        out, _ = T.apply_augmentations([T.RandomFlip(1.0, **kwargs)], image)
        np.testing.assert_array_equal(out, np.flip(image, axis))
    flips = sum(isinstance(t, T.HFlipTransform) for t in draw(T.RandomFlip(0.3), image, 2000))
    assert 0.25 < flips / 2000 < 0.35
    assert all(isinstance(t, T.NoOpTransform) for t in draw(T.RandomFlip(0.0), image))
    for both in (True, False):
        with pytest.raises(ValueError, match="exactly one"):
            T.RandomFlip(horizontal=both, vertical=both)


@pytest.mark.parametrize(
    "crop_type, crop_size, heights, widths",
    [
        ("relative", (0.5, 0.25), {15}, {11}),
        ("absolute", (20, 100), {20}, {44}),
        ("absolute_range", (20, 35), set(range(20, 31)), set(range(20, 36))),
        ("relative_range", (0.9, 0.9), {27, 28, 29, 30}, {40, 41, 42, 43, 44}),
    ],
)
def test_crop_sizes_and_places(image, crop_type, crop_size, heights, widths):
    crops = draw(T.RandomCrop(crop_type, crop_size), image, 600)
    assert {c.h for c in crops} == heights
    assert {c.w for c in crops} == widths
    for crop in crops:
        assert 0 <= crop.x0 <= 44 - crop.w and 0 <= crop.y0 <= 30 - crop.h
    assert max(c.y0 + c.h for c in crops) == 30  # the last place is among them


@pytest.mark.parametrize(
    "args, message",
    [
        (("half", (1, 1)), "crop_type must be one of"),
        (("relative", (1.5, 1)), r"in \(0, 1\]"),
        (("absolute_range", (5, 3)), "min, max"),
        (("absolute", (5,)), "two numbers"),
    ],
)
def test_crop_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        T.RandomCrop(*args)


def test_crop_with_area_constraint(image):
    sem_seg = np.zeros((30, 44), dtype=np.uint8)
    sem_seg[:, 22:] = 1
    aug = T.RandomCrop_CategoryAreaConstraint("absolute", (10, 10), 0.75)
    inputs = T.AugInput(image, sem_seg=sem_seg)
    fits = 0
    for _ in range(100):
        crop = aug.get_transform(inputs.image, inputs.sem_seg)
        share = sem_seg[crop.y0 : crop.y0 + 10, crop.x0 : crop.x0 + 10].mean()
        fits += 0.25 < share < 0.75
    assert fits > 70  # of plain crops, about 15 do
    aug(inputs)
    assert inputs.image.shape == (10, 10, 3) and inputs.sem_seg.shape == (10, 10)


def test_fixed_size_crop_pads_right_and_bottom(image):
    inputs = T.AugInput(image, sem_seg=image[:, :, 0].copy())
    tfm = T.FixedSizeCrop((40, 20))(inputs)
    x0 = tfm.transforms[0].x0
    np.testing.assert_array_equal(inputs.image[:30], image[:, x0 : x0 + 20])
    assert inputs.image.shape == (40, 20, 3)
    assert (inputs.image[30:] == 128).all() and (inputs.sem_seg[30:] == 255).all()
    assert T.apply_augmentations([T.FixedSizeCrop((40, 20), pad=False)], image)[0].shape == (30, 20, 3)


def test_resizes(image):
    assert T.apply_augmentations([T.Resize(17)], image)[0].shape == (17, 17, 3)
    assert T.apply_augmentations([T.Resize((5, 9))], image)[0].shape == (5, 9, 3)
    shapes = {(t.new_h, t.new_w) for t in draw(T.RandomResize([(5, 6), (7, 8)]), image)}
    assert shapes == {(5, 6), (7, 8)}
    for tfm in draw(T.ResizeScale(0.5, 2.0, 60, 60), image):  # 44 wide into 60: factor 0.68 to 2.73
        assert 30 <= tfm.new_w <= 120
        assert abs(tfm.new_h - 30 * tfm.new_w / 44) <= 1


def test_rotation(image):
    angles = [t.angle for t in draw(T.RandomRotation([-10, 20]), image)]
    assert -10 <= min(angles) < -5 and 15 < max(angles) <= 20
    assert {t.angle for t in draw(T.RandomRotation([5, 7], sample_style="choice"), image)} == {5, 7}
    centers = np.array([t.center for t in draw(T.RandomRotation(5, center=[[0.2, 0.4], [0.4, 0.5]]), image)])
    assert (centers >= [0.2 * 44, 0.4 * 30]).all() and (centers <= [0.4 * 44, 0.5 * 30]).all()
    (fixed,) = draw(T.RandomRotation(5, center=[0.25, 0.5]), image, 1)
    assert fixed.center == (11.0, 15.0)
    assert isinstance(T.RandomRotation(360).get_transform(image), T.NoOpTransform)


def test_extent(image):
    (tfm,) = draw(T.RandomExtent((1.0, 1.0), (0.0, 0.0)), image, 1)
    np.testing.assert_allclose(tfm.src_rect, (0, 0, 44, 30))
    np.testing.assert_array_equal(tfm.apply_image(image), image)
    for tfm in draw(T.RandomExtent((0.5, 2.0), (0.5, 0.5)), image):
        x0, y0, x1, y1 = tfm.src_rect
        assert 22 <= x1 - x0 <= 88 and (x1 - x0) / (y1 - y0) == pytest.approx(44 / 30)
        assert abs((x0 + x1) / 2 - 22) <= 11 and abs((y0 + y1) / 2 - 15) <= 7.5


def test_colors(image):
    w = 0.5
    as_float = image.astype(np.float64)
    gray = as_float @ [0.299, 0.587, 0.114]
    for aug, other in [
        (T.RandomContrast(w, w), image.mean()),
        (T.RandomBrightness(w, w), 0),
        (T.RandomSaturation(w, w), gray[:, :, None]),
    ]:
        out = T.apply_augmentations([aug], image)[0]
        expected = (as_float.astype(np.float32) * w + other * (1 - w)).clip(0, 255).astype(np.uint8)
        assert out.dtype == np.uint8
        assert np.abs(out.astype(int) - expected).max() <= 1
        np.testing.assert_array_equal(T.apply_augmentations([type(aug)(1, 1)], image)[0], image)
    bright = T.apply_augmentations([T.RandomBrightness(3, 3)], image)[0]
    np.testing.assert_array_equal(bright, (as_float * 3).clip(0, 255).astype(np.uint8))
    shift = T.RandomLighting(2.0).get_transform(image).src_image
    assert shift.shape == (3,) and np.abs(shift).max() > 0
    for aug in (T.RandomSaturation(1, 1), T.RandomLighting(1)):
        with pytest.raises(ValueError, match="RGB image"):
            aug.get_transform(image[:, :, 0])


def test_min_iou_crop(image):
    boxes = np.array([[5.0, 5.0, 25.0, 25.0], [30.0, 10.0, 40.0, 28.0]])
    aug = T.MinIoURandomCrop(min_ious=(0.3,), min_crop_size=0.3)
    aug.sample_mode = (0.3,)
    for _ in range(20):
        crop = aug.get_transform(image, boxes)
        if isinstance(crop, T.NoOpTransform):
            continue
        x0, y0, x1, y1 = crop.x0, crop.y0, crop.x0 + crop.w, crop.y0 + crop.h
        for bx0, by0, bx1, by1 in boxes:
            inter = max(0, min(x1, bx1) - max(x0, bx0)) * max(0, min(y1, by1) - max(y0, by0))
            assert inter / (crop.w * crop.h + (bx1 - bx0) * (by1 - by0) - inter) >= 0.3
    assert isinstance(T.MinIoURandomCrop().get_transform(image, None), T.NoOpTransform)


def test_random_apply(image):
    tfms = draw(T.RandomApply(T.HFlipTransform(44), 0.25), image, 1000)
    assert 0.2 < sum(isinstance(t, T.HFlipTransform) for t in tfms) / 1000 < 0.3
    inputs = T.AugInput(image)
    T.RandomApply(T.RandomFlip(1.0), 1.0)(inputs)
    np.testing.assert_array_equal(inputs.image, image[:, ::-1])
    with pytest.raises(ValueError, match="prob"):
        T.RandomApply(T.RandomFlip(), 2)


def test_same_seed_same_transforms(image):
    augs = [T.ResizeShortestEdge((10, 40)), T.RandomFlip(), T.RandomCrop("relative_range", (0.3, 0.3))]
    results = []
    for _ in range(2):
        np.random.seed(7)
        results.append([T.apply_augmentations(augs, image)[0] for _ in range(5)])
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)


def test_aug_input_moves_all_together(image):
    sem_seg = (image[:, :, 0] > 127).astype(np.uint8)
    inputs = T.AugInput(image, boxes=np.array([[1.0, 2, 11, 12]]), sem_seg=sem_seg)
    tfms = inputs.apply_augmentations([T.RandomFlip(1.0), T.Resize((60, 88))])
    assert len(tfms) == 2
    np.testing.assert_allclose(inputs.boxes, [[66, 4, 86, 24]])
    assert inputs.sem_seg.shape == (60, 88) and set(np.unique(inputs.sem_seg)) == {0, 1}
    np.testing.assert_allclose(tfms.apply_box(np.array([[1.0, 2, 11, 12]])), inputs.boxes)
    with pytest.raises(TypeError, match="numpy array, got list"):
        T.AugInput([[0]])
    with pytest.raises(ValueError, match="shape"):
        T.AugInput(np.zeros(3))


def test_augmentation_asks_for_its_inputs_by_name(image):
    class AroundBoxes(T.Augmentation):
        def __init__(self, margin=0):
            self._init(locals())

        def get_transform(self, image, boxes):
            x0, y0, x1, y1 = boxes[0].astype(int)
            return T.CropTransform(x0, y0, x1 - x0, y1 - y0)

    inputs = T.AugInput(image, boxes=np.array([[3.0, 4, 13, 24]]))
    AroundBoxes()(inputs)
    assert inputs.image.shape == (20, 10, 3)
    assert repr(AroundBoxes(3)) == "AroundBoxes(margin=3)" and repr(AroundBoxes()) == "AroundBoxes()"

    class NeedsDepth(T.Augmentation):
        def get_transform(self, image, depth):
            return T.NoOpTransform()

    with pytest.raises(AttributeError, match="'depth'"):
        NeedsDepth()(T.AugInput(image))

    class Variadic(T.Augmentation):
        def get_transform(self, *args):
            return T.NoOpTransform()

    with pytest.raises(TypeError, match="input_args"):
        Variadic()(T.AugInput(image))

    class ReturnsNothing(T.Augmentation):
        def get_transform(self, img):
            return None

    with pytest.raises(TypeError, match="must return a Transform, got NoneType"):
        ReturnsNothing()(T.AugInput(image))


def test_lists_take_transforms_and_augmentations(image):
    aug = T.AugmentationList([T.HFlipTransform(44), T.RandomFlip(1.0, horizontal=False, vertical=True)])
    inputs = T.AugInput(image)
    assert isinstance(aug(inputs), T.TransformList)
    np.testing.assert_array_equal(inputs.image, image[::-1, ::-1])
    assert "RandomFlip" in repr(aug) and "HFlipTransform" in repr(aug)
    with pytest.raises(TypeError, match="expected an Augmentation or a Transform, got str"):
        T.AugmentationList(["flip"])


def test_earlier_names():
    assert T.apply_transform_gens is T.apply_augmentations
    assert T.TransformGen is T.Augmentation and T.StandardAugInput is T.AugInput
    assert all(getattr(T, name) is getattr(augmentation_impl, name) for name in augmentation_impl.__all__)


@pytest.mark.parametrize("size", [(1, 6000), (6000, 1), (1, 1)])
def test_images_of_one_row_or_column_keep_it(size):
    image = np.zeros((*size, 3), dtype=np.uint8)
    for augmentation in (T.ResizeScale(0.1, 0.1, 60, 60), T.RandomCrop("relative", (0.3, 0.3))):
        height, width = augmentation.get_transform(image).apply_image(image).shape[:2]
        assert height >= 1 and width >= 1 and height <= max(size[0], 6) and width <= max(size[1], 6)
