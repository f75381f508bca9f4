"""Tests of configs and weights by their paths below configs/."""

from pathlib import Path

import pytest
import torch

from detlib import model_zoo
from detlib.checkpoint import DetectionCheckpointer
from detlib.config import LazyConfig

ROOT = Path(__file__).parents[2]
RPN = "COCO-Detection/rpn_R_50_FPN_1x.yaml"


def test_config_files_are_found():
    assert Path(model_zoo.get_config_file(RPN)).samefile(ROOT / "configs" / RPN)
    with pytest.raises(FileNotFoundError, match=f"no config 'COCO-Detection/rpn_R50_FPN_1x.yaml'.*'{RPN}'"):
        model_zoo.get_config_file("COCO-Detection/rpn_R50_FPN_1x.yaml")
    with pytest.raises(FileNotFoundError):
        model_zoo.get_config_file("COCO-Detection")


def test_checkpoint_urls():
    url = (
        "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/rpn_R_50_FPN_1x/137258492/"
        "model_final_02ce48.pkl"
    )
    assert model_zoo.get_checkpoint_url(RPN) == url
    assert model_zoo.get_checkpoint_url(RPN.removesuffix(".yaml")) == url
    with pytest.raises(KeyError, match="Did you mean 'COCO-Detection/rpn_R_50_FPN_1x'"):
        model_zoo.get_checkpoint_url("COCO-Detection/rpn_R_50_FPN_3x.yaml")


def test_trained_config_has_the_published_weights():
    assert model_zoo.get_config(RPN).MODEL.META_ARCHITECTURE == "ProposalNetwork"
    assert model_zoo.get_config(RPN).MODEL.WEIGHTS == "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    assert model_zoo.get_config(RPN, trained=True).MODEL.WEIGHTS == model_zoo.get_checkpoint_url(RPN)


@pytest.fixture
def lazy(tmp_path, monkeypatch):
    """Return the path of a lazy config in the folder that the model zoo searches."""
    path = tmp_path / "COCO-Detection" / "rpn_R_50_FPN_1x.py"
    path.parent.mkdir()
    path.write_text(
        "from torch import nn\nfrom detlib.config import LazyCall as L\n"
        "model = L(nn.Linear)(in_features=2, out_features=1)\ntrain = {'init_checkpoint': ''}\n"
    )
    monkeypatch.setattr("detlib.model_zoo.model_zoo._config_dir", lambda: tmp_path)
    return path


def test_trained_lazy_config_has_the_published_weights(lazy):
    name = "COCO-Detection/rpn_R_50_FPN_1x.py"
    assert model_zoo.get_config(name) == LazyConfig.load(str(lazy))
    assert model_zoo.get_config(name, trained=True).train.init_checkpoint == model_zoo.get_checkpoint_url(
        name
    )
    lazy.write_text("model = {}\n")
    with pytest.raises(ValueError, match="no train.init_checkpoint"):
        model_zoo.get_config(name, trained=True)


def test_get_loads_the_weights(lazy, tmp_path):
    trained = torch.nn.Linear(2, 1)
    DetectionCheckpointer(trained, save_dir=str(tmp_path)).save("weights")
    lazy.write_text(lazy.read_text().replace("''", repr(str(tmp_path / "weights.pth"))))
    model = model_zoo.get("COCO-Detection/rpn_R_50_FPN_1x.py", device="cpu")
    assert torch.equal(model.weight, trained.weight)
    lazy.write_text("train = {}\n")
    with pytest.raises(ValueError, match="does not describe a model; it has train"):
        model_zoo.get("COCO-Detection/rpn_R_50_FPN_1x.py")
