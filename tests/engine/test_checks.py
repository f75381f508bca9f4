"""The number of classes is set from the data, unless the config sets it."""

import pytest

from detlib.config import get_cfg
from detlib.data import MetadataCatalog
from detlib.engine import DefaultTrainer, default_setup
from detlib.engine.checks import check_num_classes, set_num_classes
from tests.builders import tiny_cfg

ROI, RETINANET = "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"
STUFF, POINTS = "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
SHAPES = "shapes:train?num=2&size=32"


def config(architecture="GeneralizedRCNN", name=SHAPES, *options):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.DATASETS.TRAIN = (name,)
    cfg.merge_from_list(list(options))
    return cfg


def numbers(cfg):
    model = cfg.MODEL
    return (
        model.ROI_HEADS.NUM_CLASSES,
        model.RETINANET.NUM_CLASSES,
        model.SEM_SEG_HEAD.NUM_CLASSES,
        model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS,
    )


@pytest.mark.parametrize(
    ("architecture", "options", "expected"),
    [
        ("GeneralizedRCNN", (), (3, 80, 54, 17)),
        ("GeneralizedRCNN", ("MODEL.KEYPOINT_ON", True), (3, 80, 54, 5)),
        ("RetinaNet", (), (80, 3, 54, 17)),
        ("SemanticSegmentor", (), (80, 80, 4, 17)),
        ("PanopticFPN", (), (3, 80, 4, 17)),
        ("ProposalNetwork", (), (80, 80, 54, 17)),
    ],
)
def test_number_of_classes_is_set_from_a_dataset_uri(architecture, options, expected, log):
    cfg = config(architecture, SHAPES, *options)
    cfg.freeze()
    set_num_classes(cfg)
    assert numbers(cfg) == expected and cfg.is_frozen()
    changed = sum(a != b for a, b in zip(expected, (80, 80, 54, 17)))
    assert log.text.count("Setting MODEL.") == changed
    check_num_classes(cfg, cfg.DATASETS.TRAIN)


def test_a_number_in_the_config_is_kept_and_compared():
    cfg = config("GeneralizedRCNN", SHAPES, ROI, 5)
    set_num_classes(cfg)
    assert numbers(cfg)[0] == 5
    with pytest.raises(ValueError, match=f"{ROI} is 5, but dataset .* has 3 classes"):
        check_num_classes(cfg, cfg.DATASETS.TRAIN)


@pytest.mark.parametrize("name", ["coco_2017_train", "voc:/no/such/folder@train"])
def test_registered_names_and_missing_data_change_nothing(name):
    cfg = config("GeneralizedRCNN", name)
    set_num_classes(cfg)
    assert numbers(cfg) == (80, 80, 54, 17)


def test_the_saved_config_has_the_number_of_classes(tmp_path):
    cfg = tiny_cfg(tmp_path, MODEL__ROI_HEADS__NUM_CLASSES=80)
    default_setup(cfg, None)
    saved = get_cfg()
    saved.merge_from_file(str(tmp_path / "config.yaml"))
    assert saved.MODEL.ROI_HEADS.NUM_CLASSES == 3


def test_the_trainer_sets_the_number_in_its_config(tmp_path):
    cfg = tiny_cfg(tmp_path, MODEL__ROI_HEADS__NUM_CLASSES=80)
    trainer = DefaultTrainer(cfg)
    assert trainer.model.roi_heads.num_classes == 3 and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3


def test_another_order_of_classes_raises_and_other_names_warn(log):
    names = {"train": ["cat", "dog", "owl"], "same": ["cat", "dog", "owl"], "turned": ["cat", "owl", "dog"]}
    names["other"] = ["cat", "dog", "eagle"]
    for name, classes in names.items():
        MetadataCatalog.get(f"checks_{name}").set(thing_classes=classes)
    try:
        cfg = config("RetinaNet", "checks_train", RETINANET, 3)
        check_num_classes(cfg, ["checks_train", "checks_same"])
        assert "other names" not in log.text
        with pytest.raises(ValueError, match="class 1 is 'owl' in dataset 'checks_turned', but 'dog' in"):
            check_num_classes(cfg, "checks_turned")
        check_num_classes(cfg, "checks_other")
        assert "class 2 is 'eagle' in dataset 'checks_other', but 'owl' in the training dataset" in log.text
        check_num_classes(config("RetinaNet", "checks_unknown", RETINANET, 3), "checks_turned")
    finally:
        for name in names:
            MetadataCatalog.remove(f"checks_{name}")
