"""Training a detector of rotated boxes on generated data."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from detlib.config import get_cfg
from detlib.data import DatasetCatalog, DatasetMapper
from detlib.data import transforms as T
from detlib.data.detection_utils import read_image
from detlib.engine import DefaultPredictor, DefaultTrainer
from detlib.evaluation import COCOEvaluator
from detlib.layers import ShapeSpec
from detlib.modeling import Backbone, GeneralizedRCNN, build_model
from detlib.modeling.anchor_generator import RotatedAnchorGenerator
from detlib.modeling.box_regression import Box2BoxTransformRotated
from detlib.modeling.matcher import Matcher
from detlib.modeling.poolers import ROIPooler
from detlib.modeling.proposal_generator import RRPN, StandardRPNHead
from detlib.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers, RROIHeads
from detlib.structures import RotatedBoxes
from detlib.visualization.visualizer import Visualizer

CONFIG = Path(__file__).parents[2] / "configs/Quickstart/rotated_faster_rcnn_R_18_FPN_shapes.yaml"
NAME = "shapes:train?rotated=1&num=3&size=64&seed=3"
CHANNELS = 48


class TinyBackbone(Backbone):
    """Four convolutions and a feature map of stride 4."""

    def __init__(self):
        super().__init__()
        layers = []
        for source, target, stride, dilation in (
            (3, 24, 2, 1),
            (24, 48, 2, 1),
            (48, 48, 1, 2),
            (48, 48, 1, 3),
        ):
            conv = nn.Conv2d(source, target, 3, stride, padding=dilation, dilation=dilation)
            layers += [conv, nn.GroupNorm(8, target), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return {"map": self.layers(x)}

    def output_shape(self):
        return {"map": ShapeSpec(channels=CHANNELS, stride=4)}


def build_tiny_model():
    """Build the model with constructors, like lazy configs."""
    anchors = RotatedAnchorGenerator(
        sizes=[[11, 17]], aspect_ratios=[[0.2, 0.5]], angles=[[-90, -60, -30, 0, 30, 60]], strides=[4]
    )
    rrpn = RRPN(
        in_features=["map"],
        head=StandardRPNHead(in_channels=CHANNELS, num_anchors=24, box_dim=5),
        anchor_generator=anchors,
        anchor_matcher=Matcher([0.3, 0.6], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransformRotated((1, 1, 1, 1, 1)),
        batch_size_per_image=32,
        positive_fraction=0.5,
        pre_nms_topk=(300, 300),
        post_nms_topk=(60, 60),
        loss_weight={"loss_rpn_loc": 4.0},
    )
    box_head = FastRCNNConvFCHead(
        ShapeSpec(channels=CHANNELS, height=7, width=7), conv_dims=[], fc_dims=[128]
    )
    heads = RROIHeads(
        num_classes=2,
        batch_size_per_image=16,
        positive_fraction=0.5,
        proposal_matcher=Matcher([0.5], [0, 1]),
        box_in_features=["map"],
        box_pooler=ROIPooler(7, [1 / 4], 2, "ROIAlignRotated"),
        box_head=box_head,
        box_predictor=FastRCNNOutputLayers(
            box_head.output_shape,
            box2box_transform=Box2BoxTransformRotated((10, 10, 5, 5, 1)),
            num_classes=2,
            test_score_thresh=0.05,
            loss_weight={"loss_box_reg": 5.0},
        ),
    )
    return GeneralizedRCNN(
        backbone=TinyBackbone(),
        proposal_generator=rrpn,
        roi_heads=heads,
        pixel_mean=[110.0] * 3,
        pixel_std=[60.0] * 3,
    )


def average_precision(model, batch):
    evaluator = COCOEvaluator(NAME, distributed=False)
    with torch.no_grad():
        evaluator.process(batch, model.eval()(batch))
    model.train()
    return evaluator.evaluate()["bbox"]


def test_a_rotated_detector_overfits_generated_boxes():
    torch.manual_seed(0)
    mapper = DatasetMapper(True, augmentations=[T.NoOpTransform()], image_format="BGR")
    batch = [mapper(record) for record in DatasetCatalog.get(NAME)]
    assert all(type(item["instances"].gt_boxes) is RotatedBoxes for item in batch)
    model = build_tiny_model()
    steps = 160
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    before = average_precision(model, batch)["AP50"]
    for _ in range(steps):
        losses = sum(model(copy.copy(batch)).values())
        optimizer.zero_grad()
        losses.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    after = average_precision(model, batch)
    assert before < 5 and after["AP50"] > 95 and after["AP"] > 80, (before, after)


def quickstart(*overrides):
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIG))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *overrides])
    return cfg


def test_predicted_rotated_boxes_are_in_the_frame_of_the_image(tmp_path):
    """The network input has twice the height and width of the image."""
    name = "shapes:val?rotated=1&num=2&size=64"
    cfg = quickstart("INPUT.MIN_SIZE_TEST", 128, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    cfg.DATASETS.TEST = (name,)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    predictor = DefaultPredictor(cfg)
    record = DatasetCatalog.get(name)[1]
    image = read_image(record["file_name"], "RGB")
    instances = predictor(image[:, :, ::-1])["instances"]
    assert type(instances.pred_boxes) is RotatedBoxes and instances.image_size == (64, 64)
    assert 0 < len(instances) <= 100 and instances.pred_boxes.inside_box((64, 64), 8).all()
    mapped = DatasetMapper(cfg, is_train=False)(record)
    with torch.no_grad():
        (direct,) = model([mapped])
    torch.testing.assert_close(instances.pred_boxes.tensor, direct["instances"].pred_boxes.tensor)
    torch.testing.assert_close(instances.scores, direct["instances"].scores)

    drawn = Visualizer(image, predictor.metadata, scale=4).draw_instance_predictions(instances[:3])
    assert len(drawn.ax.lines) == 6 and len(drawn.ax.texts) == 3
    plain = Visualizer(image, scale=4).get_output().get_image()
    assert (drawn.get_image() != plain).any(axis=2).sum() > 100


@pytest.mark.slow
def test_the_rotated_quickstart_config_learns(tmp_path):
    """Train the full config. The bounds are reached after a third of its schedule."""
    cfg = quickstart("OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", 0, "SEED", 1)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert results["bbox"]["AP50"] > 40 and results["bbox"]["AP"] > 15, results
