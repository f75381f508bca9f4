"""Panoptic FPN: the merge compared with a slow one, and the model."""

import pytest
import torch

from detlib.modeling import PanopticFPN, build_model
from detlib.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detlib.structures import Instances
from detlib.utils.events import EventStorage
from tests.builders import NUM_CLASSES, random_image, small_config, training_batch

PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml"
NUM_STUFF = 4


def scene(num: int, seed: int, height: int = 40, width: int = 60) -> tuple[Instances, torch.Tensor]:
    """Return strongly overlapping ellipses with random scores, one of them empty, and blocks of stuff."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.rand(num, 4, generator=generator)
    y, x = place[:, 0] * height, place[:, 1] * width
    radii = 3 + 12 * place[:, 2:]
    inside = ((rows - y[:, None, None]) / radii[:, :1, None]) ** 2
    inside = inside + ((columns - x[:, None, None]) / radii[:, 1:, None]) ** 2
    masks = inside < 1
    masks[num // 2] = False
    blocks = torch.randint(0, NUM_STUFF, (4, 6), generator=generator)
    semantic = blocks.repeat_interleave(10, dim=0).repeat_interleave(10, dim=1)
    instances = Instances((height, width), scores=torch.rand(num, generator=generator), pred_masks=masks)
    instances.pred_classes = torch.randint(0, 9, (num,), generator=generator)
    return instances, semantic


def slow_merge(instances, semantic, overlap: float, area: int, score: float):
    """Merge with sets of pixels instead of tensors."""
    free = {(y, x) for y in range(semantic.shape[0]) for x in range(semantic.shape[1])}
    ids, segments = torch.zeros(semantic.shape, dtype=torch.int32), []

    def add(pixels, **facts):
        segments.append({"id": len(segments) + 1, **facts})
        for y, x in pixels:
            ids[y, x] = len(segments)
        free.difference_update(pixels)

    for i in sorted(range(len(instances)), key=lambda i: -instances.scores[i]):
        pixels = {tuple(p) for p in instances.pred_masks[i].nonzero().tolist()}
        hidden = len(pixels - free)
        good = instances.scores[i] >= score and pixels and hidden <= overlap * len(pixels)
        if good and pixels & free:
            facts = {"score": instances.scores[i].item(), "category_id": instances.pred_classes[i].item()}
            add(pixels & free, isthing=True, instance_id=i, **facts)
    for label in range(1, int(semantic.max()) + 1):
        pixels = {p for p in free if semantic[p] == label}
        if pixels and len(pixels) >= area:
            add(pixels, isthing=False, category_id=label, area=len(pixels))
    return ids, segments


@pytest.mark.parametrize(
    "overlap, area, score",
    [(0.5, 60, 0.3), (0.0, 0, 0.0), (0.8, 150, 0.5), (1.0, 1, 0.1), (0.5, 10**6, 0.9), (0.3, 0, 2.0)],
)
@pytest.mark.parametrize("seed", range(3))
def test_merge_equals_a_slow_merge(overlap, area, score, seed):
    instances, semantic = scene(12, seed)
    before = instances.pred_masks.clone(), semantic.clone()
    ids, segments = combine_semantic_and_instance_outputs(instances, semantic, overlap, area, score)
    want_ids, want_segments = slow_merge(instances, semantic, overlap, area, score)
    assert segments == want_segments
    assert ids.dtype == torch.int32 and torch.equal(ids, want_ids)
    assert torch.equal(instances.pred_masks, before[0]) and torch.equal(semantic, before[1])


def test_merge_of_a_worked_example():
    masks = torch.zeros(3, 4, 6, dtype=torch.bool)
    masks[0, :2, :3] = True  # 4 of 6 pixels are covered by a better one
    masks[1, :2, 1:4] = True  # the best score
    masks[2, 1, :4] = True  # covered by the others: dropped
    semantic = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1], [2, 2, 2, 1, 1, 3], [2, 2, 2, 1, 1, 0]])
    x = Instances((4, 6), pred_masks=masks, scores=torch.tensor([0.5, 0.75, 0.5]))
    x.pred_classes = torch.tensor([7, 3, 5])
    ids, segments = combine_semantic_and_instance_outputs(x, semantic, 0.7, 6, 0.5)
    assert ids.tolist() == [[2, 1, 1, 1, 3, 3], [2, 1, 1, 1, 3, 3], [4, 4, 4, 3, 3, 0], [4, 4, 4, 3, 3, 0]]
    assert segments == [
        {"id": 1, "isthing": True, "score": 0.75, "category_id": 3, "instance_id": 1},
        {"id": 2, "isthing": True, "score": 0.5, "category_id": 7, "instance_id": 0},
        {"id": 3, "isthing": False, "category_id": 1, "area": 8},
        {"id": 4, "isthing": False, "category_id": 2, "area": 6},
    ]


def test_merge_without_instances_has_stuff_only():
    instances, semantic = scene(4, 0)
    ids, segments = combine_semantic_and_instance_outputs(instances[:0], semantic, 0.5, 0, 0.5)
    assert torch.equal(ids > 0, semantic > 0) and not any(x["isthing"] for x in segments)
    ids, segments = combine_semantic_and_instance_outputs(
        instances[:0], torch.zeros_like(semantic), 0.5, 0, 0.5
    )
    assert not ids.any() and segments == []


def test_merge_of_mismatched_results_raises():
    instances, semantic = scene(4, 0)
    with pytest.raises(ValueError, match=r"\(40, 59\), got \(4, 40, 60\)"):
        combine_semantic_and_instance_outputs(instances, semantic[:, :59], 0.5, 0, 0.5)
    instances.remove("pred_masks")
    with pytest.raises(ValueError, match="'pred_masks' .MODEL.MASK_ON., got .'pred_classes', 'scores'"):
        combine_semantic_and_instance_outputs(instances, semantic, 0.5, 0, 0.5)


def built(**overrides) -> PanopticFPN:
    torch.manual_seed(0)
    overrides = {
        "MODEL__SEM_SEG_HEAD__CONVS_DIM": 32,
        "MODEL__SEM_SEG_HEAD__NUM_CLASSES": NUM_STUFF,
        "MODEL__PANOPTIC_FPN__COMBINE__INSTANCES_CONFIDENCE_THRESH": 0.2,
        "MODEL__PANOPTIC_FPN__COMBINE__STUFF_AREA_LIMIT": 20,
    } | overrides
    return build_model(small_config(PANOPTIC, **overrides))


@pytest.fixture(scope="module")
def model() -> PanopticFPN:
    return built()


def batch() -> list[dict]:
    items = training_batch()
    for item in items:
        labels = torch.arange(64 * 96).reshape(64, 96) // 800 % NUM_STUFF
        labels[:9] = 255
        item["sem_seg"] = labels
    return items


def losses_of(model: PanopticFPN) -> dict[str, float]:
    torch.manual_seed(1)  # for the sampling
    with EventStorage():
        return {key: x.item() for key, x in model.train()(batch()).items()}


def test_loss_weights_scale_the_losses_of_each_part(model):
    losses = losses_of(model)
    detection = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    assert losses.keys() == {"loss_sem_seg"} | detection
    half = losses_of(built(MODEL__PANOPTIC_FPN__INSTANCE_LOSS_WEIGHT=0.5, MODEL__SEM_SEG_HEAD__LOSS_WEIGHT=2))
    factors = {"loss_sem_seg": 4, "loss_rpn_cls": 1, "loss_rpn_loc": 1}  # from 0.5 to 2; RPN is not scaled
    for key, value in losses.items():
        assert half[key] == pytest.approx(factors.get(key, 0.5) * value, rel=1e-4), key


def test_instance_loss_weight_scales_all_stages_of_a_cascade():
    agnostic = {
        "MODEL__ROI_HEADS__NAME": "CascadeROIHeads",
        "MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True,
    }
    full = losses_of(built(**agnostic))
    half = losses_of(built(MODEL__PANOPTIC_FPN__INSTANCE_LOSS_WEIGHT=0.5, **agnostic))
    assert {"loss_cls_stage2", "loss_box_reg_stage0", "loss_mask"} < full.keys()
    for key, value in full.items():
        factor = 1 if key.startswith(("loss_rpn", "loss_sem")) else 0.5
        assert half[key] == pytest.approx(factor * value, rel=1e-4), key


@torch.no_grad()
def test_outputs_have_the_size_and_merge_of_each_image(model):
    items = [{"image": random_image(), "height": 128, "width": 144}, {"image": random_image(40, 96, seed=1)}]
    # The predictor of a new model prefers one class. Make it prefer a stuff class over class 0, the things.
    model.sem_seg_head.predictor.bias.copy_(torch.tensor([-9.0, 0, 0, 0]))
    model.eval()
    for out, (height, width) in zip(model(items), ((128, 144), (40, 96))):
        assert out.keys() == {"sem_seg", "instances", "panoptic_seg"}
        assert out["sem_seg"].shape == (NUM_STUFF, height, width)
        assert out["instances"].image_size == (height, width)
        ids, segments = out["panoptic_seg"]
        assert ids.shape == (height, width) and ids.dtype == torch.int32
        assert (
            set(ids.unique().tolist()) - {0}
            == {x["id"] for x in segments}
            == set(range(1, len(segments) + 1))
        )
        want = combine_semantic_and_instance_outputs(
            out["instances"], out["sem_seg"].argmax(dim=0), 0.5, 20, 0.2
        )
        assert torch.equal(ids, want[0]) and segments == want[1]
        for x in segments:
            assert type(x["isthing"]) is bool and type(x["category_id"]) is int
            if x["isthing"]:
                assert 0 <= x["category_id"] < NUM_CLASSES and 0.2 <= x["score"] <= 1
            else:
                assert 0 < x["category_id"] < NUM_STUFF and x["area"] == (ids == x["id"]).sum()


@torch.no_grad()
def test_inference_without_postprocessing_and_with_given_boxes(model):
    item = {"image": random_image(60, 90), "height": 128, "width": 192}
    model.eval()
    (raw,), sem_seg = model.inference([item], do_postprocess=False)
    assert raw.image_size == (60, 90) and raw.pred_masks.shape[1:] == (1, 28, 28)
    assert sem_seg.shape == (1, NUM_STUFF, 64, 96)
    given = Instances((60, 90), pred_boxes=raw.pred_boxes, pred_classes=raw.pred_classes)
    (out,), _ = model.inference([item], False, detected_instances=[given])
    assert torch.equal(out.pred_masks, raw.pred_masks)
    with pytest.raises(ValueError, match="eval()"):
        model.train().inference([item])


@torch.no_grad()
def test_outputs_without_merge_have_no_panoptic_seg():
    model = built(MODEL__PANOPTIC_FPN__COMBINE__ENABLED=False, MODEL__MASK_ON=False).eval()
    (out,) = model([{"image": random_image()}])
    assert out.keys() == {"sem_seg", "instances"}


def test_merge_without_masks_raises():
    with pytest.raises(ValueError, match="MODEL.MASK_ON = True, or MODEL.PANOPTIC_FPN.COMBINE.ENABLED"):
        built(MODEL__MASK_ON=False)


@pytest.mark.parametrize("key", ["sem_seg", "instances"])
def test_training_without_ground_truth_raises(model, key):
    items = batch()
    del items[1][key]
    with pytest.raises(ValueError, match=f"needs '{key}'.*item 1"):
        model.train()(items)
    with torch.no_grad():
        assert len(model.eval()(items)) == 2


def test_merge_is_on_by_default(model):
    parts = {name: getattr(model, name) for name in ("backbone", "proposal_generator", "roi_heads")}
    other = PanopticFPN(
        **parts, sem_seg_head=model.sem_seg_head, pixel_mean=[0.0, 0, 0], pixel_std=[1.0, 1, 1]
    )
    values = (other.combine_overlap_thresh, other.combine_stuff_area_thresh)
    assert values == (0.5, 4096) and other.combine_instances_score_thresh == 0.5 and other.combine_on
