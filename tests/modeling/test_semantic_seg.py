"""The semantic head, its loss and its model, compared with formulas."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from detlib.layers import ShapeSpec
from detlib.modeling import build_model, build_sem_seg_head, sem_seg_postprocess
from detlib.modeling.meta_arch.semantic_seg import SemanticSegmentor, SemSegFPNHead
from tests.builders import random_image, small_config

SEMANTIC = "Misc/semantic_R_50_FPN_1x.yaml"
SHAPES = {f"p{k}": ShapeSpec(channels=6, stride=2**k) for k in (2, 3, 4, 5)}
NUM_CLASSES = 5


def head_of(shapes=SHAPES, **kwargs) -> SemSegFPNHead:
    torch.manual_seed(0)
    args = dict(num_classes=NUM_CLASSES, conv_dims=8, common_stride=4, norm=None, ignore_value=255) | kwargs
    head = SemSegFPNHead(shapes, **args)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return head.double()


def features_of(shapes=SHAPES, height=64, width=96) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(
            2, x.channels, height // x.stride, width // x.stride, generator=generator, dtype=torch.float64
        )
        for name, x in shapes.items()
    }


def labels_of(height=64, width=96) -> torch.Tensor:
    labels = torch.randint(0, NUM_CLASSES, (2, height, width), generator=torch.Generator().manual_seed(2))
    labels[:, :20, :30] = 255
    return labels


def enlarge(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize (..., H, W) bilinearly between pixel centers, one axis after the other."""
    for dim, size in ((-2, height), (-1, width)):
        old = x.shape[dim]
        at = ((torch.arange(size, dtype=torch.float64) + 0.5) * old / size - 0.5).clamp(0, old - 1)
        low = at.floor().long()
        high = (low + 1).clamp(max=old - 1)
        part = (at - low).to(x.dtype)
        part = part[:, None] if dim == -2 else part
        x = x.index_select(dim, low) * (1 - part) + x.index_select(dim, high) * part
    return x


def predicted(head: SemSegFPNHead, maps: dict[str, torch.Tensor], names, common: int) -> torch.Tensor:
    """Compute the head: on each level conv, norm, ReLU, doubling up to the common stride; sum; 1x1 conv."""
    state, total = head.state_dict(), 0
    for name in names:
        x, stride = maps[name], SHAPES[name].stride
        for k in range(0, 2 * max(1, int(np.log2(stride // common))), 2):
            x = F.conv2d(x, state[f"{name}.{k}.weight"], state.get(f"{name}.{k}.bias"), padding=1)
            if f"{name}.{k}.norm.weight" in state:
                x = F.group_norm(x, 32, state[f"{name}.{k}.norm.weight"], state[f"{name}.{k}.norm.bias"])
            x = x.clamp(min=0)
            if stride != common:
                x = enlarge(x, 2 * x.shape[2], 2 * x.shape[3])
        total = total + x
    return F.conv2d(total, state["predictor.weight"], state["predictor.bias"])


@pytest.mark.parametrize(
    "names, common, kwargs",
    [
        (("p2", "p3", "p4", "p5"), 4, {}),
        (("p2", "p3", "p4", "p5"), 4, {"norm": "GN", "conv_dims": 64}),
        (("p3", "p5"), 8, {}),
        (("p4", "p5"), 4, {}),
        (("p2",), 4, {}),
    ],
)
def test_head_equals_the_sum_of_upsampled_levels(names, common, kwargs):
    shapes = {name: SHAPES[name] for name in reversed(names)}  # the head sorts by stride
    head, maps = head_of(shapes, common_stride=common, **kwargs).eval(), features_of()
    logits, losses = head(maps)
    want = predicted(head, maps, names, common)
    assert losses == {} and head.in_features == list(names)
    torch.testing.assert_close(head.layers(maps), want)
    torch.testing.assert_close(logits, enlarge(want, 64, 96))


def test_rounded_up_levels_are_cropped():
    head = head_of().eval()
    maps = features_of()
    maps["p5"] = F.pad(maps["p5"], (0, 1, 0, 1))
    assert head.layers(maps).shape == (2, NUM_CLASSES, 16, 24)


def test_loss_is_the_mean_over_labeled_pixels():
    head, maps, labels = head_of(loss_weight=0.5), features_of(), labels_of()
    none, losses = head(maps, labels)
    logits = enlarge(predicted(head, maps, head.in_features, 4), 64, 96).detach().numpy()
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    terms = [
        -log_probs[n, labels[n, y, x], y, x]
        for n in range(2)
        for y in range(64)
        for x in range(96)
        if labels[n, y, x] != 255
    ]
    assert none is None and losses.keys() == {"loss_sem_seg"}
    assert losses["loss_sem_seg"].item() == pytest.approx(0.5 * np.mean(terms), rel=1e-9)


def test_loss_without_labeled_pixels_is_zero_and_requires_grad():
    head = head_of()
    _, losses = head(features_of(), torch.full((2, 64, 96), 255))
    losses["loss_sem_seg"].backward()
    assert losses["loss_sem_seg"].item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_shape": {}}, "at least one feature"),
        ({"common_stride": 8}, r"'p2' of stride 4.*common stride 8 \(MODEL.SEM_SEG_HEAD.COMMON_STRIDE\)"),
        ({"common_stride": 3}, "'p2' of stride 4"),
        ({"norm": "GroupNorm"}, "GroupNorm"),
    ],
)
def test_wrong_arguments_of_the_head_raise(change, message):
    args = dict(input_shape=SHAPES, num_classes=3, conv_dims=32, common_stride=4) | change
    with pytest.raises(ValueError, match=message):
        SemSegFPNHead(**args)


def test_wrong_calls_of_the_head_raise():
    head = head_of()
    with pytest.raises(ValueError, match="targets"):
        head(features_of())
    maps = features_of()
    del maps["p4"]
    with pytest.raises(KeyError, match="'p4'; available: .'p2', 'p3', 'p5'."):
        head.eval()(maps)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("IN_FEATURES", ["p2", "res3"], "MODEL.SEM_SEG_HEAD.IN_FEATURES.*'res3'"),
        ("IN_FEATURES", [], "MODEL.SEM_SEG_HEAD.IN_FEATURES.*at least one"),
        ("NORM", "GroupNorm", "MODEL.SEM_SEG_HEAD.NORM"),
        ("COMMON_STRIDE", 8, "MODEL.SEM_SEG_HEAD.COMMON_STRIDE"),
        ("NAME", "SemSegFPN", "SemSegFPNHead"),
    ],
)
def test_wrong_configs_raise_with_their_key(key, value, message):
    cfg = small_config(SEMANTIC, **{f"MODEL__SEM_SEG_HEAD__{key}": value})
    with pytest.raises((ValueError, KeyError), match=message):
        build_sem_seg_head(cfg, SHAPES)


def test_config_values_reach_the_head():
    values = {"NUM_CLASSES": 7, "CONVS_DIM": 64, "COMMON_STRIDE": 8, "LOSS_WEIGHT": 0.25, "IGNORE_VALUE": 9}
    values |= {"IN_FEATURES": ["p5", "p3"], "NORM": ""}
    cfg = small_config(SEMANTIC, **{f"MODEL__SEM_SEG_HEAD__{key}": x for key, x in values.items()})
    head = build_sem_seg_head(cfg, SHAPES)
    assert head.in_features == ["p3", "p5"] and head.common_stride == 8
    assert (head.loss_weight, head.ignore_value, head.num_classes) == (0.25, 9, 7)
    assert head.predictor.weight.shape == (7, 64, 1, 1)
    assert [n for n, _ in head.named_parameters() if "norm" in n] == [] and head.p3[0].bias is not None


class TestPostprocess:
    def test_padding_is_cropped_before_resizing(self):
        x = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0))
        out = sem_seg_postprocess(x, (30, 50), 47, 21)
        torch.testing.assert_close(out, enlarge(x[:, :30, :50], 47, 21))
        other = x.clone()
        other[:, 30:] = other[:, :, 50:] = 1e6
        assert torch.equal(sem_seg_postprocess(other, (30, 50), 47, 21), out)

    def test_logits_of_the_output_size_are_not_copied(self):
        x = torch.randn(3, 40, 64)
        out = sem_seg_postprocess(x, (30, 50), 30, 50)
        assert out.shape == (3, 30, 50) and out.data_ptr() == x.data_ptr()
        assert torch.equal(out, F.interpolate(x[None, :, :30, :50], size=(30, 50), mode="bilinear")[0])

    @pytest.mark.parametrize("shape, size", [((3, 20, 64), (30, 50)), ((1, 3, 40, 64), (30, 50))])
    def test_results_smaller_than_the_image_raise(self, shape, size):
        with pytest.raises(ValueError, match="30 x 50"):
            sem_seg_postprocess(torch.zeros(shape), size, 10, 10)

    def test_output_size_below_one_raises(self):
        with pytest.raises(ValueError, match="0 x 10"):
            sem_seg_postprocess(torch.zeros(3, 8, 8), (8, 8), 0, 10)


@pytest.fixture(scope="module")
def model() -> SemanticSegmentor:
    torch.manual_seed(0)
    overrides = {"MODEL__SEM_SEG_HEAD__CONVS_DIM": 32, "MODEL__SEM_SEG_HEAD__NUM_CLASSES": NUM_CLASSES}
    return build_model(small_config(SEMANTIC, **overrides))


def batch() -> list[dict]:
    """Return images of different sizes, so that both are padded."""
    labels = labels_of()
    return [
        {"image": random_image(64, 72), "sem_seg": labels[0, :, :72]},
        {"image": random_image(40, 96, seed=1), "sem_seg": labels[1, :40].to(torch.uint8)},
    ]


def test_padding_does_not_enter_the_loss(model):
    head = model.train().sem_seg_head
    losses = model(batch())
    items = batch()
    images = torch.zeros(2, 3, 64, 96)
    want = torch.full((2, 64, 96), 255)
    for i, item in enumerate(items):
        height, width = item["sem_seg"].shape
        images[i, :, :height, :width] = (item["image"] - model.pixel_mean) / model.pixel_std
        want[i, :height, :width] = item["sem_seg"]
    logits = F.interpolate(head.layers(model.backbone(images)), scale_factor=4.0, mode="bilinear")
    expected = F.cross_entropy(logits, want, ignore_index=255)
    torch.testing.assert_close(losses["loss_sem_seg"], expected)


@torch.no_grad()
def test_outputs_have_the_requested_size(model):
    items = batch()
    items[1] |= {"height": 80, "width": 200}
    first, second = model.eval()(items)
    assert first.keys() == {"sem_seg"} and first["sem_seg"].shape == (NUM_CLASSES, 64, 72)
    assert second["sem_seg"].shape == (NUM_CLASSES, 80, 200)
    own = model([batch()[1]])[0]["sem_seg"]
    plain = model(batch())[1]["sem_seg"]
    assert own.shape == (NUM_CLASSES, 40, 96)
    torch.testing.assert_close(second["sem_seg"], enlarge(plain, 80, 200), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_half_precision_logits_are_upsampled_in_float32(model):
    with torch.autocast("cpu", torch.bfloat16):
        half = model.eval()(batch())[0]["sem_seg"]
    assert half.dtype == torch.float32
    full = model(batch())[0]["sem_seg"]
    assert (half - full).abs().mean() < 0.05 * full.std()


@pytest.mark.parametrize(
    "labels, error, message",
    [
        (None, ValueError, r"'sem_seg' in every dict; item 1 .*\(b.png\) has only \['file_name', 'image'\]"),
        (
            torch.zeros(40, 95, dtype=torch.long),
            ValueError,
            r"size of its 'image', \(40, 96\), got \(40, 95\)",
        ),
        (torch.zeros(1, 40, 96, dtype=torch.long), ValueError, r"\(1, 40, 96\)"),
        (torch.zeros(40, 96), TypeError, "integers, got torch.float32"),
        (torch.zeros(40, 96, dtype=torch.bool), TypeError, "torch.bool"),
        (np.zeros((40, 96), np.int64), TypeError, "ndarray"),
        (torch.full((40, 96), NUM_CLASSES), ValueError, r"\[0, 5\) .*NUM_CLASSES.*255 .*IGNORE_VALUE.*\[5\]"),
        (torch.full((40, 96), -1), ValueError, r"got \[-1\]"),
    ],
)
def test_wrong_label_maps_raise(model, labels, error, message):
    items = batch()
    items[1]["file_name"] = "b.png"
    items[1]["sem_seg"] = labels
    if labels is None:
        del items[1]["sem_seg"]
    with pytest.raises(error, match=message):
        model.train()(items)
