"""The base class of one-stage detectors, tested on a minimal detector."""

import pytest
import torch
from torch import nn

from detlib.layers import ShapeSpec
from detlib.modeling import Backbone
from detlib.modeling.meta_arch import DenseDetector
from detlib.structures import Boxes, Instances
from tests.builders import random_image, training_batch


class Pyramid(Backbone):
    """A backbone that averages over 8 x 8 and 4 x 4 pixels."""

    def forward(self, x):
        return {"coarse": nn.functional.avg_pool2d(x, 8), "fine": nn.functional.avg_pool2d(x, 4)}

    def output_shape(self):
        return {"coarse": ShapeSpec(channels=3, stride=8), "fine": ShapeSpec(channels=3, stride=4)}

    @property
    def size_divisibility(self):
        return 8


class Head(nn.Module):
    def forward(self, features):
        return (features,)


class Detector(DenseDetector):
    num_classes = 3

    def forward_training(self, images, features, predictions, gt_instances):
        return {"loss": sum(p.mean() for p in predictions[0]), "objects": sum(len(x) for x in gt_instances)}

    def forward_inference(self, images, features, predictions):
        self.seen = [tuple(f.shape) for f in features]
        return [
            Instances(
                size,
                pred_boxes=Boxes(torch.tensor([[1.0, 2, 200, 30]])),
                scores=torch.ones(1),
                pred_classes=torch.zeros(1, dtype=torch.int64),
            )
            for size in images.image_sizes
        ]


def detector(**kwargs):
    return Detector(Pyramid(), Head(), pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3, **kwargs)


def test_default_features_are_in_ascending_stride_order():
    model = detector().eval()
    assert model.head_in_features == ["fine", "coarse"]
    model([{"image": random_image(64, 96)}])
    assert model.seen == [(1, 3, 16, 24), (1, 3, 8, 12)]
    assert detector(head_in_features=("coarse",)).head_in_features == ["coarse"]


def test_outputs_are_scaled_and_clipped_to_the_output_size():
    model = detector().eval()
    items = [{"image": random_image(64, 96), "height": 32, "width": 192}, {"image": random_image(40, 48)}]
    first, second = (x["instances"] for x in model(items))
    assert first.image_size == (32, 192) and first.pred_boxes.tensor.tolist() == [[2, 1, 192, 15]]
    assert second.image_size == (40, 48) and second.pred_boxes.tensor.tolist() == [[1, 2, 48, 30]]


def test_training_gets_ground_truth_on_the_model_device():
    assert detector().train()(training_batch((False, True)))["objects"] == 2


def test_wrong_inputs_and_features_raise():
    with pytest.raises(ValueError, match=r"head_in_features is \['p3'\]; .* \['coarse', 'fine'\]"):
        detector(head_in_features=["p3"])
    with pytest.raises(ValueError, match="must have the same length"):
        Detector(Pyramid(), Head(), pixel_mean=[0.0] * 3, pixel_std=[1.0])
    model = detector().train()
    with pytest.raises(ValueError, match="Training needs 'instances'.* item 1 of the batch"):
        model([training_batch()[0], {"image": random_image()}])
    batch = training_batch()
    batch[1]["instances"].gt_classes[0] = 3
    with pytest.raises(ValueError, match=r"item 1 .* must be in \[0, 3\) \(num_classes\), got \[1, 3\]"):
        model(batch)


def test_subclass_without_abstract_methods_cannot_be_built():
    class Half(DenseDetector):
        def forward_training(self, images, features, predictions, gt_instances):
            return {}

    with pytest.raises(TypeError, match="forward_inference"):
        Half(Pyramid(), Head(), pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)


def test_moving_average_is_not_in_the_state_dict():
    model = detector()
    assert model._ema_update("average", 10, 100) == pytest.approx(91)
    assert model._ema_update("average", 1, 100, momentum=0.5) == pytest.approx(46)
    assert model.average == pytest.approx(46) and not model.state_dict()


def test_predictions_are_rearranged_to_rows_per_anchor():
    maps = [torch.arange(2 * 6 * 4.0).view(2, 6, 2, 2), torch.zeros(2, 6, 1, 1)]
    logits, deltas = detector()._transpose_dense_predictions([maps, maps], [3, 2])
    assert [tuple(x.shape) for x in logits + deltas] == [(2, 8, 3), (2, 2, 3), (2, 12, 2), (2, 3, 2)]
    assert logits[0][0, 1].tolist() == [12, 16, 20]  # pixel 0, second anchor
