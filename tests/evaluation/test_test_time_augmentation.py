"""Tests of test-time augmentation: views, merging and averaging, against a manual computation."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import batched_nms, box_iou

from detlib.data import MetadataCatalog
from detlib.data import transforms as T
from detlib.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA, build_model, detector_postprocess
from detlib.structures import Instances, RotatedBoxes
from tests.builders import FASTER_RCNN, MASK_RCNN, RPN, random_image, rotated_config, small_config

HEIGHT, WIDTH = 64, 96
SWAPPED = [0, 2, 1]
AUG = {"TEST__AUG__MIN_SIZES": (HEIGHT, 80), "TEST__AUG__FLIP": True, "TEST__DETECTIONS_PER_IMAGE": 12}
KEYPOINTS = {
    "MODEL__META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL__KEYPOINT_ON": True,
    "MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS": 3,
    "MODEL__ROI_KEYPOINT_HEAD__CONV_DIMS": (16,),
    "DATASETS__TEST": ("tta_keypoints",),
}
PANOPTIC = {
    "MODEL__META_ARCHITECTURE": "PanopticFPN",
    "MODEL__SEM_SEG_HEAD__NUM_CLASSES": 4,
    "MODEL__SEM_SEG_HEAD__CONVS_DIM": 32,
    "MODEL__PANOPTIC_FPN__COMBINE__STUFF_AREA_LIMIT": 10,
    "MODEL__PANOPTIC_FPN__COMBINE__INSTANCES_CONFIDENCE_THRESH": 0.0,
}
SEMANTIC = {"MODEL__META_ARCHITECTURE": "SemanticSegmentor"}
RETINANET = {
    "MODEL__META_ARCHITECTURE": "RetinaNet",
    "MODEL__BACKBONE__NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL__RESNETS__OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL__FPN__IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL__RETINANET__NUM_CLASSES": 3,
    "MODEL__RETINANET__NUM_CONVS": 1,
    "MODEL__RETINANET__SCORE_THRESH_TEST": 0.0,
    "MODEL__RETINANET__TOPK_CANDIDATES_TEST": 50,
}
CONFIGS = {
    "faster": lambda **kw: small_config(FASTER_RCNN, **kw),
    "mask": lambda **kw: small_config(MASK_RCNN, **kw),
    "keypoints": lambda **kw: small_config(MASK_RCNN, **KEYPOINTS | kw),
    "panoptic": lambda **kw: small_config(MASK_RCNN, **PANOPTIC | kw),
    "semantic": lambda **kw: small_config(MASK_RCNN, **PANOPTIC | SEMANTIC | kw),
    "retinanet": lambda **kw: small_config(FASTER_RCNN, **RETINANET | kw),
    "rotated": rotated_config,
}


@pytest.fixture(scope="module", autouse=True)
def keypoint_metadata():
    names = ["nose", "left", "right"]
    MetadataCatalog.get("tta_keypoints").set(keypoint_names=names, keypoint_flip_map=[("left", "right")])
    yield
    MetadataCatalog.remove("tta_keypoints")


def build(name, seed=0, **overrides):
    torch.manual_seed(seed)
    cfg = CONFIGS[name](**{**AUG, **overrides})
    model = build_model(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that predictions vary over the image
            if parameter.dim() > 1 and parameter.std() < 0.02:
                parameter.normal_(std=0.05)
    return cfg, model


def one_view(cfg):
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = (HEIGHT,), False
    return cfg


def item(**extra):
    return {"image": random_image(HEIGHT, WIDTH), **extra}


def same(actual, expected, atol=1e-4):
    """Assert that two model outputs are nearly equal."""
    assert actual.keys() == expected.keys()
    if "sem_seg" in actual:
        a, b = (x["sem_seg"].softmax(0) for x in (actual, expected))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)
    if "panoptic_seg" in actual:
        ids, wanted = (x["panoptic_seg"][0] for x in (actual, expected))
        assert (ids == wanted).float().mean() > 0.99
    if "instances" in actual:
        a, b = actual["instances"], expected["instances"]
        assert a.image_size == b.image_size and len(a) == len(b) > 0
        assert a.get_fields().keys() == b.get_fields().keys()
        for name, value in b.get_fields().items():
            mine = a.get(name)
            if name == "pred_masks":
                assert ((mine != value).sum((1, 2)) <= 0.01 * value.sum((1, 2)) + 2).all()
            elif name == "pred_boxes":
                torch.testing.assert_close(mine.tensor, value.tensor, rtol=1e-4, atol=1e-3)
            elif name != "pred_keypoint_heatmaps":
                torch.testing.assert_close(mine, value, rtol=1e-3, atol=1e-3)


def test_views_are_sizes_with_and_without_flip():
    mapper = DatasetMapperTTA([32, 64], 90, True)
    given = item(height=128, width=192, file_name="x")
    views = mapper(given)
    assert "transforms" not in given and all(view["file_name"] == "x" for view in views)
    sizes = [tuple(view["image"].shape) for view in views]
    assert sizes == [(3, 32, 48), (3, 32, 48), (3, 60, 90), (3, 60, 90)]
    box = np.array([[10.0, 20.0, 100.0, 128.0]])
    for view, (scale, width) in zip(views, [(32 / 128, 0), (32 / 128, 48), (60 / 128, 0), (60 / 128, 90)]):
        x0, y0, x1, y1 = scale * box[0]
        expected = [width - x1, y0, width - x0, y1] if width else [x0, y0, x1, y1]
        np.testing.assert_allclose(view["transforms"].apply_box(box)[0], expected)
        np.testing.assert_allclose(view["transforms"].inverse().apply_box(np.array([expected])), box)
    assert torch.equal(views[1]["image"], views[0]["image"].flip(2))
    assert len(DatasetMapperTTA(small_config(TEST__AUG__FLIP=False))(given)) == 9
    with pytest.raises(ValueError, match=r"TEST.AUG.MIN_SIZES.* got \[\]"):
        DatasetMapperTTA([], 100, True)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_view_of_the_original_size_equals_the_model(name):
    # Boxes are clipped before they are merged, so that NMS may drop more; here it drops none.
    cfg, model = build(name, MODEL__RETINANET__NMS_THRESH_TEST=1.0)
    tta = GeneralizedRCNNWithTTA(one_view(cfg), model)
    inputs = [item(height=128, width=192), {"image": random_image(HEIGHT, WIDTH, seed=1)}]
    if name == "keypoints":  # keypoints are searched on the pixels of the output frame, not of the view
        del inputs[0]
    with torch.no_grad():
        expected = [model([x])[0] for x in inputs]
    for a, b in zip(tta(inputs), expected, strict=True):
        same(a, b)


def mirrored(output):
    """Return the output for the mirrored image."""
    out = dict(output)
    if "sem_seg" in out:
        out["sem_seg"] = out["sem_seg"].flip(2)
    if "panoptic_seg" in out:
        out["panoptic_seg"] = (out["panoptic_seg"][0].flip(1), out["panoptic_seg"][1])
    if "instances" in out:
        x = copy.deepcopy(out["instances"])
        width, boxes = x.image_size[1], x.pred_boxes.tensor
        if isinstance(x.pred_boxes, RotatedBoxes):
            boxes[:, 0], boxes[:, 4] = width - boxes[:, 0], -boxes[:, 4]
        else:
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        if x.has("pred_masks"):
            x.pred_masks = x.pred_masks.flip(2)
        if x.has("pred_keypoints"):
            x.pred_keypoints = x.pred_keypoints[:, SWAPPED]
            x.pred_keypoints[:, :, 0] = width - x.pred_keypoints[:, :, 0]
        out["instances"] = x
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_flipped_image_gives_flipped_results(name):
    """Models are not symmetric, but the set of views is."""
    cfg, model = build(name)
    cfg.TEST.AUG.MIN_SIZES = (HEIGHT,)
    tta = GeneralizedRCNNWithTTA(cfg, model)
    other = random_image(HEIGHT, WIDTH).flip(2)
    same(tta([{"image": other}])[0], mirrored(tta([item()])[0]))
    with torch.no_grad(), pytest.raises(AssertionError):
        same(model([{"image": other}])[0], mirrored(model([item()])[0]))


def voted(boxes, scores, classes, keep):
    """Return each kept box averaged with the boxes of its class that overlap it."""
    out = []
    for i in keep:
        total, weights = 0, 0
        for box, score, label in zip(boxes, scores, classes):
            if label == classes[i] and box_iou(box[None], boxes[i][None]) >= 0.7:
                total, weights = total + score * box, weights + score
        out.append(total / weights)
    return torch.stack(out)


@pytest.mark.parametrize("box_voting", [False, True])
def test_merged_boxes_and_masks_equal_manual_merging(box_voting):
    cfg, model = build("mask")
    tta = GeneralizedRCNNWithTTA(cfg, model, box_voting=box_voting)
    got = tta([item(height=128, width=192)])[0]["instances"]
    views = tta.tta_mapper(item(height=128, width=192))
    boxes, scores, classes = [], [], []
    with torch.no_grad():
        for i, view in enumerate(views):
            size = view["image"].shape[1:]
            found = model([{"image": view["image"]}])[0]["instances"]
            box = found.pred_boxes.tensor.clone()
            if i % 2:
                box[:, [0, 2]] = size[1] - box[:, [2, 0]]
            boxes.append(box * 128 / size[0])
            scores.append(found.scores)
            classes.append(found.pred_classes)
        boxes, scores, classes = map(torch.cat, (boxes, scores, classes))
        keep = batched_nms(boxes, scores, classes, cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST)[:12]
        assert 12 == len(got) < len(scores)
        torch.testing.assert_close(got.scores, scores[keep])
        kept = boxes[keep]
        if box_voting:
            kept = voted(boxes, scores, classes, keep)
            assert (kept - boxes[keep]).abs().max() > 1
        torch.testing.assert_close(got.pred_boxes.tensor, kept, rtol=1e-4, atol=1e-2)
        masks = 0
        for i, view in enumerate(views):
            size = tuple(view["image"].shape[1:])
            box = kept * size[0] / 128
            if i % 2:
                box[:, [0, 2]] = size[1] - box[:, [2, 0]]
            given = Instances(size, pred_boxes=type(found.pred_boxes)(box), pred_classes=classes[keep])
            (one,) = model.inference([{"image": view["image"]}], [given], do_postprocess=False)
            masks = masks + (one.pred_masks.flip(3) if i % 2 else one.pred_masks) / len(views)
    merged = Instances((128, 192), pred_boxes=type(found.pred_boxes)(kept), pred_masks=masks)
    want = detector_postprocess(merged, 128, 192).pred_masks
    assert want.any() and (got.pred_masks != want).sum() <= 0.001 * want.sum() + 2
    assert model.roi_heads.mask_on


def test_semantic_maps_equal_manual_averaging():
    cfg, model = build("semantic")
    tta = GeneralizedRCNNWithTTA(cfg, model)
    got = tta([item(height=32, width=48)])[0]["sem_seg"]
    views, total = tta.tta_mapper(item(height=32, width=48)), 0
    with torch.no_grad():
        for i, view in enumerate(views):
            logits = model([{"image": view["image"], "height": 32, "width": 48}])[0]["sem_seg"]
            total = total + (logits.flip(2) if i % 2 else logits).softmax(0) / 4
    torch.testing.assert_close(got.softmax(0), total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.exp().sum(0), torch.ones(32, 48))


def test_batches_have_views_of_one_size():
    cfg, model = build("faster")
    shapes = []
    model.backbone.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    sizes = {"TEST": {"AUG": {"MIN_SIZES": (64, 96)}}}
    cfg.TEST.AUG.MIN_SIZES = sizes["TEST"]["AUG"]["MIN_SIZES"]
    results = [GeneralizedRCNNWithTTA(cfg, model, batch_size=n)([item()])[0] for n in (1, 3)]
    assert shapes == [(1, 3, 64, 96)] * 2 + [(1, 3, 96, 160)] * 2 + [(2, 3, 64, 96), (2, 3, 96, 160)]
    same(*results)


def test_views_are_generated_from_the_original_image(tmp_path):
    cfg, model = build("faster")
    tta = GeneralizedRCNNWithTTA(one_view(cfg), model)
    array = random_image(128, 192).permute(1, 2, 0).numpy()
    Image.fromarray(array[:, :, ::-1].copy()).save(tmp_path / "a.png")  # the model takes BGR
    want = tta([{"image": random_image(128, 192)}])[0]
    frame = {"height": 128, "width": 192}
    small = random_image(HEIGHT, WIDTH, seed=5)
    name = {"file_name": str(tmp_path / "a.png")}
    same(tta([{**frame, **name}])[0], want)
    same(tta([name])[0], want)
    same(tta([{"image": small, **frame, **name}])[0], want)
    # An image is kept if its file does not exist, or if it is not uint8 like the file.
    given = tta([{"image": small, **frame}])[0]
    same(tta([{"image": small, **frame, "file_name": "/no/such.png"}])[0], given)
    same(tta([{"image": small.float(), **frame, **name}])[0], given)
    with pytest.raises(ValueError, match=r"needs 'image' or 'file_name', got only \['height'\]"):
        tta([{"height": 4}])


def test_given_proposals_are_transformed_to_the_views():
    cfg, model = build("faster")
    proposals = model.inference([item()], do_postprocess=False)[0].pred_boxes
    given = Instances(
        (HEIGHT, WIDTH), proposal_boxes=proposals, objectness_logits=torch.zeros(len(proposals))
    )
    model.proposal_generator = None
    cfg.TEST.AUG.MIN_SIZES = (HEIGHT,)
    tta = GeneralizedRCNNWithTTA(cfg, model)
    boxes = proposals.clone().tensor
    boxes[:, [0, 2]] = WIDTH - boxes[:, [2, 0]]
    other = Instances((HEIGHT, WIDTH), proposal_boxes=type(proposals)(boxes))
    other.objectness_logits = given.objectness_logits
    got = tta([item(proposals=given)])[0]
    same(tta([{"image": random_image(HEIGHT, WIDTH).flip(2), "proposals": other}])[0], mirrored(got))


def test_custom_mapper_is_used():
    def turned(angle, input_dict):
        image = input_dict["image"].permute(1, 2, 0).numpy()
        transform = T.TransformList([T.RotationTransform(*image.shape[:2], angle)])
        image = transform.apply_image(image).transpose(2, 0, 1)
        return [{**input_dict, "image": torch.from_numpy(image.copy()), "transforms": transform}]

    cfg, model = build("faster")
    instances = GeneralizedRCNNWithTTA(cfg, model, lambda x: turned(90, x))([item()])[0]["instances"]
    assert instances.image_size == (HEIGHT, WIDTH) and len(instances)
    cfg, model = build("mask")
    with pytest.raises(ValueError, match="made one with a RotationTransform"):
        GeneralizedRCNNWithTTA(cfg, model, lambda x: turned(90, x))([item()])


def test_unsupported_model_and_wrong_arguments_raise():
    cfg = small_config(RPN)
    with pytest.raises(TypeError, match="does not support ProposalNetwork; .* RetinaNet, Semantic"):
        GeneralizedRCNNWithTTA(cfg, build_model(cfg))
    cfg, model = build("keypoints", DATASETS__TEST=(), DATASETS__TRAIN=())
    with pytest.raises(ValueError, match="TEST.AUG.FLIP = False"):
        GeneralizedRCNNWithTTA(cfg, model)([item()])
    assert GeneralizedRCNNWithTTA(one_view(cfg), model)([item()])[0]["instances"].has("pred_keypoints")
    with pytest.raises(ValueError, match="call eval"):
        GeneralizedRCNNWithTTA(cfg, model).train()([item()])
    with pytest.raises(ValueError, match="batch_size"):
        GeneralizedRCNNWithTTA(cfg, model, batch_size=0)


def test_views_without_detections_give_empty_results():
    cfg, model = build("mask", MODEL__ROI_HEADS__SCORE_THRESH_TEST=1.0)
    instances = GeneralizedRCNNWithTTA(cfg, model)([item()])[0]["instances"]
    assert len(instances) == 0 and instances.pred_masks.shape == (0, HEIGHT, WIDTH)
