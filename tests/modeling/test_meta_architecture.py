"""Model facts, which the engine and the data loaders read, of built-in and third-party models."""

import pytest
import torch
from torch import nn

from detlib.config import CfgNode, LazyConfig, configurable, get_cfg
from detlib.engine import DefaultTrainer, LazyTrainer
from detlib.engine.distributed import ddp
from detlib.evaluation import COCOEvaluator
from detlib.modeling import (
    DETR,
    DINO,
    FCOS,
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    MetaArchitecture,
    PanopticFPN,
    ProposalNetwork,
    RetinaNet,
    SemanticSegmentor,
    facts_of,
)
from detlib.structures import Boxes, Instances
from tests.builders import tiny_cfg, tiny_lazy_config


class OneBoxDetector(MetaArchitecture):
    """A new meta architecture, defined in this test only. It predicts a fixed box and learns its class."""

    reference_lr_per_image = 0.001
    compile_modules = ("backbone", "classifier")

    @configurable
    def __init__(self, *, num_classes, pixel_mean, pixel_std):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 8, stride=8)
        self.classifier = nn.Linear(4, num_classes)
        self.num_classes = num_classes
        self.register_pixel_stats(pixel_mean, pixel_std)

    @classmethod
    def from_config(cls, cfg):
        return {
            "num_classes": cfg.MODEL.ONE_BOX.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @classmethod
    def num_classes_keys(cls, cfg):
        return {"thing_classes": "MODEL.ONE_BOX.NUM_CLASSES"}

    @classmethod
    def outputs(cls, cfg):
        return frozenset({"instances"})

    def forward(self, batched_inputs):
        images = self.preprocess_image(batched_inputs)
        logits = self.classifier(self.backbone(images.tensor).mean(dim=(2, 3)))
        if self.training:
            ground_truth = self.take_ground_truth(
                batched_inputs, self.num_classes, "MODEL.ONE_BOX.NUM_CLASSES"
            )
            wanted = torch.stack([t.gt_classes[0] for t in ground_truth])
            return {"loss_cls": nn.functional.cross_entropy(logits, wanted)}
        scores, classes = logits.softmax(dim=1).max(dim=1, keepdim=True)
        found = [
            Instances(
                size, pred_boxes=Boxes(torch.tensor([[0.0, 0.0, 32.0, 32.0]])), scores=s, pred_classes=c
            )
            for size, s, c in zip(images.image_sizes, scores, classes)
        ]
        found = self.scale_to_output_size(found, batched_inputs, images.image_sizes)
        return [{"instances": x} for x in found]


@pytest.fixture
def one_box():
    """Register `OneBoxDetector` during a test, and return its name."""
    META_ARCH_REGISTRY.register(OneBoxDetector)
    yield "OneBoxDetector"
    del META_ARCH_REGISTRY._obj_map["OneBoxDetector"]


def one_box_cfg(folder, name, **overrides) -> CfgNode:
    cfg = tiny_cfg(folder)
    cfg.MODEL.ONE_BOX = CfgNode({"NUM_CLASSES": 3})
    cfg.MODEL.META_ARCHITECTURE = name
    for key, value in overrides.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def test_new_architecture_trains_and_evaluates_without_changes_elsewhere(one_box, tmp_path):
    data = "shapes:train?num=4&size=64&task=panoptic"
    cfg = one_box_cfg(tmp_path, one_box, DATASETS__TEST=(data,), DATASETS__TRAIN=(data,))
    trainer = DefaultTrainer(cfg)
    assert trainer.model.num_classes == 3
    before = trainer.model.classifier.weight.clone()
    results = trainer.train()
    assert trainer.iter == 2 and not torch.equal(trainer.model.classifier.weight, before)
    assert results.keys() == {"bbox"} and 0 <= results["bbox"]["AP"] <= 100  # no semantic or panoptic metrics
    assert isinstance(DefaultTrainer.build_evaluator(cfg, cfg.DATASETS.TEST[0]), COCOEvaluator)
    assert ddp.compile_parts(trainer.model, backend="eager") == ["backbone", "classifier"]


def test_number_of_classes_of_a_new_architecture_is_compared_with_the_dataset(one_box, tmp_path):
    cfg = one_box_cfg(tmp_path, one_box, MODEL__ONE_BOX__NUM_CLASSES=2)
    with pytest.raises(ValueError, match="MODEL.ONE_BOX.NUM_CLASSES is 2"):
        DefaultTrainer(cfg)


def test_divergence_error_names_reference_learning_rate_of_a_new_architecture(one_box, tmp_path):
    cfg = one_box_cfg(tmp_path, one_box, SOLVER__BASE_LR=1e30)
    with pytest.raises(FloatingPointError, match="0.016 for 16, .* 0.002 here"):
        DefaultTrainer(cfg).train()


def test_lazy_fcos_has_the_reference_learning_rate_of_dense_detectors(tmp_path):
    # The learning rate is high for dense detectors, though not for R-CNN with 0.02 for 16. The loss overflows
    # in the first step.
    cfg = tiny_lazy_config(tmp_path, "optimizer.lr=0.0025", "model.focal_loss_alpha=1e60")
    with pytest.raises(FloatingPointError, match="0.01 for 16, .* 0.00125 here"):
        LazyTrainer(cfg).train()


@pytest.mark.parametrize("name, model", [("fcos", FCOS), ("retinanet", RetinaNet)])
def test_shipped_lazy_dense_detectors_use_their_reference_learning_rate(name, model):
    cfg = LazyConfig.load(f"configs/COCO-Detection/{name}_R_50_FPN_1x.py")
    assert cfg.model._target_ is model
    assert cfg.optimizer.lr / cfg.dataloader.train.total_batch_size == model.reference_lr_per_image


@pytest.mark.parametrize(
    "model, rate",
    [(GeneralizedRCNN, 0.02), (PanopticFPN, 0.02), (RetinaNet, 0.01), (DINO, 1e-4), (DETR, 1e-4 / 4)],
)
def test_reference_learning_rates_for_16_images(model, rate):
    assert 16 * model.reference_lr_per_image == pytest.approx(rate)


@pytest.mark.parametrize(
    "name, options, wanted",
    [
        ("GeneralizedRCNN", {}, {"instances"}),
        ("GeneralizedRCNN", {"MASK_ON": True}, {"instances", "masks"}),
        ("PanopticFPN", {"MASK_ON": True}, {"instances", "masks", "sem_seg", "panoptic_seg"}),
        ("PanopticFPN", {"PANOPTIC_FPN.COMBINE.ENABLED": False}, {"instances", "sem_seg"}),
        ("ProposalNetwork", {}, {"proposals"}),
        ("RetinaNet", {"MASK_ON": True}, {"instances"}),
        ("SemanticSegmentor", {}, {"sem_seg"}),
        ("no.such.Model", {}, {"instances", "masks", "proposals", "sem_seg", "panoptic_seg"}),
    ],
)
def test_outputs_follow_from_the_config(name, options, wanted):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", name])
    cfg.merge_from_list([x for key, value in options.items() for x in (f"MODEL.{key}", value)])
    assert facts_of(cfg).outputs(cfg) == wanted


def test_third_party_models_have_the_default_facts():
    class ThirdParty(nn.Module):
        outputs = "something else"

    facts = facts_of(ThirdParty())
    assert facts is MetaArchitecture and facts.num_classes_keys(get_cfg()) == {} and not facts.supports_tta


def test_facts_of_built_in_models_are_read_from_their_class():
    cfg = get_cfg()
    for entry in (GeneralizedRCNN, PanopticFPN, ProposalNetwork, RetinaNet, SemanticSegmentor):
        cfg.MODEL.META_ARCHITECTURE = entry.__name__
        assert facts_of(cfg) is entry
    assert "FCOS" not in META_ARCH_REGISTRY  # as in detectron2


def test_base_class_adds_nothing_to_the_state_dict():
    model = MetaArchitecture()
    model.register_pixel_stats([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert not model.state_dict() and not list(model.parameters()) and not list(model.children())
    assert model.pixel_mean.shape == (3, 1, 1) and model.device == torch.device("cpu")
