"""Training on a CUDA device: precision, resuming, no unnecessary synchronization, one process under DDP."""

import cv2
import pytest
import torch

from detlib.engine import DefaultPredictor, DefaultTrainer
from detlib.evaluation import COCOEvaluator
from detlib.utils.events import EventStorage
from tests.builders import tiny_cfg
from tests.engine.training_runs import make_interrupted_run, train
from tests.modeling.architectures import ALL_SAMPLED

pytestmark = pytest.mark.gpu


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


_KINDS = {
    "float32": {},
    "float16": {"SOLVER__AMP__ENABLED": True},
    "bfloat16": {"SOLVER__AMP__ENABLED": True, "SOLVER__AMP__PRECISION": "bfloat16"},
    "adamw, ema": {"SOLVER__OPTIMIZER": "AdamW", "SOLVER__BASE_LR": 1e-3, "SOLVER__EMA__ENABLED": True},
    "workers": {"DATALOADER__NUM_WORKERS": 2},
    "accumulated": {"SOLVER__ACCUM_STEPS": 2, "SOLVER__IMS_PER_BATCH": 4, "SOLVER__AMP__ENABLED": True},
    "checkpointed": {"TRAIN__ACTIVATION_CHECKPOINT": True},
}


@pytest.mark.parametrize("kind", _KINDS)
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, kind, deterministic):
    overrides = {"SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__MAX_ITER": 4, "DATASETS__TEST": ()}
    overrides |= {"MODEL__DEVICE": "cuda", **_KINDS[kind]}
    uninterrupted = train(tiny_cfg(tmp_path / "uninterrupted", **overrides), resume=False)
    make_interrupted_run(uninterrupted, tmp_path / "parts", iteration=1)
    resumed = train(tiny_cfg(tmp_path / "parts", **overrides), resume=True)
    assert resumed.start_iter == 2
    one, two = uninterrupted.model.state_dict(), resumed.model.state_dict()
    assert all(value.is_cuda and torch.equal(value, two[name]) for name, value in one.items())
    if kind == "float16":
        assert uninterrupted._trainer.grad_scaler.state_dict() == resumed._trainer.grad_scaler.state_dict()
        assert uninterrupted._trainer.grad_scaler.is_enabled()


@pytest.mark.parametrize("clip", ["value", "norm", "full_model"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_an_update_does_not_synchronize_with_the_host(tmp_path, clip, optimizer):
    """The host only queues work, also with clipping."""
    cfg = tiny_cfg(
        tmp_path,
        MODEL__DEVICE="cuda",
        SOLVER__OPTIMIZER=optimizer,
        SOLVER__CLIP_GRADIENTS__ENABLED=True,
        SOLVER__CLIP_GRADIENTS__CLIP_TYPE=clip,
    )
    trainer = DefaultTrainer(cfg)._trainer

    def backward():
        trainer._backward(sum(trainer._forward(trainer._next_batch()).values()))

    with EventStorage(0):
        backward()
        trainer._update()  # makes the optimizer's state
        backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer._update()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_model_is_trained_evaluated_and_used_for_one_image(tmp_path):
    cfg = tiny_cfg(tmp_path, MODEL__DEVICE="cuda", TEST__EVAL_PERIOD=2)
    trainer = train(cfg, resume=False)
    assert trainer.model.device.type == "cuda"
    results = DefaultTrainer.test(cfg, trainer.model, [COCOEvaluator(cfg.DATASETS.TEST[0])])
    assert {"bbox", "segm"} <= results.keys()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    predictor = DefaultPredictor(cfg)
    image = cv2.resize((torch.rand(8, 8, 3) * 255).byte().numpy(), (80, 60))
    found = predictor(image)["instances"]
    assert len(found) and found.pred_boxes.tensor.is_cuda and found.pred_masks.shape[1:] == (60, 80)
    cfg.MODEL.DEVICE = "cpu"
    on_cpu = DefaultPredictor(cfg)(image)["instances"]
    torch.testing.assert_close(found.scores[:5].cpu(), on_cpu.scores[:5], rtol=2e-2, atol=1e-3)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_losses(tmp_path, exact_float32):
    """The losses agree up to the rounding of fused kernels. Takes minutes, most of them for compilation.

    With TF32 convolutions, the order of the random model's proposals, which have similar scores, would
    change.
    """
    curves = []
    for enabled in (False, True):
        overrides = {
            "MODEL__DEVICE": "cuda",
            "DATASETS__TEST": (),
            "SOLVER__BASE_LR": 1e-5,
            "TRAIN__COMPILE__ENABLED": enabled,
            "TRAIN__COMPILE__MODULES": ("backbone",),
            **ALL_SAMPLED,
        }
        trainer = train(tiny_cfg(tmp_path / str(enabled), **overrides), resume=False)
        history = trainer.storage.history("total_loss").values()
        curves.append(torch.tensor([value for value, _ in history]))
    assert len(curves[0]) == 2
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-2, atol=1e-2)
