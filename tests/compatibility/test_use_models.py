"""Documented use of models: the example programs, and every key of the inputs and outputs."""

import pickle

import pytest
import torch

from detlib.checkpoint import DetectionCheckpointer
from detlib.data import (
    DatasetCatalog,
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detlib.engine import DefaultPredictor
from detlib.modeling import build_backbone, build_model, build_proposal_generator, build_roi_heads
from detlib.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY, MaskRCNNConvUpsampleHead
from detlib.structures import BitMasks, Boxes, ImageList, Instances, Keypoints, PolygonMasks
from detlib.utils.events import EventStorage
from tests.builders import (
    FAST_RCNN,
    FASTER_RCNN,
    MASK_RCNN,
    NUM_CLASSES,
    RPN,
    random_image,
    small_config,
    training_batch,
)

HEIGHT, WIDTH = 64, 96
KEYPOINT_RCNN = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"
SEMANTIC = "Misc/semantic_R_50_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
NUM_KEYPOINTS, NUM_STUFF = 5, 7
SMALL = {
    KEYPOINT_RCNN: {
        "MODEL__ROI_KEYPOINT_HEAD__CONV_DIMS": (16,),
        "MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS": NUM_KEYPOINTS,
    },
    SEMANTIC: {"MODEL__SEM_SEG_HEAD__CONVS_DIM": 32, "MODEL__SEM_SEG_HEAD__NUM_CLASSES": NUM_STUFF},
    # Low thresholds, so that an untrained model predicts segments.
    PANOPTIC: {
        "MODEL__SEM_SEG_HEAD__CONVS_DIM": 32,
        "MODEL__SEM_SEG_HEAD__NUM_CLASSES": NUM_STUFF,
        "MODEL__PANOPTIC_FPN__COMBINE__INSTANCES_CONFIDENCE_THRESH": 0.2,
        "MODEL__PANOPTIC_FPN__COMBINE__STUFF_AREA_LIMIT": 10,
    },
}


def built(name: str = MASK_RCNN, **overrides) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(small_config(name, **{**SMALL.get(name, {}), **overrides}))


@pytest.fixture(scope="module")
def mask_rcnn() -> torch.nn.Module:
    return built().eval()


# Building


def test_build_functions_return_the_parts_of_a_model():
    cfg = small_config()
    model = build_model(cfg)
    assert isinstance(model, torch.nn.Module)
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    proposal_generator = build_proposal_generator(cfg, shapes)
    roi_heads = build_roi_heads(cfg, shapes)
    for name, part in (
        ("backbone", backbone),
        ("proposal_generator", proposal_generator),
        ("roi_heads", roi_heads),
    ):
        assert type(part) is type(getattr(model, name))
        assert part.state_dict().keys() == getattr(model, name).state_dict().keys()


def test_built_model_has_random_weights():
    first, second = build_model(small_config()), build_model(small_config())
    assert not torch.equal(first.roi_heads.box_head.fc1.weight, second.roi_heads.box_head.fc1.weight)


# Loading and saving


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_checkpoints_are_saved_and_loaded(tmp_path):
    model, other = built(), build_model(small_config())
    checkpointer = DetectionCheckpointer(model, save_dir=str(tmp_path))
    checkpointer.save("model_999")
    assert not same_weights(model, other)
    DetectionCheckpointer(other).load(str(tmp_path / "model_999.pth"))
    assert same_weights(model, other)


def test_checkpoint_files_can_be_read_and_written_with_torch_and_pickle(tmp_path):
    model = built(FASTER_RCNN)
    DetectionCheckpointer(model, save_dir=str(tmp_path)).save("model")
    content = torch.load(tmp_path / "model.pth")
    assert content["model"].keys() == model.state_dict().keys()

    content["model"]["roi_heads.box_predictor.cls_score.bias"] += 1
    torch.save(content, tmp_path / "changed.pth")
    other = build_model(small_config(FASTER_RCNN))
    DetectionCheckpointer(other).load(str(tmp_path / "changed.pth"))
    assert other.roi_heads.box_predictor.cls_score.bias.tolist() == [1.0] * (NUM_CLASSES + 1)

    # Model-zoo files are pickles of numpy arrays.
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    with open(tmp_path / "zoo.pkl", "wb") as f:
        pickle.dump({"model": arrays, "__author__": "detlib"}, f)
    with open(tmp_path / "zoo.pkl", "rb") as f:
        assert pickle.load(f)["model"].keys() == arrays.keys()
    DetectionCheckpointer(other).load(str(tmp_path / "zoo.pkl"))
    assert same_weights(model, other)


# Calling


def test_training_returns_losses_and_stores_statistics():
    model = built()
    with EventStorage() as storage:
        losses = model(training_batch())
    assert isinstance(losses, dict) and losses
    for name, loss in losses.items():
        assert isinstance(name, str) and isinstance(loss, torch.Tensor)
        assert loss.dim() == 0 and loss.requires_grad and loss.isfinite()
    assert "fast_rcnn/cls_accuracy" in storage.latest()


def test_default_predictor_returns_the_outputs_of_the_model(tmp_path):
    model = built(MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.01)
    DetectionCheckpointer(model, save_dir=str(tmp_path)).save("model")
    cfg = small_config(
        MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.01,
        MODEL__WEIGHTS=str(tmp_path / "model.pth"),
        INPUT__MIN_SIZE_TEST=HEIGHT,
    )
    image = random_image().permute(1, 2, 0).numpy()
    outputs = DefaultPredictor(cfg)(image)
    with torch.no_grad():
        (expected,) = model.eval()([{"image": random_image(), "height": HEIGHT, "width": WIDTH}])
    check_instances(outputs["instances"], (HEIGHT, WIDTH), with_masks=True)
    assert torch.equal(outputs["instances"].pred_boxes.tensor, expected["instances"].pred_boxes.tensor)
    # A larger image is resized for the model, and the results are scaled back.
    large = image.repeat(3, axis=0).repeat(3, axis=1)
    check_instances(DefaultPredictor(cfg)(large)["instances"], (3 * HEIGHT, 3 * WIDTH), with_masks=True)


# Inputs


@torch.no_grad()
def test_inference_needs_only_the_image(mask_rcnn):
    from_bytes = mask_rcnn([{"image": random_image()}])
    from_floats = mask_rcnn([{"image": random_image().float()}])
    assert len(from_bytes) == 1
    boxes = [x[0]["instances"].pred_boxes.tensor for x in (from_bytes, from_floats)]
    assert torch.equal(*boxes)


@torch.no_grad()
def test_images_are_normalized_by_the_mean_and_std_of_the_config():
    plain = built(FASTER_RCNN).eval()
    mean, std = [110.0, 120.0, 130.0], [50.0, 60.0, 70.0]
    other = built(FASTER_RCNN, MODEL__PIXEL_MEAN=mean, MODEL__PIXEL_STD=std).eval()
    other.load_state_dict(plain.state_dict())
    shape = (3, 1, 1)
    image = random_image().float()
    normalized = (image - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    same_to_plain = normalized * plain.pixel_std + plain.pixel_mean
    (a,), (b,) = other([{"image": image}]), plain([{"image": same_to_plain}])
    torch.testing.assert_close(
        a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor, atol=1e-2, rtol=1e-3
    )


@torch.no_grad()
def test_height_and_width_set_the_size_of_the_output(mask_rcnn):
    (out,) = mask_rcnn([{"image": random_image(), "height": 100, "width": 200}])
    check_instances(out["instances"], (100, 200), with_masks=True)


@pytest.mark.parametrize("kind", ["polygons", "bitmasks"])
def test_training_on_instances(kind):
    model = built()
    batch = training_batch()
    if kind == "bitmasks":
        for item in batch:
            x = item["instances"]
            x.gt_masks = BitMasks.from_polygon_masks(x.gt_masks, HEIGHT, WIDTH)
    instances = batch[0]["instances"]
    assert isinstance(instances.gt_boxes, Boxes) and instances.gt_classes.dtype == torch.int64
    assert isinstance(instances.gt_masks, PolygonMasks if kind == "polygons" else BitMasks)
    torch.manual_seed(1)
    losses = model(batch)
    assert all(
        losses[k] > 0 for k in ("loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc")
    )


def test_training_on_keypoints():
    model = built(KEYPOINT_RCNN)
    batch = training_batch()
    for item in batch:
        x = item["instances"]
        points = torch.rand(len(x), NUM_KEYPOINTS, 3)
        corners = x.gt_boxes.tensor[:, None]
        points[..., :2] = corners[..., :2] + points[..., :2] * (corners[..., 2:] - corners[..., :2])
        points[..., 2] = torch.arange(NUM_KEYPOINTS) % 3  # not labeled, hidden, visible
        x.gt_keypoints = Keypoints(points)
    with EventStorage():
        losses = model(batch)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_keypoint", "loss_rpn_cls", "loss_rpn_loc"}
    assert all(loss.dim() == 0 and loss > 0 for loss in losses.values())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_training_on_sem_seg(dtype):
    labels = (torch.arange(HEIGHT)[:, None] + torch.arange(WIDTH)) // 8 % NUM_STUFF
    batch = [item | {"sem_seg": labels.to(dtype)} for item in training_batch()]
    losses = built(SEMANTIC)(batch)
    assert set(losses) == {"loss_sem_seg"} and losses["loss_sem_seg"] > 0
    # Pixels without a label are ignored.
    partly = [item | {"sem_seg": item["sem_seg"].clone()} for item in batch]
    for item in partly:
        item["sem_seg"][: HEIGHT // 2] = 255
    assert built(SEMANTIC)(partly)["loss_sem_seg"] != losses["loss_sem_seg"]
    with EventStorage():
        losses = built(PANOPTIC)(batch)
    assert {"loss_sem_seg", "loss_mask", "loss_cls"} < set(losses)
    assert all(loss > 0 for loss in losses.values())


def some_proposals() -> Instances:
    boxes = torch.tensor([[8.0, 8, 40, 40], [0, 0, 20, 30], [30, 20, 90, 60], [50, 5, 90, 25]])
    return Instances(
        (HEIGHT, WIDTH), proposal_boxes=Boxes(boxes), objectness_logits=torch.tensor([3.0, 2, 1, 0])
    )


def test_fast_rcnn_uses_the_proposals_of_the_input():
    model = built(FAST_RCNN)
    batch = [item | {"proposals": some_proposals()} for item in training_batch()]
    with EventStorage():
        assert set(model(batch)) == {"loss_cls", "loss_box_reg"}
    with torch.no_grad():
        outputs = model.eval()([{"image": random_image(), "proposals": some_proposals()}])
    check_instances(outputs[0]["instances"], (HEIGHT, WIDTH), with_masks=False)


def shapes_config(tmp_path):
    return small_config(
        DATASETS__TRAIN=("shapes:train",),
        DATASETS__TEST=("shapes:val",),
        DATALOADER__NUM_WORKERS=0,
        SOLVER__IMS_PER_BATCH=2,
        INPUT__MIN_SIZE_TRAIN=(96,),
        INPUT__MIN_SIZE_TEST=96,
        OUTPUT_DIR=str(tmp_path),
    )


def test_default_mapper_returns_the_documented_input_format(tmp_path):
    cfg = shapes_config(tmp_path)
    mapper = DatasetMapper(cfg, is_train=True)
    item = mapper(DatasetCatalog.get("shapes:train")[0])
    image, instances = item["image"], item["instances"]
    assert isinstance(image, torch.Tensor) and image.dim() == 3 and image.shape[0] == 3
    assert {"height", "width"} <= item.keys()
    assert isinstance(instances, Instances) and instances.image_size == tuple(image.shape[1:])
    assert isinstance(instances.gt_boxes, Boxes)
    assert isinstance(instances.gt_masks, PolygonMasks | BitMasks)
    assert instances.gt_classes.dtype == torch.int64
    assert len(instances.gt_boxes) == len(instances.gt_classes) == len(instances.gt_masks) > 0
    assert 0 <= instances.gt_classes.min() and instances.gt_classes.max() < NUM_CLASSES


def test_models_accept_batches_of_the_loaders(tmp_path):
    cfg = shapes_config(tmp_path)
    batch = next(iter(build_detection_train_loader(cfg)))
    assert isinstance(batch, list) and len(batch) == 2 and all(isinstance(item, dict) for item in batch)
    model = built()
    with EventStorage():
        assert all(loss.isfinite() for loss in model(batch).values())
    batch = next(iter(build_detection_test_loader(cfg, "shapes:val")))
    with torch.no_grad():
        outputs = model.eval()(batch)
    assert len(outputs) == len(batch)
    check_instances(outputs[0]["instances"], (batch[0]["height"], batch[0]["width"]), with_masks=True)


# Outputs


def check_boxes(boxes: Boxes, size: tuple[int, int]) -> None:
    assert isinstance(boxes, Boxes) and boxes.tensor.shape == (len(boxes), 4)
    x0, y0, x1, y1 = boxes.tensor.unbind(dim=1)
    assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= size[1]).all() and (y1 <= size[0]).all()
    assert (x0 < x1).all() and (y0 < y1).all()


def check_instances(
    x: Instances, size: tuple[int, int], with_masks: bool, with_keypoints: bool = False
) -> None:
    """Check type, shape and range of the documented fields."""
    assert isinstance(x, Instances) and x.image_size == tuple(size)
    expected = {"pred_boxes", "scores", "pred_classes"} | ({"pred_masks"} if with_masks else set())
    expected |= {"pred_keypoints", "pred_keypoint_heatmaps"} if with_keypoints else set()
    assert set(x.get_fields()) == expected
    count = len(x)
    assert 0 < count <= 20
    check_boxes(x.pred_boxes, size)
    assert isinstance(x.scores, torch.Tensor) and x.scores.shape == (count,) and x.scores.is_floating_point()
    assert (x.scores > 0).all() and (x.scores <= 1).all() and (x.scores.diff() <= 0).all()
    assert x.pred_classes.shape == (count,) and x.pred_classes.dtype == torch.int64
    assert x.pred_classes.min() >= 0 and x.pred_classes.max() < NUM_CLASSES
    if with_masks:
        assert isinstance(x.pred_masks, torch.Tensor) and x.pred_masks.dtype == torch.bool
        assert x.pred_masks.shape == (count, *size)
    if with_keypoints:
        check_keypoints(x.pred_keypoints, x.pred_boxes)


def check_keypoints(keypoints: torch.Tensor, boxes: Boxes) -> None:
    """Check rows of x, y, score: positions in the box (up to rounding by a cell), and scores above 0."""
    assert isinstance(keypoints, torch.Tensor) and keypoints.is_floating_point()
    assert keypoints.shape == (len(boxes), NUM_KEYPOINTS, 3) and keypoints.isfinite().all()
    positions, scores = keypoints.split([2, 1], dim=2)
    assert (scores > 0).all()
    corners = boxes.tensor[:, None]
    assert (positions >= corners[..., :2] - 1).all() and (positions <= corners[..., 2:] + 1).all()


@pytest.mark.parametrize("name", [FASTER_RCNN, MASK_RCNN])
@torch.no_grad()
def test_output_of_detections(name):
    inputs = [
        {"image": random_image(HEIGHT, WIDTH, seed=1)},
        {"image": random_image(80, 56, seed=2), "height": 160, "width": 112},
    ]
    outputs = built(name).eval()(inputs)
    assert isinstance(outputs, list) and all(set(out) == {"instances"} for out in outputs)
    for out, size in zip(outputs, [(HEIGHT, WIDTH), (160, 112)]):
        check_instances(out["instances"], size, with_masks=name == MASK_RCNN)


@torch.no_grad()
def test_output_of_keypoints():
    model = built(KEYPOINT_RCNN).eval()
    small, large = model([{"image": random_image()}, {"image": random_image(), "height": 128, "width": 192}])
    check_instances(small["instances"], (HEIGHT, WIDTH), with_masks=False, with_keypoints=True)
    check_instances(large["instances"], (128, 192), with_masks=False, with_keypoints=True)
    positions = [x["instances"].pred_keypoints[..., :2] for x in (small, large)]
    torch.testing.assert_close(2 * positions[0], positions[1], rtol=1e-3, atol=1e-2)


def check_sem_seg(x: torch.Tensor, size: tuple[int, int]) -> None:
    """Check the scores of each category at each pixel."""
    assert isinstance(x, torch.Tensor) and x.is_floating_point() and x.isfinite().all()
    assert x.shape == (NUM_STUFF, *size)
    assert 1 < len(x.argmax(dim=0).unique()) <= NUM_STUFF


@torch.no_grad()
def test_output_of_sem_seg():
    inputs = [
        {"image": random_image(seed=1)},
        {"image": random_image(80, 56, seed=2), "height": 120, "width": 84},
    ]
    outputs = built(SEMANTIC).eval()(inputs)
    assert isinstance(outputs, list) and all(set(out) == {"sem_seg"} for out in outputs)
    for out, size in zip(outputs, [(HEIGHT, WIDTH), (120, 84)]):
        check_sem_seg(out["sem_seg"], size)


def check_panoptic_seg(panoptic_seg: tuple, instances: Instances, sem_seg: torch.Tensor) -> None:
    """Check a map of segment ids, and the dict that describes each segment."""
    assert isinstance(panoptic_seg, tuple) and len(panoptic_seg) == 2
    ids, segments = panoptic_seg
    assert isinstance(ids, torch.Tensor) and ids.dtype in (torch.int32, torch.int64)
    assert ids.shape == sem_seg.shape[1:] == instances.image_size
    assert isinstance(segments, list) and all(isinstance(segment, dict) for segment in segments)
    known = [segment["id"] for segment in segments]
    assert all(type(i) is int and i > 0 for i in known) and len(set(known)) == len(known)
    assert set(ids.unique().tolist()) - {0} == set(known)
    for segment in segments:
        assert type(segment["isthing"]) is bool and type(segment["category_id"]) is int
        where = ids == segment["id"]
        if segment["isthing"]:
            assert 0 <= segment["category_id"] < NUM_CLASSES
            same = instances.pred_classes == segment["category_id"]
            # The segment is inside the mask of one of the instances of its category.
            assert (instances.pred_masks[same] | ~where).flatten(1).all(dim=1).any()
        else:
            assert 0 < segment["category_id"] < NUM_STUFF  # 0 is for things
            assert (sem_seg.argmax(dim=0)[where] == segment["category_id"]).all()
    assert {segment["isthing"] for segment in segments} == {True, False}


@torch.no_grad()
def test_output_of_panoptic_seg():
    inputs = [
        {"image": random_image(seed=1)},
        {"image": random_image(80, 56, seed=2), "height": 120, "width": 84},
    ]
    outputs = built(PANOPTIC).eval()(inputs)
    for out, size in zip(outputs, [(HEIGHT, WIDTH), (120, 84)]):
        assert set(out) == {"instances", "sem_seg", "panoptic_seg"}
        check_instances(out["instances"], size, with_masks=True)
        check_sem_seg(out["sem_seg"], size)
        check_panoptic_seg(out["panoptic_seg"], out["instances"], out["sem_seg"])


@torch.no_grad()
def test_output_of_proposals():
    (out,) = built(RPN).eval()([{"image": random_image(), "height": 128, "width": 192}])
    x = out["proposals"]
    assert set(out) == {"proposals"} and isinstance(x, Instances) and x.image_size == (128, 192)
    check_boxes(x.proposal_boxes, (128, 192))
    assert x.objectness_logits.shape == (len(x),) and x.objectness_logits.is_floating_point()


# Partial execution


@torch.no_grad()
def test_parts_of_a_model_can_be_run_one_by_one(mask_rcnn):
    model = mask_rcnn
    pixels = [(random_image(seed=s).float() - model.pixel_mean) / model.pixel_std for s in (1, 2)]
    images = ImageList.from_tensors(pixels, model.backbone.size_divisibility)
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features)
    instances = model.roi_heads._forward_box(features, proposals)
    mask_features = [features[f] for f in model.roi_heads.in_features]
    mask_features = model.roi_heads.mask_pooler(mask_features, [x.pred_boxes for x in instances])

    count = sum(len(x) for x in instances)
    assert len(proposals) == len(instances) == 2 and count > 0
    assert mask_features.shape == (count, model.backbone.output_shape()["p2"].channels, 14, 14)
    # They are the features that the mask head of the full model receives: its masks are the same.
    logits = model.roi_heads.mask_head.layers(mask_features)
    outputs = model.inference([{"image": random_image(seed=s)} for s in (1, 2)], do_postprocess=False)
    assert [len(x) for x in outputs] == [len(x) for x in instances]
    classes = torch.cat([x.pred_classes for x in outputs])
    masks = logits[torch.arange(count), classes].sigmoid()[:, None]
    torch.testing.assert_close(masks, torch.cat([x.pred_masks for x in outputs]))


class KeepsFeatures(MaskRCNNConvUpsampleHead):
    """A mask head that stores its input."""

    def layers(self, x):
        self.seen = x
        return super().layers(x)


@torch.no_grad()
def test_subclassed_mask_head_can_return_its_input_features(mask_rcnn):
    if KeepsFeatures.__name__ not in ROI_MASK_HEAD_REGISTRY:
        ROI_MASK_HEAD_REGISTRY.register(KeepsFeatures)
    model = built(MODEL__ROI_MASK_HEAD__NAME="KeepsFeatures").eval()
    model.load_state_dict(mask_rcnn.state_dict())
    inputs = [{"image": random_image()}]
    (out,), (expected,) = model(inputs), mask_rcnn(inputs)
    assert torch.equal(out["instances"].pred_masks, expected["instances"].pred_masks)
    seen = model.roi_heads.mask_head.seen
    assert seen.shape[1:] == (32, 14, 14) and len(seen) >= len(out["instances"]) > 0
