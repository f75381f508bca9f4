"""Fields, indexing and concatenation of Instances."""

import copy
import pickle

import numpy as np
import pytest
import torch

from detlib.structures import Boxes, Instances, PolygonMasks
from tests.builders import assert_instances_allclose, circle_polygon, random_boxes


def make_instances(num=4, seed=0):
    return Instances(
        (100, 120),
        gt_boxes=Boxes(random_boxes(num, seed=seed)),
        gt_classes=torch.arange(num),
        gt_masks=PolygonMasks([[circle_polygon(10 * i, 20, 5)] for i in range(num)]),
        names=[f"object{i}" for i in range(num)],
    )


def test_fields_are_attributes():
    instances = Instances((10, 20))
    assert len(instances) == 0 and instances.image_size == (10, 20)
    instances.scores = torch.tensor([0.1, 0.2])
    instances.set("labels", [3, 4])
    assert len(instances) == 2
    assert instances.has("labels") and not instances.has("other")
    assert instances.get("labels") == [3, 4] and instances.labels == [3, 4]
    assert list(instances.get_fields()) == ["scores", "labels"]
    instances.remove("labels")
    assert not instances.has("labels")
    instances._private = "anything"
    assert not instances.has("_private") and instances._private == "anything"


def test_only_field_may_change_length():
    instances = Instances((10, 20), scores=torch.zeros(2))
    instances.scores = torch.zeros(3)
    assert len(instances) == 3


def test_unequal_length_error_names_field_and_lengths():
    instances = Instances((10, 20), scores=torch.zeros(2))
    with pytest.raises(ValueError, match=r"'labels' has 3 entries, other fields differ \(scores: 2\)"):
        instances.labels = [1, 2, 3]


def test_missing_field_error_lists_fields():
    instances = Instances((10, 20), scores=torch.zeros(2))
    with pytest.raises(AttributeError, match="no field 'boxes'. Fields: scores"):
        _ = instances.boxes
    with pytest.raises(KeyError, match="no field 'boxes'. Fields: scores"):
        instances.get("boxes")
    with pytest.raises(KeyError, match="no field 'boxes'"):
        instances.remove("boxes")
    with pytest.raises(AttributeError, match="'image_size' cannot be a field"):
        instances.image_size = [1, 2]


@pytest.mark.parametrize(
    "item, rows",
    [
        (0, [0]),
        (-1, [3]),
        (np.int64(2), [2]),
        (slice(1, None), [1, 2, 3]),
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor([False, True, True, False]), [1, 2]),
        ([3, 1], [3, 1]),
        (torch.zeros(4, dtype=torch.bool), []),
    ],
)
def test_indexing_selects_all_fields(item, rows):
    instances = make_instances()
    selected = instances[item]
    assert len(selected) == len(rows)
    assert torch.equal(selected.gt_boxes.tensor, instances.gt_boxes.tensor[rows])
    assert selected.gt_classes.tolist() == rows
    assert selected.names == [f"object{i}" for i in rows]
    assert [p[0].tolist() for p in selected.gt_masks] == [
        instances.gt_masks.polygons[i][0].tolist() for i in rows
    ]
    assert selected.image_size == (100, 120)


def test_index_out_of_range_raises_and_iteration_stops():
    instances = make_instances()
    with pytest.raises(IndexError, match="4 is out of range for 4"):
        instances[4]
    assert [single.gt_classes.item() for single in instances] == [0, 1, 2, 3]


def test_cat_concatenates_all_fields():
    first, second = make_instances(2), make_instances(3, seed=1)
    joined = Instances.cat([first, second])
    assert len(joined) == 5
    assert torch.equal(joined.gt_boxes.tensor, torch.cat([first.gt_boxes.tensor, second.gt_boxes.tensor]))
    assert joined.gt_classes.tolist() == [0, 1, 0, 1, 2]
    assert joined.names == first.names + second.names
    assert len(joined.gt_masks) == 5
    assert_instances_allclose(joined[:2], first)


def test_cat_rejects_different_sizes_and_fields():
    first = make_instances(2)
    with pytest.raises(ValueError, match=r"Image sizes differ: \(100, 120\) and \(5, 5\)"):
        Instances.cat([first, Instances((5, 5))])
    with pytest.raises(ValueError, match="Fields differ"):
        Instances.cat([first, Instances((100, 120), gt_classes=torch.zeros(1))])
    with pytest.raises(ValueError, match="at least one"):
        Instances.cat([])
    with pytest.raises(TypeError, match="got int"):
        Instances.cat([first, 3])
    odd = Instances((1, 1), text="ab")
    with pytest.raises(TypeError, match="'text' of type str"):
        Instances.cat([odd, odd])


def test_to_moves_fields_that_have_to():
    moved = make_instances().to("meta")
    assert moved.gt_boxes.device.type == "meta" and moved.gt_classes.device.type == "meta"
    assert moved.gt_masks.device.type == "cpu" and moved.names[0] == "object0"


def test_pickle_and_deepcopy_keep_fields():
    instances = make_instances()
    for twin in (pickle.loads(pickle.dumps(instances)), copy.deepcopy(instances)):
        assert torch.equal(twin.gt_boxes.tensor, instances.gt_boxes.tensor)
        assert twin.image_size == instances.image_size and twin.names == instances.names


def test_repr():
    text = repr(Instances((10, 20), scores=torch.tensor([0.5])))
    assert "num_instances=1" in text and "image_height=10" in text and "scores: tensor([0.5000])" in text
