"""Whole models against the papers' formulas: every layer's predictions, every loss, every gradient."""

import pytest
import torch

from detlib.modeling.detr.query_detector import padding_masks
from tests.modeling.detr import slow_models as slow
from tests.modeling.detr.small_models import (
    NUM_CLASSES,
    NUM_QUERIES,
    SIZES,
    batch,
    small_deformable_detr,
    small_detr,
    small_dino,
)

NUM_LAYERS = SIZES["num_layers"]
PICTURES = ((64, 96), (80, 64), (48, 40))
# Position embeddings and the weight of DETR's background are single precision in double models too.
CLOSE = dict(rtol=1e-4, atol=1e-5)


class Comparison:
    """A model in double precision with all weights drawn anew, a batch, and a copy of the weights."""

    def __init__(self, model, counts):
        self.model = model.double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                drawn = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                scaled = drawn * (1.5 * p[0].numel() ** -0.5 if p.dim() > 1 else 0.1)
                p.copy_(scaled + (p.dim() == 1 and "norm" in name and name.endswith("weight")))
            if hasattr(model.transformer, "enc_output"):
                # Cells without a proposal then score in the middle, so that the best are others.
                model.transformer.enc_output.bias.zero_()
        items = batch(counts, PICTURES)
        for item in items:
            item["instances"].gt_classes[:1] = NUM_CLASSES - 1  # next to the background
        self.images = model.preprocess_image(items)
        self.truth = model.prepare_targets([item["instances"] for item in items])
        self.truth[0]["boxes"][:1, 2] = 5e-4  # narrower than logits can tell
        self.num_boxes = max(sum(counts), 1)
        state = model.state_dict()
        self.weights = {name: value.clone().requires_grad_() for name, value in state.items()}
        self.want = {}

    def masks(self, maps):
        """The mask of the pixel that each cell begins with."""
        mask = padding_masks(self.images)
        height, width = mask.shape[1:]
        found = []
        for x in maps:
            rows = torch.arange(x.shape[2]) * height // x.shape[2]
            columns = torch.arange(x.shape[3]) * width // x.shape[3]
            found.append(mask[:, rows][:, :, columns])
        return found

    def maps(self):
        with torch.no_grad():
            return self.model.neck(self.model.backbone(self.images.tensor))

    def layer(self, suffix, found, want, truth, matches=None, num_boxes=None, **kwargs):
        """Compare a layer's predictions, and note its losses."""
        for name, tensor in zip(("pred_logits", "pred_boxes"), want):
            torch.testing.assert_close(found[name], tensor, **CLOSE)
        matcher = self.model.criterion.matcher
        costs = (matcher.cost_class, matcher.cost_bbox, matcher.cost_giou)
        if matches is None:
            matches = slow.slow_matches(*want, truth, costs, is_softmax="eos_coef" in kwargs)
        losses = slow.slow_losses(*want, truth, matches, num_boxes or self.num_boxes, **kwargs)
        self.want.update({name + suffix: loss for name, loss in losses.items()})

    def losses_and_gradients(self, outputs):
        losses = self.model.losses(outputs, self.truth)
        assert losses.keys() == self.want.keys()
        for name, loss in losses.items():
            torch.testing.assert_close(loss, self.want[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
        # Unequal weights, so that no two losses can stand in for each other.
        for found in (losses, self.want):
            sum((1 + i / 7) * found[name] for i, name in enumerate(sorted(found))).backward()
        compared = set()
        for name, p in self.model.named_parameters(remove_duplicate=False):
            grad = self.weights[name].grad
            if grad is not None:
                torch.testing.assert_close(p.grad, grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
                compared.add(id(p))
        rest = {name for name, p in self.model.named_parameters() if id(p) not in compared}
        assert all(name.startswith(("backbone.", "neck.")) for name in rest), rest


@pytest.mark.parametrize("counts", [(5, 0, 1), (0, 0, 0)])
def test_detr(counts):
    model = small_detr()
    case = Comparison(model, counts)
    outputs = model.predict(case.images, case.truth)
    with torch.no_grad():
        x = model.backbone(case.images.tensor)["res5"]
    first, last = slow.slow_detr(case.weights, x, case.masks([x])[0], NUM_LAYERS)
    case.layer("", outputs, last, case.truth, eos_coef=0.1)
    case.layer("_0", outputs["aux_outputs"][0], first, case.truth, eos_coef=0.1)
    case.losses_and_gradients(outputs)


@pytest.mark.parametrize("counts", [(5, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("refines, two_stage", [(False, False), (True, False), (True, True)])
def test_deformable_detr(refines, two_stage, counts):
    model = small_deformable_detr(refines, two_stage)
    case = Comparison(model, counts)
    outputs = model.predict(case.images, case.truth)
    maps = case.maps()
    (first, last), of_encoder = slow.slow_deformable_detr(
        case.weights, maps, case.masks(maps), NUM_LAYERS, NUM_QUERIES, refines, two_stage
    )
    case.layer("", outputs, last, case.truth)
    case.layer("_0", outputs["aux_outputs"][0], first, case.truth)
    if two_stage:
        as_one_class = [{**t, "labels": t["labels"] * 0} for t in case.truth]
        case.layer("_enc", outputs["enc_outputs"], of_encoder, as_one_class)
    case.losses_and_gradients(outputs)


def denoising_by_hand(case, groups, part):
    """Contents, boxes, who must not see whom, and matches of denoising queries.

    All corners lie `part` of half the box's size further to the lower right, those of negative ones one more.
    """
    most = max(max(len(t["labels"]) for t in case.truth), 1)
    count = groups * 2 * most if any(len(t["labels"]) for t in case.truth) else 0
    table = case.weights["label_enc.weight"]
    contents, boxes, matches = [], [], []
    for target in case.truth:
        own, own_boxes, pairs = [], [], []
        for query in range(count):
            place, is_negative = query % most, query // most % 2
            if place >= len(target["labels"]):
                own.append(0 * table[0])
                own_boxes.append(torch.full((4,), 0.5).double())
                continue
            own.append(table[target["labels"][place]])
            cx, cy, w, h = target["boxes"][place]
            shift = (part + is_negative) / 2
            x0, x1 = ((cx + side * w / 2 + shift * w).clamp(0, 1) for side in (-1, 1))
            y0, y1 = ((cy + side * h / 2 + shift * h).clamp(0, 1) for side in (-1, 1))
            moved = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
            own_boxes.append(slow.logit(moved).sigmoid())
            if not is_negative:
                pairs.append((query, place))
        contents.append(torch.stack(own) if own else table[:0])
        boxes.append(torch.stack(own_boxes) if own else torch.zeros(0, 4).double())
        matches.append(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1))
    group = torch.arange(count) // (2 * most)
    return (torch.stack(contents), torch.stack(boxes), group[:, None] != group), matches


@pytest.mark.parametrize(
    "counts, num_levels, looks_twice, learned",
    [
        ((5, 0, 1), 4, True, True),
        ((1, 0, 0), 4, False, True),
        ((1, 2, 2), 5, True, False),
        ((0, 0, 0), 4, True, True),
    ],
)
def test_dino(counts, num_levels, looks_twice, learned, monkeypatch):
    groups, part = 6, 0.25
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, part))
    monkeypatch.setattr(torch, "randint_like", lambda x, high: torch.ones_like(x))
    model = small_dino(
        learnt_init_query=learned,
        num_levels=num_levels,
        look_forward_twice=looks_twice,
        dn_number=groups // 2,
        label_noise_ratio=0.0,
        box_noise_scale=1.0,
    )
    case = Comparison(model, counts)
    outputs = model.predict(case.images, case.truth)
    denoising, matches = denoising_by_hand(case, groups, part)
    maps = case.maps()
    layers, of_encoder = slow.slow_dino(
        case.weights, maps, case.masks(maps), NUM_LAYERS, NUM_QUERIES, denoising, looks_twice
    )
    count = len(denoising[2])
    for suffix, found, layer in zip(("_0", ""), (outputs["aux_outputs"][0], outputs), layers):
        case.layer(suffix, found, [x[:, count:] for x in layer], case.truth)
    case.layer("_enc", outputs["enc_outputs"], of_encoder, case.truth)
    if not count:
        assert outputs["dn_metas"] is None
        zero = torch.zeros(())
        case.want |= {f"loss_{x}_dn{i}": zero for x in ("class", "bbox", "giou") for i in ("", "_0")}
    else:
        known = outputs["dn_metas"]["output_known_lbs_bboxes"]
        num_boxes = case.num_boxes * groups
        for suffix, found, layer in zip(("_dn_0", "_dn"), (known["aux_outputs"][0], known), layers):
            case.layer(suffix, found, [x[:, :count] for x in layer], case.truth, matches, num_boxes)
    case.losses_and_gradients(outputs)
