"""Published files, by their known names and shapes, loaded into the models of their configs."""

import gzip
import hashlib
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from detlib import model_zoo
from detlib.checkpoint import DetectionCheckpointer
from detlib.checkpoint.catalog import DETECTRON2_PREFIX
from detlib.config import CfgNode, instantiate
from detlib.model_zoo.model_zoo import CHECKPOINTS
from detlib.modeling import build_model
from detlib.utils.download import checksum_in_name
from detlib.utils.file_io import PathManager

with gzip.open(Path(__file__).parents[1] / "shipped_configs" / "zoo_states.json.gz", "rt") as f:
    STATES = json.load(f)
PUBLISHED = [f"{group}/{name}" for group, names in CHECKPOINTS.items() for name in names]


def config_name(published: str) -> str:
    return f"{published}.yaml" if f"{published}.yaml" in STATES else f"{published}.py"


def build(name: str, device: str) -> torch.nn.Module:
    cfg = model_zoo.get_config(name)
    with torch.device(device):
        if not isinstance(cfg, CfgNode):
            return instantiate(cfg.model)
        cfg.MODEL.DEVICE = device
        return build_model(cfg)


def test_all_published_weights_have_a_url_with_a_checksum():
    assert len(PUBLISHED) == 64
    for name in PUBLISHED:
        url = model_zoo.get_checkpoint_url(config_name(name))
        assert re.fullmatch(
            re.escape(f"{DETECTRON2_PREFIX}{name}/") + r"\d+/model_(final|0039999)_[0-9a-f]{6}\.pkl", url
        )
        assert checksum_in_name(os.path.basename(url)).algorithm == "md5"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file_matches_its_model(tmp_path, name):
    """Loading runs on the meta device, with arrays that repeat one element, to save disk space and memory."""
    state = {key: torch.zeros(()).expand(shape) for key, shape in STATES[config_name(name)]["state"]}
    # Older files include the anchors.
    state["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2 Model Zoo"}))
    assert path.stat().st_size < 1e6
    model = build(config_name(name), "meta")
    checkpointer = DetectionCheckpointer(model)
    with pytest.warns(UserWarning, match="no-op"):  # PyTorch warns about values for the meta device
        checkpointer.load(str(path))
    report = checkpointer.report
    assert not (report.missing_keys or report.unexpected_keys or report.incorrect_shapes or report.renamed)
    assert len(report.loaded) == len(model.state_dict())


def test_trained_model_is_loaded_from_the_cache(tmp_path, monkeypatch):
    """All steps: URL, cache, checksum, safe reading, values."""
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    rng = np.random.default_rng(0)
    arrays = {key: rng.standard_normal(shape, dtype=np.float32) for key, shape in STATES[name]["state"]}
    content = pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"})
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path))
    monkeypatch.setenv("DETLIB_OFFLINE", "1")
    group, stem = name.removesuffix(".yaml").split("/")
    digest = hashlib.md5(content).hexdigest()[:6]
    monkeypatch.setitem(CHECKPOINTS[group], stem, f"190397773/model_final_{digest}.pkl")
    path = tmp_path / "detectron2" / group / stem / "190397773" / f"model_final_{digest}.pkl"
    with pytest.raises(OSError, match=str(path)):
        model_zoo.get(name, trained=True, device="cpu")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert PathManager.get_local_path(model_zoo.get_checkpoint_url(name)) == str(path)
    state = model_zoo.get(name, trained=True, device="cpu").state_dict()
    for key, array in arrays.items():
        assert np.array_equal(state[key].numpy(), array), key
