"""Precomputed proposals: written by the evaluation of a proposal network, read in training."""

import pickle

import numpy as np
import pytest
import torch

from detlib.data import DatasetCatalog
from detlib.data.build import build_detection_test_loader, build_detection_train_loader
from detlib.engine import DefaultTrainer
from tests.builders import FAST_RCNN, RPN, small_config

DATA = "shapes:val?num=4&size=64"


def config(name, folder, **overrides):
    return small_config(
        name,
        OUTPUT_DIR=str(folder),
        DATASETS__TRAIN=(DATA,),
        DATASETS__TEST=(DATA,),
        DATALOADER__NUM_WORKERS=0,
        INPUT__MIN_SIZE_TRAIN=(64,),
        INPUT__MIN_SIZE_TEST=64,
        SOLVER__IMS_PER_BATCH=2,
        SOLVER__MAX_ITER=2,
        SOLVER__BASE_LR=0.001,
        TEST__EVAL_PERIOD=0,
        **overrides,
    )


def test_fast_rcnn_trains_on_the_proposals_of_a_proposal_network(tmp_path, monkeypatch):
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path))
    torch.manual_seed(0)
    rpn = config(RPN, tmp_path)
    results = DefaultTrainer.test(rpn, DefaultTrainer.build_model(rpn))
    assert "AR@100" in results["box_proposals"]
    path = str(tmp_path / "inference" / "box_proposals.pkl")

    cfg = config(
        FAST_RCNN,
        tmp_path,
        DATASETS__PROPOSAL_FILES_TRAIN=(path,),
        DATASETS__PROPOSAL_FILES_TEST=(path,),
        DATASETS__PRECOMPUTED_PROPOSAL_TOPK_TRAIN=30,
    )
    batch = next(iter(build_detection_train_loader(cfg)))
    with open(path, "rb") as file:
        saved = pickle.load(file)
    for record in batch:
        proposals = record["proposals"]
        logits = saved["objectness_logits"][saved["ids"].index(record["image_id"])]
        assert 0 < len(proposals) <= 30
        assert set(proposals.objectness_logits.tolist()) <= set(np.sort(logits)[::-1][:40].tolist())
    assert len(list(build_detection_test_loader(cfg, DATA))) == len(DatasetCatalog.get(DATA))

    trainer = DefaultTrainer(cfg)
    before = [p.detach().clone() for p in trainer.model.roi_heads.parameters()]
    results = trainer.train()
    assert any((p != old).any() for p, old in zip(trainer.model.roi_heads.parameters(), before))
    assert "AP" in results["bbox"]


def test_a_config_without_proposal_files_raises_an_error(tmp_path):
    cfg = config(FAST_RCNN, tmp_path, DATASETS__PROPOSAL_FILES_TRAIN=(), DATASETS__PROPOSAL_FILES_TEST=())
    with pytest.raises(ValueError, match="DATASETS.PROPOSAL_FILES_TRAIN is empty"):
        build_detection_train_loader(cfg)
    with pytest.raises(ValueError, match="DATASETS.PROPOSAL_FILES_TEST is empty"):
        build_detection_test_loader(cfg, DATA)
