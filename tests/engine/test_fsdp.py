"""Models sharded across two processes train, save and resume like unsharded ones."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from detlib.checkpoint.sharded import is_sharded
from detlib.engine import DefaultTrainer, launch
from detlib.engine.distributed.ddp import gathered_parameters
from detlib.engine.ema import load_for_inference
from detlib.engine.validation import validation_losses
from detlib.modeling import MetaArchitecture, build_model, sampling
from detlib.utils import comm
from detlib.utils.env import seed_all_rng
from tests.builders import tiny_cfg
from tests.engine.training_runs import sample_repeatably

pytestmark = pytest.mark.distributed

_UNEVEN = "shapes:val?num=3&size=64"  # the two processes evaluate 2 images and 1


def _cfg(folder, strategy: str, **overrides):
    return tiny_cfg(
        folder,
        TRAIN__STRATEGY=strategy,
        DATASETS__TEST=(_UNEVEN,),
        TEST__VAL_LOSS=(_UNEVEN,),
        INPUT__RANDOM_FLIP="none",
        DATALOADER__ASPECT_RATIO_GROUPING=False,
        SOLVER__MAX_ITER=3,
        SOLVER__CHECKPOINT_PERIOD=1,
        SOLVER__EMA__ENABLED=True,
        **{"SOLVER__BASE_LR": 0.02, **overrides},
    )


def _train(folder: str, strategy: str, resume: bool, overrides: dict) -> None:
    sampling.subsample_labels, original = sample_repeatably, sampling.subsample_labels
    # Sharded blocks output a single image in strides that PyTorch does not recognize as channels-last, and
    # convolutions round differently in another memory layout.
    MetaArchitecture.channels_last_on, in_layout = (), MetaArchitecture.channels_last_on
    try:
        cfg = _cfg(folder, strategy, **overrides)
        # Each process draws other initial weights; those of rank 0 count.
        seed_all_rng(cfg.SEED + comm.get_rank())
        trainer = DefaultTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        assert trainer.start_iter == (2 if resume else 0)
        results = trainer.train()
        if strategy == "fsdp":
            local = sum(p.to_local().numel() for p in trainer.model.parameters())
            full = sum(p.numel() for p in trainer.model.parameters())
            assert local < 0.6 * full
            with gathered_parameters(trainer.model):
                with gathered_parameters(trainer.model):
                    pass
                assert not is_sharded(trainer.model)
            assert is_sharded(trainer.model)
        own_losses = validation_losses(trainer.model, DefaultTrainer.build_val_loss_loader(cfg, _UNEVEN))
        if comm.is_main_process():
            assert "bbox" in results
            torch.save({"average": results["val"], "own": own_losses}, f"{folder}/losses")
    finally:
        sampling.subsample_labels, MetaArchitecture.channels_last_on = original, in_layout


def _train_all(root: str, overrides: dict) -> None:
    """Train unsharded, sharded, and sharded from the second checkpoint on."""
    _train(f"{root}/ddp", "ddp", False, overrides)
    _train(f"{root}/fsdp", "fsdp", False, overrides)
    if comm.is_main_process():
        os.mkdir(f"{root}/resumed")
        shutil.copy(f"{root}/fsdp/model_0000001.pth", f"{root}/resumed")
        Path(f"{root}/resumed/last_checkpoint").write_text("model_0000001.pth")
    comm.synchronize()
    _train(f"{root}/resumed", "fsdp", True, overrides)


def _assert_close(one, two, tolerance: float, path: str = "") -> None:
    assert type(one) is type(two), path
    if isinstance(one, torch.Tensor):
        assert one.shape == two.shape, path
        apart = (one.float() - two.float()).abs().max().item() if one.numel() else 0.0
        assert apart <= tolerance, f"{path}: {apart}"
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            _assert_close(one[key], two[key], tolerance, f"{path}.{key}")


_CLIPPED = {"SOLVER__CLIP_GRADIENTS__ENABLED": True, "SOLVER__CLIP_GRADIENTS__CLIP_TYPE": "full_model"}
_ACCUMULATED = {"SOLVER__ACCUM_STEPS": 2, "SOLVER__IMS_PER_BATCH": 4}
_ADAMW = {"SOLVER__OPTIMIZER": "AdamW", "SOLVER__BASE_LR": 1e-3}


@pytest.mark.parametrize(
    ("overrides", "tolerance", "state_tolerance"),
    [
        pytest.param(_CLIPPED, 1e-5, 1e-4, id="sgd"),
        # The first steps of AdamW are as large as the learning rate, even where the gradient is rounding
        # noise.
        pytest.param({**_ADAMW, **_ACCUMULATED}, 5e-4, 5e-3, id="adamw", marks=pytest.mark.slow),
        # Gradients of a weight that is used several times are added in bfloat16, those of a sharded weight in
        # float32. With such a low learning rate, both still train on the same proposals.
        pytest.param(
            {"SOLVER__AMP__ENABLED": True, "SOLVER__BASE_LR": 1e-6, **_ACCUMULATED},
            1e-6,
            2e-2,
            id="bfloat16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sharded_training_equals_ddp(tmp_path, monkeypatch, overrides, tolerance, state_tolerance):
    launch(_train_all, 2, args=(str(tmp_path), overrides))
    unsharded, sharded, resumed = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)
        for name in ("ddp", "fsdp", "resumed")
    )
    for entry in ("model", "ema_state"):
        _assert_close(unsharded[entry], sharded[entry], tolerance)
        _assert_close(sharded[entry], resumed[entry], 0.0)
    states = [x["trainer"]["_trainer"]["optimizer"]["state"] for x in (unsharded, sharded)]
    assert states[0] and states[0].keys() == states[1].keys()
    _assert_close(*states, state_tolerance)
    monkeypatch.setattr(sampling, "subsample_labels", sample_repeatably)
    for name in ("ddp", "fsdp", "resumed"):
        _check_losses(tmp_path / name)


def _check_losses(folder) -> None:
    """Check that the losses that two processes computed on three images equal those of one process."""
    cfg = _cfg(folder, "ddp")
    loader = DefaultTrainer.build_val_loss_loader(cfg, _UNEVEN)
    assert len(loader) == 3
    for kind, losses in torch.load(folder / "losses", weights_only=True).items():
        model = build_model(cfg)
        load_for_inference(model, str(folder / "model_final.pth"), use_average=kind == "average")
        assert losses == pytest.approx(validation_losses(model, loader), rel=1e-4), kind


def test_fsdp_in_a_single_process_raises(tmp_path):
    with pytest.raises(RuntimeError, match="TRAIN.STRATEGY 'fsdp'.*--num-gpus"):
        DefaultTrainer(_cfg(tmp_path, "fsdp"))
