import pytest

from detlib.config import downgrade_config, get_cfg, upgrade_config

OLD = """
{version}
MODEL:
  WEIGHT: old.pkl
  META_ARCHITECTURE: {model}
  RPN: {{ANCHOR_SIZES: [[8, 16]], ANCHOR_ASPECT_RATIOS: [[1.0]], NMS_THRESH: 0.6}}
  RETINANET:
    {{ANCHOR_SIZES: [[4]], ANCHOR_ASPECT_RATIOS: [[2.0]], ANCHOR_STRIDES: [8], INFERENCE_NMS_THRESHOLD: 0.4}}
  PANOPTIC_FPN: {{COMBINE_ON: false, COMBINE_STUFF_AREA_LIMIT: 9, RPN_LOSS_SCALE: 2.0}}
TEST: {{DETECTIONS_PER_IMG: 7, AUG_ON: true, AUG_MIN_SIZES: [1, 2]}}
"""


@pytest.mark.parametrize("version", ["VERSION: 1", ""])
@pytest.mark.parametrize(
    ("model", "sizes", "ratios"), [("GeneralizedRCNN", [[8, 16]], [[1.0]]), ("RetinaNet", [[4]], [[2.0]])]
)
def test_file_of_version_1_is_upgraded(tmp_path, version, model, sizes, ratios):
    path = tmp_path / "old.yaml"
    path.write_text(OLD.format(version=version, model=model))
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    expected = get_cfg()
    expected.MODEL.WEIGHTS = "old.pkl"
    expected.MODEL.META_ARCHITECTURE = model
    expected.MODEL.ANCHOR_GENERATOR.SIZES = sizes
    expected.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = ratios
    expected.MODEL.RPN.NMS_THRESH = 0.6
    expected.MODEL.RPN.LOSS_WEIGHT = 2.0
    expected.MODEL.RETINANET.NMS_THRESH_TEST = 0.4
    expected.MODEL.PANOPTIC_FPN.COMBINE.ENABLED = False
    expected.MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT = 9
    expected.TEST.DETECTIONS_PER_IMAGE = 7
    expected.TEST.AUG.ENABLED = True
    expected.TEST.AUG.MIN_SIZES = (1, 2)
    assert str(cfg) == str(expected)


def test_file_without_a_model_uses_the_anchors_of_the_configs_model(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("MODEL: {RETINANET: {ANCHOR_SIZES: [[4]]}, RPN: {ANCHOR_SIZES: [[8]]}}")
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.merge_from_file(str(path))
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[4]]


def test_downgrade_and_upgrade_restore_the_config():
    cfg = get_cfg()
    cfg.MODEL.WEIGHTS = "w"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[5]]
    before = str(cfg)
    old = downgrade_config(cfg, to_version=1)
    assert (old.VERSION, old.MODEL.WEIGHT, old.TEST.AUG_ON, old.MODEL.ROI_HEADS.NMS) == (1, "w", False, 0.5)
    assert old.MODEL.RPN.ANCHOR_SIZES == old.MODEL.RETINANET.ANCHOR_SIZES == [[5]]
    assert "WEIGHTS" not in old.MODEL and "AUG" not in old.TEST and str(cfg) == before
    assert str(upgrade_config(old)) == before
    assert str(upgrade_config(cfg)) == before


def test_impossible_version_fails():
    cfg = get_cfg()
    for function, version in (
        (downgrade_config, 0),
        (downgrade_config, 3),
        (upgrade_config, 1),
        (upgrade_config, 3),
    ):
        with pytest.raises(ValueError, match=f"VERSION 2 to {version}"):
            function(cfg, version)
