"""Tests of denoising queries: their layout, noise and attention mask."""

import pytest
import torch
from torch import nn

from detlib.layers import box_cxcywh_to_xyxy, inverse_sigmoid
from detlib.modeling.detr import apply_box_noise, apply_label_noise, make_denoising_queries
from detlib.modeling.detr.denoising import denoising_attention_mask, num_denoising_groups
from tests.modeling.detr.small_models import targets

NUM_CLASSES = 5


def make_queries(gt, dn_number=100, label_noise=0.0, box_noise=0.0, num_queries=7):
    torch.manual_seed(0)
    table = nn.Embedding(NUM_CLASSES, 6)
    found = make_denoising_queries(gt, dn_number, label_noise, box_noise, num_queries, NUM_CLASSES, table)
    return table.weight, *found


@pytest.mark.parametrize(
    "dn_number, objects, groups",
    [(100, 4, 25), (100, 7, 14), (100, 300, 1), (50, 3, 16), (10, 3, 20), (1, 3, 2)],
)
def test_number_of_groups_depends_on_the_objects(dn_number, objects, groups):
    assert num_denoising_groups(dn_number, objects) == groups


def test_layout_without_noise():
    gt = targets((3, 0, 1), num_classes=NUM_CLASSES)
    table, labels, boxes, mask, meta = make_queries(gt)
    groups = 200 // 6
    assert meta == {"single_padding": 6, "dn_num": groups}
    assert labels.shape == (3, 6 * groups, 6) and boxes.shape == (3, 6 * groups, 4)
    assert mask.shape == (6 * groups + 7,) * 2
    for i, target in enumerate(gt):
        for query in range(6 * groups):
            obj = query % 3  # groups alternate three positive and three negative queries
            if obj < len(target["labels"]):
                assert torch.equal(labels[i, query], table[target["labels"][obj]])
                torch.testing.assert_close(boxes[i, query], inverse_sigmoid(target["boxes"][obj]))
            else:
                assert not labels[i, query].any() and not boxes[i, query].any()


def test_box_noise_is_larger_for_negative_boxes():
    """Sides shift by 0 to 1 half sizes for positive boxes, and by 1 to 2 for negative boxes."""
    torch.manual_seed(0)
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.1]).expand(500, 2, 4)
    is_negative = torch.tensor([False, True])
    corners = box_cxcywh_to_xyxy(apply_box_noise(boxes, 1.0, is_negative))
    moved = (corners - torch.tensor([0.4, 0.45, 0.6, 0.55])) / torch.tensor([0.1, 0.05, 0.1, 0.05])
    positive, negative = moved.abs().unbind(1)
    assert 0 <= positive.min() < 0.05 and 0.95 < positive.max() < 1.001
    assert 0.999 < negative.min() < 1.05 and 1.95 < negative.max() < 2.001
    assert moved.sign().mean(dim=(0, 1)).abs().max() < 0.15  # inward and outward shifts are equally likely
    halved = box_cxcywh_to_xyxy(apply_box_noise(boxes, 0.5, is_negative))
    assert 0.09 < (halved[..., 0] - 0.4).abs().max() < 0.1001


def test_second_half_of_each_group_is_negative():
    gt = targets((3, 2), num_classes=NUM_CLASSES)
    _, _, boxes, _, meta = make_queries(gt, box_noise=1e-2)
    exact = make_queries(gt)[2]
    off = (boxes.sigmoid() - exact.sigmoid()).abs().sum(2)[0].reshape(meta["dn_num"], 2, 3).mean(dim=(0, 2))
    assert off[1] > 2 * off[0] > 0


def test_noised_boxes_are_clipped_to_the_image():
    boxes = torch.tensor([[0.05, 0.9, 0.1, 0.2]]).expand(500, 4)
    corners = box_cxcywh_to_xyxy(apply_box_noise(boxes, 2.0, torch.tensor(True)))
    assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6
    assert apply_box_noise(boxes, 0.0) is boxes


def test_label_noise_draws_from_all_classes():
    torch.manual_seed(0)
    labels = torch.full((20000,), 2)
    noisy = apply_label_noise(labels, 0.5, 4)
    frequencies = noisy.bincount(minlength=4) / 20000
    torch.testing.assert_close(frequencies, torch.tensor([0.125, 0.125, 0.625, 0.125]), atol=0.02, rtol=0)
    assert apply_label_noise(labels, 0.0, 4) is labels


def test_half_of_label_noise_ratio_is_the_probability():
    gt = [{"labels": torch.zeros(50, dtype=torch.int64), "boxes": torch.rand(50, 4)}]
    table, labels, *_ = make_queries(gt, dn_number=1000, label_noise=1.0)
    same = (labels[0] == table[0]).all(dim=1).float().mean()
    assert same == pytest.approx(0.5 + 0.5 / NUM_CLASSES, abs=0.05)


def test_attention_mask_hides_groups_from_other_queries():
    mask = denoising_attention_mask(3, 4, 5, torch.device("cpu"))
    for i in range(17):
        for j in range(17):
            of_groups = i < 12 and j < 12
            blocked = i // 4 != j // 4 if of_groups else j < 12
            assert mask[i, j] == blocked, (i, j)
    assert not mask.all(dim=1).any(), "every query must attend to at least one query"


@pytest.mark.parametrize("counts, dn_number", [((0, 0), 100), ((2, 1), 0)])
def test_no_queries_without_objects_or_dn_number(counts, dn_number):
    assert make_queries(targets(counts), dn_number=dn_number)[1:] == (None, None, None, None)


def test_gradients_reach_the_label_embedding():
    table, labels, *_ = make_queries(targets((2, 1), num_classes=NUM_CLASSES), dn_number=3)
    labels.sum().backward()
    used = {int(x) for t in targets((2, 1), num_classes=NUM_CLASSES) for x in t["labels"]}
    assert {i for i in range(NUM_CLASSES) if table.grad[i].any()} == used
