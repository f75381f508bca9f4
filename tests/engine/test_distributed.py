"""Training with two processes on the CPU equals training with one."""

import pytest
import torch

from detlib.engine import DefaultTrainer, launch
from detlib.modeling import build_model, sampling
from detlib.solver import build_optimizer
from detlib.utils import comm
from detlib.utils.env import seed_all_rng
from detlib.utils.events import EventStorage
from tests.builders import tiny_cfg
from tests.engine.training_runs import sample_repeatably

pytestmark = pytest.mark.distributed

_STEPS = 3


def _cfg(folder, kind: str):
    cfg = tiny_cfg(
        folder,
        DATASETS__TEST=(),
        INPUT__RANDOM_FLIP="none",
        DATALOADER__ASPECT_RATIO_GROUPING=False,
        SOLVER__MAX_ITER=_STEPS,
        SOLVER__BASE_LR=0.02,
    )
    if kind == "rpn":
        cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
        cfg.MODEL.MASK_ON = False
        # All 1023 anchors are sampled, so that nothing is random.
        cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 1023
        cfg.MODEL.RPN.POSITIVE_FRACTION = 1.0
    return cfg


def _train(folder: str, kind: str, overrides: dict) -> None:
    """Train, and save the parameters before and after."""
    sampling.subsample_labels, original = sample_repeatably, sampling.subsample_labels
    try:
        cfg = _cfg(folder, kind)
        for key, value in overrides.items():
            cfg.merge_from_list([key, value])
        seed_all_rng(cfg.SEED + comm.get_rank())
        trainer = DefaultTrainer(cfg)
        start = {k: v.clone() for k, v in trainer.checkpointer.model.state_dict().items()}
        seen = []
        forward = trainer.checkpointer.model.forward
        trainer.checkpointer.model.forward = lambda batch: (
            seen.append([d["image_id"] for d in batch]) or forward(batch)
        )
        trainer.train()
        seen = comm.all_gather(seen)
        if comm.is_main_process():
            del trainer.checkpointer.model.forward
            end = trainer.checkpointer.model.state_dict() if trainer.ema is None else trainer.ema.state_dict()
            torch.save([start, end, seen], f"{folder}/result.pth")
    finally:
        sampling.subsample_labels = original


def _run(folder, kind: str, num_processes: int, **overrides):
    folder.mkdir()
    launch(_train, num_processes, args=(str(folder), kind, overrides))
    return torch.load(folder / "result.pth")


def _assert_equal_but_for_noise(start, one, two) -> None:
    moved = max((one[name] - start[name]).abs().max().item() for name in one)
    apart = max((one[name] - two[name]).abs().max().item() for name in one)
    assert moved > 1e-3
    assert apart < 1e-5, f"{apart} apart, after moving by {moved}"


def test_rpn_on_two_processes_equals_one(tmp_path, caplog):
    start, one, seen_one = _run(tmp_path / "one", "rpn", 1)
    start_two, two, seen_two = _run(tmp_path / "two", "rpn", 2)
    assert "2 processes share the CPU" in caplog.text
    # The same images in the same steps, half of them in each process.
    assert [len(batch) for batch in seen_one[0]] == [2] * _STEPS
    assert [sorted(a + b) for a, b in zip(*seen_two)] == [sorted(batch) for batch in seen_one[0]]
    assert all(torch.equal(start[name], start_two[name]) for name in start)
    _assert_equal_but_for_noise(start, one, two)


@pytest.mark.slow
def test_mask_rcnn_on_two_processes_equals_averaged_half_batches(tmp_path, monkeypatch):
    start, two, _ = _run(tmp_path / "two", "mask", 2)

    monkeypatch.setattr(sampling, "subsample_labels", sample_repeatably)
    cfg = _cfg(tmp_path, "mask")
    seed_all_rng(cfg.SEED)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    batches = iter(DefaultTrainer.build_train_loader(cfg))
    model.train()
    with EventStorage():
        for _ in range(_STEPS):
            optimizer.zero_grad()
            for image in next(batches):
                (sum(model([image]).values()) / 2).backward()
            optimizer.step()
    _assert_equal_but_for_noise(start, model.state_dict(), two)


# Two processes add gradients in another order, so results differ by rounding. Adam normalizes the gradient:
# where it is nearly 0, rounding decides the direction of the step, so only most parameters are compared.
_KINDS = {
    "accumulated": ({"SOLVER.IMS_PER_BATCH": 4}, 1.0),
    "average": ({"SOLVER.EMA.ENABLED": True, "SOLVER.EMA.DECAY": 0.5}, 1.0),
    "bfloat16": ({"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.PRECISION": "bfloat16"}, 1.0),
    "adamw": ({"SOLVER.OPTIMIZER": "AdamW", "SOLVER.BASE_LR": 1e-3}, 0.99),
}


@pytest.mark.parametrize(
    "kind", ["accumulated", *(pytest.param(k, marks=pytest.mark.slow) for k in _KINDS if k != "accumulated")]
)
def test_two_processes_equal_one_that_accumulates(tmp_path, kind):
    overrides, share = _KINDS[kind]
    parts = overrides.get("SOLVER.IMS_PER_BATCH", 2) // 2
    start, two, seen_two = _run(tmp_path / "two", "mask", 2, **overrides, **{"SOLVER.ACCUM_STEPS": parts})
    _, one, seen_one = _run(tmp_path / "one", "mask", 1, **overrides, **{"SOLVER.ACCUM_STEPS": 2 * parts})
    # In both cases every forward pass has one image, and each update the same images.
    assert {len(batch) for batch in seen_one[0] + seen_two[0] + seen_two[1]} == {1}
    step = [sum(seen_one[0][k : k + 2 * parts], []) for k in range(0, len(seen_one[0]), 2 * parts)]
    pairs = [a + b for a, b in zip(*seen_two)]
    assert [sorted(sum(pairs[k : k + parts], [])) for k in range(0, len(pairs), parts)] == list(
        map(sorted, step)
    )
    moved = torch.cat([(one[name] - start[name]).float().abs().flatten() for name in one])
    apart = torch.cat([(one[name] - two[name]).float().abs().flatten() for name in one])
    assert moved.max() > 1e-3
    assert apart.sort().values[int(share * (len(apart) - 1))] < 1e-5, f"{apart.max()} apart"


def _evaluate_with_own_statistics(folder: str) -> None:
    """Train for a step, and record BatchNorm's statistics during the evaluation and after it."""
    cfg = tiny_cfg(
        folder,
        MODEL__META_ARCHITECTURE="ProposalNetwork",
        MODEL__MASK_ON=False,
        MODEL__RESNETS__NORM="BN",
        SOLVER__MAX_ITER=1,
    )
    trainer = DefaultTrainer(cfg)
    seen = []

    def note(*_):
        seen.append(trainer.checkpointer.model.backbone.bottom_up.stem.conv1.norm.running_mean.clone())

    trainer.test = lambda *args: note() or {}
    trainer.train()
    note()
    seen = comm.all_gather(seen)
    if comm.is_main_process():
        torch.save(seen, f"{folder}/seen.pth")


def test_evaluation_uses_the_batch_norm_statistics_that_are_saved(tmp_path):
    launch(_evaluate_with_own_statistics, 2, args=(str(tmp_path),))
    (first, first_own), (second, second_own) = torch.load(tmp_path / "seen.pth")
    saved = torch.load(tmp_path / "model_final.pth")["model"]
    assert torch.equal(saved["backbone.bottom_up.stem.conv1.norm.running_mean"], first)
    assert torch.equal(first, second) and torch.equal(first, first_own)
    # Afterwards, each process has the statistics of its own images again.
    assert not torch.equal(first_own, second_own)
