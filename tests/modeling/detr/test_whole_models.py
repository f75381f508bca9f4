"""Tests of complete models against the formulas of their papers: all predictions, losses and gradients."""

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
IMAGE_SIZES = ((64, 96), (80, 64), (48, 40))
# Position embeddings and the weight of DETR's background class are float32 in float64 models too.
CLOSE = dict(rtol=1e-4, atol=1e-5)


class Comparison:
    """A float64 model with random weights, a batch, and a copy of the weights for the reference."""

    def __init__(self, model, counts):
        self.model = model.double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                drawn = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                scaled = drawn * (1.5 * p[0].numel() ** -0.5 if p.dim() > 1 else 0.1)
                p.copy_(scaled + (p.dim() == 1 and "norm" in name and name.endswith("weight")))
            if hasattr(model.transformer, "enc_output"):
                # Cells without a proposal get medium scores, so that the best cells have proposals.
                model.transformer.enc_output.bias.zero_()
        items = batch(counts, IMAGE_SIZES)
        for item in items:
            item["instances"].gt_classes[:1] = NUM_CLASSES - 1  # next to the background
        self.images = model.preprocess_image(items)
        self.targets = model.prepare_targets([item["instances"] for item in items])
        self.targets[0]["boxes"][:1, 2] = 5e-4  # narrower than the clamp of the logits
        self.num_boxes = max(sum(counts), 1)
        state = model.state_dict()
        self.weights = {name: value.clone().requires_grad_() for name, value in state.items()}
        self.want = {}

    def masks(self, maps):
        """Return the padding mask of each feature map, sampled at the first pixel of each cell."""
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

    def layer(self, suffix, found, want, targets, matches=None, num_boxes=None, **kwargs):
        """Compare the predictions of a layer, and store its expected losses."""
        for name, tensor in zip(("pred_logits", "pred_boxes"), want):
            torch.testing.assert_close(found[name], tensor, **CLOSE)
        matcher = self.model.criterion.matcher
        costs = (matcher.cost_class, matcher.cost_bbox, matcher.cost_giou)
        if matches is None:
            matches = slow.slow_matches(*want, targets, costs, is_softmax="eos_coef" in kwargs)
        losses = slow.slow_losses(*want, targets, matches, num_boxes or self.num_boxes, **kwargs)
        self.want.update({name + suffix: loss for name, loss in losses.items()})

    def losses_and_gradients(self, outputs):
        losses = self.model.losses(outputs, self.targets)
        assert losses.keys() == self.want.keys()
        for name, loss in losses.items():
            torch.testing.assert_close(loss, self.want[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
        # Unequal weights, so that swapped losses are detected.
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
def test_detr_matches_its_paper(counts):
    model = small_detr()
    case = Comparison(model, counts)
    outputs = model.predict(case.images, case.targets)
    with torch.no_grad():
        x = model.backbone(case.images.tensor)["res5"]
    first, last = slow.slow_detr(case.weights, x, case.masks([x])[0], NUM_LAYERS)
    case.layer("", outputs, last, case.targets, eos_coef=0.1)
    case.layer("_0", outputs["aux_outputs"][0], first, case.targets, eos_coef=0.1)
    case.losses_and_gradients(outputs)


@pytest.mark.parametrize("counts", [(5, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("refines, two_stage", [(False, False), (True, False), (True, True)])
def test_deformable_detr_matches_its_paper(refines, two_stage, counts):
    model = small_deformable_detr(refines, two_stage)
    case = Comparison(model, counts)
    outputs = model.predict(case.images, case.targets)
    maps = case.maps()
    (first, last), of_encoder = slow.slow_deformable_detr(
        case.weights, maps, case.masks(maps), NUM_LAYERS, NUM_QUERIES, refines, two_stage
    )
    case.layer("", outputs, last, case.targets)
    case.layer("_0", outputs["aux_outputs"][0], first, case.targets)
    if two_stage:
        as_one_class = [{**t, "labels": t["labels"] * 0} for t in case.targets]
        case.layer("_enc", outputs["enc_outputs"], of_encoder, as_one_class)
    case.losses_and_gradients(outputs)


def denoising_by_hand(case, groups, part):
    """Return contents, boxes and attention mask of denoising queries as a triple, and their matches.

    All corners are shifted to the lower right, by `part` half sizes of the box for positive queries and by
    `part + 1` for negative queries.
    """
    most = max(max(len(t["labels"]) for t in case.targets), 1)
    count = groups * 2 * most if any(len(t["labels"]) for t in case.targets) else 0
    table = case.weights["label_enc.weight"]
    contents, boxes, matches = [], [], []
    for target in case.targets:
        own, own_boxes, pairs = [], [], []
        for query in range(count):
            obj, is_negative = query % most, query // most % 2
            if obj >= len(target["labels"]):
                own.append(0 * table[0])
                own_boxes.append(torch.full((4,), 0.5).double())
                continue
            own.append(table[target["labels"][obj]])
            cx, cy, w, h = target["boxes"][obj]
            shift = (part + is_negative) / 2
            x0, x1 = ((cx + side * w / 2 + shift * w).clamp(0, 1) for side in (-1, 1))
            y0, y1 = ((cy + side * h / 2 + shift * h).clamp(0, 1) for side in (-1, 1))
            moved = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
            own_boxes.append(slow.logit(moved).sigmoid())
            if not is_negative:
                pairs.append((query, obj))
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
def test_dino_matches_its_paper(counts, num_levels, looks_twice, learned, monkeypatch):
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
    outputs = model.predict(case.images, case.targets)
    denoising, matches = denoising_by_hand(case, groups, part)
    maps = case.maps()
    layers, of_encoder = slow.slow_dino(
        case.weights, maps, case.masks(maps), NUM_LAYERS, NUM_QUERIES, denoising, looks_twice
    )
    count = len(denoising[2])
    for suffix, found, layer in zip(("_0", ""), (outputs["aux_outputs"][0], outputs), layers):
        case.layer(suffix, found, [x[:, count:] for x in layer], case.targets)
    case.layer("_enc", outputs["enc_outputs"], of_encoder, case.targets)
    if not count:
        assert outputs["dn_metas"] is None
        zero = torch.zeros(())
        case.want |= {f"loss_{x}_dn{i}": zero for x in ("class", "bbox", "giou") for i in ("", "_0")}
    else:
        known = outputs["dn_metas"]["output_known_lbs_bboxes"]
        num_boxes = case.num_boxes * groups
        for suffix, found, layer in zip(("_dn_0", "_dn"), (known["aux_outputs"][0], known), layers):
            case.layer(suffix, found, [x[:, :count] for x in layer], case.targets, matches, num_boxes)
    case.losses_and_gradients(outputs)
