"""Reading images, transforming annotations, Instances, and the tools that read a config."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

from detlib.config import get_cfg
from detlib.data import MetadataCatalog
from detlib.data import detection_utils as utils
from detlib.data import transforms as T
from detlib.data.image_io import read_image_size
from detlib.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture
def metadata():
    """Register metadata under names that are removed afterwards."""
    names = []

    def make(name, **kwargs):
        names.append(name)
        return MetadataCatalog.get(name).set(**kwargs)

    yield make
    for name in names:
        MetadataCatalog.remove(name)


def save(path, array, **kwargs):
    Image.fromarray(array).save(path, **kwargs)
    return str(path)


def test_read_image_formats(tmp_path, rgb):
    path = save(tmp_path / "a.png", rgb)
    np.testing.assert_array_equal(utils.read_image(path, "RGB"), rgb)
    np.testing.assert_array_equal(utils.read_image(path), rgb)
    np.testing.assert_array_equal(utils.read_image(path, "BGR"), rgb[:, :, ::-1])
    gray = utils.read_image(path, "L")
    assert gray.shape == (20, 30, 1)
    np.testing.assert_array_equal(gray[:, :, 0], np.asarray(Image.fromarray(rgb).convert("L")))
    yuv = utils.read_image(path, "YUV-BT.601")
    scaled = rgb / 255.0
    luma = 0.299 * scaled[..., 0] + 0.587 * scaled[..., 1] + 0.114 * scaled[..., 2]
    np.testing.assert_allclose(yuv[..., 0], luma)
    np.testing.assert_allclose(yuv[..., 1], 0.492 * (scaled[..., 2] - luma), atol=1e-3)
    np.testing.assert_allclose(yuv[..., 2], 0.877 * (scaled[..., 0] - luma), atol=1e-3)
    assert utils.read_image(save(tmp_path / "g.png", rgb[:, :, 0]), "BGR").shape == (20, 30, 3)
    with pytest.raises(ValueError, match="a.png.*'XYZ'"):
        utils.read_image(path, "XYZ")


def test_convert_image_to_rgb_is_the_way_back(rgb):
    image = Image.fromarray(rgb)
    for fmt, tolerance in [("RGB", 0), ("BGR", 0), ("YUV-BT.601", 0.02), ("HSV", 12), ("YCbCr", 4)]:
        back = utils.convert_image_to_rgb(utils.convert_PIL_to_numpy(image, fmt), fmt)
        assert np.abs(back.astype(float) - rgb).max() <= tolerance, fmt
    gray = utils.convert_image_to_rgb(torch.from_numpy(rgb[:, :, :1].copy()), "L")
    np.testing.assert_array_equal(gray, np.repeat(rgb[:, :, :1], 3, axis=2))


@pytest.mark.parametrize(
    "orientation, rotated_back",
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_read_image_turns_by_exif(tmp_path, rgb, orientation, rotated_back):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "turned.png", rgb, exif=exif)
    np.testing.assert_array_equal(utils.read_image(path, "RGB"), rotated_back(rgb))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_size_in_the_header_is_that_of_the_upright_image(tmp_path, rgb, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / f"a.{suffix}")
    Image.fromarray(rgb).save(path, exif=exif)
    height, width = utils.read_image(path, "RGB").shape[:2]
    assert read_image_size(path) == (width, height)
    assert (width, height) == (rgb.shape[1::-1] if orientation < 5 else rgb.shape[:2])


@pytest.mark.parametrize("decoder", ["pil", "opencv"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_become_the_upper_8(tmp_path, suffix, decoder):
    values = np.array([[0, 255, 256], [4095, 30000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    image = utils.read_image(str(tmp_path / f"a.{suffix}"), "RGB", decoder)
    assert image.tolist() == [[[v] * 3 for v in row] for row in ([0, 0, 1], [15, 117, 255])]


@pytest.mark.parametrize("decoder", ["pil", "opencv"])
def test_float_tiff_in_0_to_1_is_scaled_to_8_bits(tmp_path, decoder):
    path = str(tmp_path / "a.tif")
    Image.fromarray(np.array([[0, 0.2, 0.5, 1]], dtype=np.float32)).save(path)
    assert utils.read_image(path, "RGB", decoder).tolist() == [[[v] * 3 for v in (0, 51, 128, 255)]]
    Image.fromarray(np.array([[0, 1, 2, 200]], dtype=np.float32)).save(path)
    assert utils.read_image(path, "RGB", decoder).tolist() == [[[v] * 3 for v in (0, 1, 2, 200)]]


@pytest.mark.parametrize("values", [[[0, 70000]], [[-1, 5]], [[0.5, 300.0]]])
def test_values_that_8_bits_cannot_hold_are_refused(tmp_path, values):
    array = np.array(values)
    path = str(tmp_path / "a.tif")
    Image.fromarray(array.astype(np.int32 if array.dtype.kind == "i" else np.float32)).save(path)
    with pytest.raises(ValueError, match="a.tif cannot be converted to format 'RGB': its values"):
        utils.read_image(path, "RGB")


def test_label_maps_of_any_mode(tmp_path):
    """Indices of a palette are labels, not the brightness of its colors."""
    labels = np.array([[0, 1, 2], [1, 0, 255]], dtype=np.uint8)
    with_palette = Image.fromarray(labels).convert("P")
    with_palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [9] * 759)
    gray = Image.fromarray(labels)
    images = {"L": gray, "P": with_palette, "I;16": Image.fromarray(labels.astype(np.uint16))}
    images |= {mode: gray.convert(mode) for mode in ("RGB", "RGBA", "LA")}
    for mode, image in images.items():
        image.save(tmp_path / "a.png")
        assert Image.open(tmp_path / "a.png").mode == mode
        read = utils.read_label_map(str(tmp_path / "a.png"))
        assert read.dtype == np.uint8 and read.tolist() == labels.tolist(), mode
    Image.fromarray(labels == 1).save(tmp_path / "a.png")
    assert utils.read_label_map(str(tmp_path / "a.png")).tolist() == [[0, 1, 0], [1, 0, 0]]
    Image.fromarray(labels.astype(np.uint16) * 10).save(tmp_path / "a.png")
    assert utils.read_label_map(str(tmp_path / "a.png")).tolist() == [[0, 10, 20], [10, 0, 2550]]
    with_palette.convert("RGB").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="label map .*a.png is a color image"):
        utils.read_label_map(str(tmp_path / "a.png"))


def test_broken_exif_does_not_spoil_a_image(tmp_path, rgb):
    path = save(tmp_path / "a.png", rgb, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\xff\x01\x12")
    np.testing.assert_array_equal(utils.read_image(path, "RGB"), rgb)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_broken_image_is_named(tmp_path, rgb, suffix):
    whole = tmp_path / f"whole.{suffix}"
    save(whole, rgb)
    data = whole.read_bytes()
    for name, content in [("cut", data[: len(data) // 2]), ("empty", b""), ("text", b"not an image")]:
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(content)
        with pytest.raises(utils.ImageReadError, match=f"{name}.{suffix}"):
            utils.read_image(str(path), "BGR")
    with pytest.raises(FileNotFoundError, match="nowhere.jpg"):
        utils.read_image(str(tmp_path / "nowhere.jpg"), "BGR")


def test_check_image_size(rgb):
    record = {"file_name": "x.jpg", "image_id": 7}
    utils.check_image_size(record, rgb)
    assert (record["height"], record["width"]) == (20, 30)
    with pytest.raises(
        utils.SizeMismatchError,
        match="image 7 .file x.jpg. has width 30 and height 20.*width 31 and height 20",
    ):
        utils.check_image_size({"file_name": "x.jpg", "image_id": 7, "height": 20, "width": 31}, rgb)
    with pytest.raises(utils.SizeMismatchError, match="swapped"):
        utils.check_image_size({"height": 30, "width": 20}, rgb)


def make_annotation(**kwargs):
    return {"bbox": [2, 4, 10, 8], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, **kwargs}


def test_boxes_are_moved_and_clipped():
    tfm = T.TransformList([T.CropTransform(4, 6, 6, 20), T.ResizeTransform(20, 6, 40, 6)])
    anno = utils.transform_instance_annotations(make_annotation(), tfm, (40, 6))
    np.testing.assert_allclose(anno["bbox"], [0, 0, 6, 12])
    assert anno["bbox_mode"] == BoxMode.XYXY_ABS
    as_list = utils.transform_instance_annotations(make_annotation(), [T.HFlipTransform(30)], (20, 30))
    np.testing.assert_allclose(as_list["bbox"], [18, 4, 28, 12])


def test_polygons_are_moved_and_the_input_stays():
    polygon = np.array([2.0, 4, 12, 4, 12, 12])
    anno = make_annotation(segmentation=[polygon, [1, 1, 2, 1, 2, 2]])
    out = utils.transform_instance_annotations(anno, T.HFlipTransform(30), (20, 30))
    np.testing.assert_allclose(out["segmentation"][0], [28, 4, 18, 4, 18, 12])
    np.testing.assert_allclose(out["segmentation"][1], [29, 1, 28, 1, 28, 2])
    np.testing.assert_array_equal(polygon, [2, 4, 12, 4, 12, 12])
    with pytest.raises(TypeError, match="segmentation of type int"):
        utils.transform_instance_annotations(make_annotation(segmentation=3), T.NoOpTransform(), (20, 30))


@pytest.mark.parametrize("compressed", [True, False])
def test_rle_masks_are_moved(compressed):
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[3:9, 5:17] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    if not compressed:
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(np.r_[0, flat, 1 - flat[-1]]))
        rle = {"size": [20, 30], "counts": np.diff(np.r_[0, edges]).tolist()}
    out = utils.transform_instance_annotations(
        make_annotation(segmentation=rle), T.HFlipTransform(30), (20, 30)
    )
    np.testing.assert_array_equal(out["segmentation"], mask[:, ::-1])
    with pytest.raises(ValueError, match=r"\(20, 30\).*\(40, 30\)"):
        utils.transform_instance_annotations(make_annotation(segmentation=rle), T.NoOpTransform(), (40, 30))


def test_keypoints_are_moved_swapped_and_dropped():
    keypoints = [2, 4, 2, 10, 5, 1, 29, 19, 2, 6, 6, 0]
    flip = T.TransformList([T.HFlipTransform(30), T.CropTransform(5, 0, 25, 20)])
    swap = [1, 0, 2, 3]
    out = utils.transform_keypoint_annotations(keypoints, flip, (20, 25), swap)
    # x -> 30 - x - 5; the third leaves on the left, the fourth was not labeled.
    np.testing.assert_allclose(out, [[15, 5, 1], [23, 4, 2], [0, 0, 0], [0, 0, 0]])
    twice = T.TransformList([T.HFlipTransform(30), T.HFlipTransform(30)])
    np.testing.assert_allclose(utils.transform_keypoint_annotations(keypoints, twice, (20, 30))[0], [2, 4, 2])
    with pytest.raises(ValueError, match="without keypoint_hflip_indices"):
        utils.transform_keypoint_annotations(keypoints, flip, (20, 25))
    with pytest.raises(ValueError, match="has 4 keypoints.*has 3"):
        utils.transform_keypoint_annotations(keypoints, flip, (20, 25), [0, 1, 2])


def test_proposals():
    record = {
        "proposal_boxes": np.array([[0.0, 0, 10, 10], [20, 0, 40, 10], [3, 3, 3, 9], [1, 1, 5, 5]]),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
        "proposal_objectness_logits": np.array([4.0, 3, 2, 1]),
    }
    utils.transform_proposals(record, (20, 30), T.HFlipTransform(30), proposal_topk=3)
    assert set(record) == {"proposals"}
    np.testing.assert_allclose(
        record["proposals"].proposal_boxes.tensor, [[20, 0, 30, 10], [0, 0, 10, 10], [25, 1, 29, 5]]
    )
    assert record["proposals"].objectness_logits.tolist() == [4, 3, 1]
    few = {"file_name": "x"}
    utils.transform_proposals(few, (20, 30), T.NoOpTransform(), proposal_topk=3)
    assert few == {"file_name": "x"}


def test_annotations_to_instances():
    square = [2.0, 4, 12, 4, 12, 12, 2, 12]
    annos = [make_annotation(segmentation=[square], keypoints=[1, 2, 2]), make_annotation(category_id=0)]
    annos[1].update(segmentation=[[0.0, 0, 6, 0, 6, 5, 0, 5]], keypoints=np.zeros((1, 3)))
    for mask_format, cls in [("polygon", PolygonMasks), ("bitmask", BitMasks)]:
        inst = utils.annotations_to_instances(annos, (20, 30), mask_format)
        assert inst.image_size == (20, 30)
        assert inst.gt_boxes.tensor.tolist() == [[2, 4, 12, 12], [2, 4, 12, 12]]
        assert inst.gt_classes.tolist() == [1, 0] and inst.gt_classes.dtype == torch.int64
        assert isinstance(inst.gt_masks, cls)
        assert inst.gt_masks.get_bounding_boxes().tensor.tolist() == [[2, 4, 12, 12], [0, 0, 6, 5]]
        assert inst.gt_keypoints.tensor.tolist() == [[[1, 2, 2]], [[0, 0, 0]]]
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[1:3, 4:9] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    bits = utils.annotations_to_instances(
        [make_annotation(segmentation=mask), make_annotation(segmentation=rle)], (20, 30), "bitmask"
    )
    for got in bits.gt_masks.tensor.numpy():
        np.testing.assert_array_equal(got, mask.astype(bool))
    empty = utils.annotations_to_instances([], (20, 30))
    assert empty.gt_boxes.tensor.shape == (0, 4) and len(empty) == 0 and not empty.has("gt_masks")


def test_image_with_an_rle_mask_gets_bitmasks_for_all_objects():
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[1:3, 4:9] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    square = [[2.0, 4.0, 12.0, 4.0, 12.0, 12.0, 2.0, 12.0]]
    annotations = [make_annotation(segmentation=square), make_annotation(segmentation=rle)]
    masks = utils.annotations_to_instances(annotations, (20, 30), "polygon").gt_masks
    assert isinstance(masks, BitMasks)
    expected = np.zeros((20, 30), dtype=bool)
    expected[4:12, 2:12] = True
    np.testing.assert_array_equal(masks.tensor.numpy(), [expected, mask.astype(bool)])


def test_annotations_to_instances_refuses():
    mask = np.ones((20, 30), dtype=np.uint8)
    with pytest.raises(ValueError, match="'polygon' or 'bitmask', got 'rle'"):
        utils.annotations_to_instances([make_annotation(segmentation=mask)], (20, 30), "rle")
    mixed = [make_annotation(segmentation=mask), make_annotation()]
    with pytest.raises(ValueError, match="'segmentation' is missing in instance 1"):
        utils.annotations_to_instances(mixed, (20, 30), "bitmask")
    uneven = [make_annotation(keypoints=np.zeros((count, 3))) for count in (2, 3)]
    with pytest.raises(ValueError, match=r"instances have \[2, 3\] keypoints; all must have the same number"):
        utils.annotations_to_instances(uneven, (20, 30))


def test_filter_empty_instances():
    inst = Instances((20, 30))
    inst.gt_boxes = Boxes(torch.tensor([[0.0, 0, 5, 5], [3, 3, 3, 9], [1, 1, 4, 4]]))
    inst.gt_classes = torch.tensor([0, 1, 2])
    inst.gt_masks = PolygonMasks([[np.array([0.0, 0, 5, 0, 5, 5])], [np.array([0.0, 0, 5, 0, 5, 5])], []])
    assert utils.filter_empty_instances(inst).gt_classes.tolist() == [0]
    assert utils.filter_empty_instances(inst, by_mask=False).gt_classes.tolist() == [0, 2]
    kept, keep = utils.filter_empty_instances(inst, by_box=False, return_mask=True)
    assert kept.gt_classes.tolist() == [0, 1] and keep.tolist() == [True, True, False]
    assert utils.filter_empty_instances(inst, by_mask=False, box_threshold=3.5).gt_classes.tolist() == [0]
    with pytest.raises(ValueError, match="by_box and by_mask"):
        utils.filter_empty_instances(inst, by_box=False, by_mask=False)


def test_metadata_tools(metadata):
    metadata("utils_a", keypoint_names=["nose", "left", "right"], keypoint_flip_map=[("left", "right")])
    metadata("utils_b", keypoint_names=["nose", "left"], keypoint_flip_map=[])
    assert utils.create_keypoint_hflip_indices("utils_a") == [0, 2, 1]
    with pytest.raises(ValueError, match="'keypoint_names'.*'utils_a'.*'utils_b'"):
        utils.create_keypoint_hflip_indices(["utils_a", "utils_b"])
    metadata("utils_lvis", class_image_count=[{"id": 2, "image_count": 9}, {"id": 1, "image_count": 4}])
    torch.testing.assert_close(utils.get_fed_loss_cls_weights("utils_lvis", 0.5), torch.tensor([2.0, 3.0]))


def test_crop_around_an_instance_contains_its_center():
    np.random.seed(0)
    anno = make_annotation()  # center (7, 8)
    for _ in range(200):
        crop = utils.gen_crop_transform_with_instance((6, 5), (20, 30), anno)
        assert crop.x0 <= 7 <= crop.x0 + 5 and crop.y0 <= 8 <= crop.y0 + 6
        assert 0 <= crop.x0 <= 25 and 0 <= crop.y0 <= 14 and (crop.h, crop.w) == (6, 5)
    with pytest.raises(ValueError, match="crop_size"):
        utils.gen_crop_transform_with_instance((25, 5), (20, 30), anno)
    with pytest.raises(ValueError, match="outside"):
        utils.gen_crop_transform_with_instance((5, 5), (6, 6), anno)


def test_build_augmentation():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (640, 800)
    resize, flip = utils.build_augmentation(cfg, True)
    assert resize.short_edge_length == (640, 800) and resize.max_size == 1333 and not resize.is_range
    assert flip.horizontal and not flip.vertical
    (test_resize,) = utils.build_augmentation(cfg, False)
    assert test_resize.short_edge_length == (800, 800)
    cfg.INPUT.RANDOM_FLIP = "vertical"
    assert utils.build_augmentation(cfg, True)[1].vertical
    cfg.INPUT.RANDOM_FLIP = "none"
    assert len(utils.build_transform_gen(cfg, True)) == 1
    cfg.INPUT.RANDOM_FLIP = "left"
    with pytest.raises(ValueError, match="INPUT.RANDOM_FLIP.*'left'"):
        utils.build_augmentation(cfg, True)
