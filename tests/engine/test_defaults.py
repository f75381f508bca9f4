"""DefaultTrainer, DefaultPredictor, default_setup and the checks before training."""

import logging
import os
import warnings

import numpy as np
import pytest
import torch

from detlib.config import get_cfg
from detlib.data import DatasetCatalog, MetadataCatalog
from detlib.engine import (
    DefaultPredictor,
    DefaultTrainer,
    HookBase,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detlib.engine.checks import check_weights
from detlib.evaluation import DatasetEvaluator
from detlib.utils import comm
from detlib.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from tests.builders import tiny_cfg


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train two steps and return the trainer, its results and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = DefaultTrainer(tiny_cfg(folder, TEST__EVAL_PERIOD=1, SOLVER__CHECKPOINT_PERIOD=1))
    trainer.resume_or_load(resume=False)
    return trainer, trainer.train(), folder


def test_training_writes_checkpoints_metrics_and_results(trained):
    trainer, results, folder = trained
    assert {"bbox", "segm"} == set(results) and 0.0 <= results["bbox"]["AP"] <= 100.0
    for name in ("model_0000000.pth", "model_final.pth", "metrics.json", "inference"):
        assert (folder / name).exists(), name
    lines = (folder / "metrics.json").read_text()
    for name in ("loss_mask", "loss_rpn_cls", "bbox/AP50", "segm/AP", '"lr"'):
        assert name in lines
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    assert set(saved) == {"model", "trainer", "iteration"} and saved["iteration"] == 1
    assert set(saved["trainer"]) == {"iteration", "hooks", "seed", "_trainer"}
    assert "optimizer" in saved["trainer"]["_trainer"]
    assert saved["trainer"]["hooks"]["LRScheduler"]["last_epoch"] == 2


def test_resume_restores_model_optimizer_and_schedule(trained, caplog):
    trainer, _, folder = trained
    cfg = trainer.cfg.clone()
    cfg.SOLVER.MAX_ITER = 4
    other = DefaultTrainer(cfg)
    with caplog.at_level(logging.INFO, logger="detlib"):
        other.resume_or_load(resume=True)
    assert other.start_iter == 2 and other.scheduler.last_epoch == 2
    for a, b in zip(trainer.model.state_dict().values(), other.model.state_dict().values()):
        assert torch.equal(a, b)
    momentum = [s["momentum_buffer"] for s in trainer.optimizer.state.values()]
    restored = [s["momentum_buffer"] for s in other.optimizer.state.values()]
    assert momentum and all(torch.equal(a, b) for a, b in zip(momentum, restored))
    assert "model_final.pth" in caplog.text and "iteration 2 of 4" in caplog.text


def test_resuming_from_a_checkpoint_with_only_a_model_starts_at_iteration_0(trained, tmp_path, caplog):
    _, _, folder = trained
    model = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    torch.save({"model": model}, tmp_path / "given.pth")
    (tmp_path / "last_checkpoint").write_text("given.pth")
    cfg = tiny_cfg(tmp_path, SOLVER__MAX_ITER=1, SOLVER__EMA__ENABLED=True, DATASETS__TEST=())
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 0
    assert "given.pth has a model, but no optimizer and no iteration" in caplog.text
    assert "training starts at iteration 0 from this model" in caplog.text
    for state in (trainer.model.state_dict(), trainer.ema.state_dict()):
        assert all(torch.equal(value, model[name]) for name, value in state.items())
    trainer.train()
    assert trainer.iter == 1 and trainer.ema.updates == 1
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 0


def test_hooks_are_in_the_documented_order(trained):
    trainer, _, _ = trained
    names = [type(h).__name__ for h in trainer._hooks]
    assert " ".join(names) == (
        "IterationTimer LRScheduler PeriodicCheckpointer EvalHook MissedEvaluation PeriodicWriter"
    )


def test_hooks_of_the_outer_trainer_get_after_backward(tmp_path):
    class Spy(HookBase):
        seen = 0

        def after_backward(self):
            self.seen += 1

    trainer = DefaultTrainer(tiny_cfg(tmp_path, SOLVER__MAX_ITER=1, DATASETS__TEST=()))
    spy = Spy()
    trainer.register_hooks([spy])
    assert trainer.train() == {} and spy.seen == 1


def test_evaluation_on_multiple_datasets_with_custom_evaluators(trained):
    trainer, _, _ = trained
    cfg = trainer.cfg.clone()

    class Count(DatasetEvaluator):
        def reset(self):
            self.n = 0

        def process(self, inputs, outputs):
            self.n += len(inputs)

        def evaluate(self):
            return {"count": {"n": self.n}}

    assert DefaultTrainer.test(cfg, trainer.model, Count()) == {"count": {"n": 4}}
    names = ("shapes:val?num=4&size=64", "shapes:val?num=2&size=64")
    cfg.DATASETS.TEST = names
    results = DefaultTrainer.test(cfg, trainer.model, [Count(), Count()])
    assert results == {names[0]: {"count": {"n": 4}}, names[1]: {"count": {"n": 2}}}
    with pytest.raises(ValueError, match="2 datasets, but there are 1 evaluators"):
        DefaultTrainer.test(cfg, trainer.model, [Count()])


def with_tta(cfg, **values):
    cfg = cfg.clone()
    cfg.defrost()
    for key, value in {"ENABLED": True, "MIN_SIZES": (48, 64), "MAX_SIZE": 90, **values}.items():
        cfg.TEST.AUG[key] = value
    return cfg


def test_evaluation_with_test_time_augmentation_adds_its_own_results(trained, tmp_path):
    trainer, plain, _ = trained
    cfg = with_tta(trainer.cfg)
    cfg.OUTPUT_DIR = str(tmp_path)
    results = DefaultTrainer.test(cfg, trainer.model)
    assert set(results) == {"bbox", "segm", "bbox_TTA", "segm_TTA"}
    assert results["bbox"] == pytest.approx(plain["bbox"], nan_ok=True)
    assert set(results["segm_TTA"]) == set(plain["segm"])
    assert (tmp_path / "inference").is_dir() and (tmp_path / "TTA" / "inference").is_dir()
    # A single unchanged view gives the plain results; results of multiple datasets are separate.
    cfg = with_tta(cfg, MIN_SIZES=(64,), FLIP=False)
    only = DefaultTrainer.test_with_TTA(cfg, trainer.model)
    for task in ("bbox", "segm"):
        assert only[f"{task}_TTA"] == pytest.approx(plain[task], nan_ok=True)
    cfg.DATASETS.TEST = ("shapes:val?num=2&size=64", "shapes:val?num=3&size=64")
    results = DefaultTrainer.test(cfg, trainer.model)
    assert list(results) == list(cfg.DATASETS.TEST)
    assert all(set(r) == {"bbox", "segm", "bbox_TTA", "segm_TTA"} for r in results.values())


def test_only_the_last_evaluation_uses_test_time_augmentation(tmp_path):
    cfg = with_tta(tiny_cfg(tmp_path, TEST__EVAL_PERIOD=1), MIN_SIZES=(64,), FLIP=False)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    assert set(trainer.train()) == {"bbox", "segm", "bbox_TTA", "segm_TTA"}
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert "bbox/AP50" in lines[0] and "bbox_TTA" not in lines[0] and "bbox_TTA/AP50" in lines[-1]
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_ON = "ProposalNetwork", False
    with pytest.raises(TypeError, match="TEST.AUG.ENABLED.* does not support ProposalNetwork"):
        DefaultTrainer(cfg)


def test_datasets_test_may_be_a_single_name(trained):
    trainer, _, _ = trained
    cfg = trainer.cfg.clone()
    cfg.DATASETS.TEST = "shapes:val?num=4&size=64"
    assert set(DefaultTrainer.test(cfg, trainer.model)) == {"bbox", "segm"}
    assert DefaultPredictor(cfg).metadata.thing_classes == ["circle", "square", "triangle"]


def test_an_unknown_evaluator_type_is_skipped_with_a_warning(trained, caplog):
    trainer, _, _ = trained
    cfg = trainer.cfg.clone()
    DatasetCatalog.register("unknown_set", lambda: DatasetCatalog.get("shapes:val?num=4&size=64"))
    MetadataCatalog.get("unknown_set").set(evaluator_type="strange")
    try:
        cfg.DATASETS.TEST = ("unknown_set",)
        with caplog.at_level(logging.WARNING, logger="detlib"):
            assert DefaultTrainer.test(cfg, trainer.model) == {}
        assert "Skipping the evaluation on 'unknown_set'" in caplog.text
    finally:
        DatasetCatalog.remove("unknown_set")
        MetadataCatalog.remove("unknown_set")


def test_evaluator_uses_as_many_detections_as_the_model_returns(trained):
    trainer, _, _ = trained
    cfg = trainer.cfg.clone()
    for limit, expected in ((50, None), (100, None), (300, 300)):
        cfg.TEST.DETECTIONS_PER_IMAGE = limit
        evaluator = DefaultTrainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
        assert evaluator._max_dets_per_image == expected


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"DATASETS__TRAIN": ()}, ValueError, "DATASETS.TRAIN is empty"),
        ({"DATASETS__TRAIN": ("shapes:trian",)}, ValueError, "trian"),
        ({"DATASETS__TRAIN": ("coco_2017_trian",)}, KeyError, "coco_2017_train"),
        ({"DATASETS__TEST": ("nowhere",)}, KeyError, "nowhere"),
        ({"DATASETS__TEST": ("voc:/no/such/folder@val",)}, FileNotFoundError, "/no/such/folder"),
        ({"MODEL__ROI_HEADS__NUM_CLASSES": 7}, ValueError, r"MODEL.ROI_HEADS.NUM_CLASSES is 7.* 3 classes"),
    ],
)
def test_invalid_datasets_raise_an_error_before_the_first_step(tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        DefaultTrainer(tiny_cfg(tmp_path, **overrides))


def test_number_of_classes_is_not_checked_for_proposal_networks(tmp_path):
    cfg = tiny_cfg(tmp_path, MODEL__ROI_HEADS__NUM_CLASSES=80, MODEL__META_ARCHITECTURE="ProposalNetwork")
    DefaultTrainer(cfg)


def test_unfit_learning_rate_and_length_are_reported_before_the_first_step(tmp_path, caplog):
    DefaultTrainer(tiny_cfg(tmp_path, SOLVER__BASE_LR=0.5, SOLVER__MAX_ITER=270000, DATASETS__TEST=()))
    warnings_ = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any("The learning rate 0.5 is high for 2 images per step" in text for text in warnings_)
    assert any("270000 iterations of 2 images are" in text for text in warnings_)


def test_a_diverging_run_ends_with_learning_rate_advice(tmp_path, caplog):
    trainer = DefaultTrainer(tiny_cfg(tmp_path, SOLVER__BASE_LR=1e12, SOLVER__MAX_ITER=20))
    advice = "is high for 2 images per step"
    assert caplog.text.count(advice) == 1
    with pytest.raises(
        FloatingPointError, match=r"iteration \d+: (?s:.*)Learning rate: 1e\+12(?s:.*)\.png"
    ) as error:
        trainer.train()
    assert advice in str(error.value)
    assert not (tmp_path / "model_final.pth").exists()


@pytest.mark.parametrize(("workers", "batch", "rate", "steps", "iters"), [(8, 16, 0.02, (60, 80), 90)])
def test_auto_scale_workers_scales_batch_rate_and_schedule(workers, batch, rate, steps, iters):
    cfg = get_cfg()
    solver = cfg.SOLVER
    solver.REFERENCE_WORLD_SIZE, solver.IMS_PER_BATCH, solver.BASE_LR = workers, batch, rate
    solver.STEPS, solver.MAX_ITER, solver.WARMUP_ITERS = steps, iters, 11
    solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 15, 0
    cfg.freeze()
    assert DefaultTrainer.auto_scale_workers(cfg, 8) is cfg
    half = DefaultTrainer.auto_scale_workers(cfg, 4)
    assert half.is_frozen() and half.SOLVER.REFERENCE_WORLD_SIZE == 4
    assert (half.SOLVER.IMS_PER_BATCH, half.SOLVER.BASE_LR) == (8, 0.01)
    assert (half.SOLVER.MAX_ITER, half.SOLVER.STEPS) == (180, (120, 160))
    assert (half.SOLVER.WARMUP_ITERS, half.SOLVER.CHECKPOINT_PERIOD, half.TEST.EVAL_PERIOD) == (22, 30, 0)
    assert cfg.SOLVER.IMS_PER_BATCH == 16
    cfg.defrost()
    solver.IMS_PER_BATCH = 12
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH=12.*SOLVER.REFERENCE_WORLD_SIZE=8"):
        DefaultTrainer.auto_scale_workers(cfg, 4)
    solver.REFERENCE_WORLD_SIZE = -2
    with pytest.raises(ValueError, match="SOLVER.REFERENCE_WORLD_SIZE must be at least 0, got -2"):
        DefaultTrainer.auto_scale_workers(cfg, 4)


def test_predictor_returns_the_output_in_the_size_of_the_image(trained):
    trainer, _, folder = trained
    cfg = trainer.cfg.clone()
    cfg.MODEL.WEIGHTS = str(folder / "model_final.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    predictor = DefaultPredictor(cfg)
    assert not predictor.model.training
    for a, b in zip(trainer.model.state_dict().values(), predictor.model.state_dict().values()):
        assert torch.equal(a, b)
    original = np.random.default_rng(0).integers(0, 255, (80, 160, 3), dtype=np.uint8)
    instances = predictor(original)["instances"]
    assert instances.image_size == (80, 160) and len(instances) and not instances.scores.requires_grad
    # Expected input: shorter side 64, channels first, float.
    resized = predictor.aug.get_transform(original).apply_image(original)
    assert resized.shape == (64, 128, 3)
    image = torch.from_numpy(resized.transpose(2, 0, 1).astype(np.float32))
    with torch.no_grad():
        expected = predictor.model([{"image": image, "height": 80, "width": 160}])[0]["instances"]
    assert torch.equal(instances.scores, expected.scores)
    # A model with RGB input gets the channels reversed.
    cfg.INPUT.FORMAT = "RGB"
    flipped = DefaultPredictor(cfg)(np.ascontiguousarray(original[:, :, ::-1]))["instances"]
    assert torch.equal(flipped.scores, expected.scores)


def test_predictor_uses_test_time_augmentation(trained):
    trainer, _, folder = trained
    cfg = with_tta(trainer.cfg)
    cfg.MODEL.WEIGHTS = str(folder / "model_final.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    original = np.random.default_rng(0).integers(0, 255, (80, 160, 3), dtype=np.uint8)
    predictor = DefaultPredictor(cfg)
    instances = predictor(original)["instances"]
    image = torch.from_numpy(original.transpose(2, 0, 1).copy())
    expected = predictor.tta([{"image": image, "height": 80, "width": 160}])[0]["instances"]
    assert instances.image_size == (80, 160) and torch.equal(instances.scores, expected.scores)
    cfg.TEST.AUG.ENABLED = False
    plain = DefaultPredictor(cfg)
    assert plain.tta is None
    assert not torch.equal(plain(original)["instances"].scores[:5], instances.scores[:5])


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (None, TypeError, "cv2.imread"),
        ([[1]], TypeError, "list"),
        (np.zeros((4, 4), np.uint8), ValueError, r"\(4, 4\)"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"\(3, 8, 8\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"\(0, 4, 3\)"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "int64"),
        (np.full((4, 4, 3), 0.5), ValueError, r"in \[0, 1\]"),
    ],
)
def test_predictor_refuses_invalid_images(trained, image, error, message):
    with pytest.raises(error, match=message):
        DefaultPredictor(trained[0].cfg)(image)


def test_predictor_works_without_the_dataset(trained, caplog):
    cfg = trained[0].cfg.clone()
    cfg.DATASETS.TEST = ("coco:/no/such/annotations.json@/no/such/images",)
    predictor = DefaultPredictor(cfg)
    assert predictor.metadata.get("thing_classes") is None
    assert "/no/such/annotations.json" in caplog.text
    predictor(np.zeros((64, 64, 3), np.uint8))


def test_default_arguments_are_parsed():
    args = default_argument_parser().parse_args(
        ["--config-file", "a.yaml", "--num-gpus", "2", "--resume", "SOLVER.BASE_LR", "0.1"]
    )
    assert (args.config_file, args.num_gpus, args.resume, args.eval_only) == ("a.yaml", 2, True, False)
    assert args.opts == ["SOLVER.BASE_LR", "0.1"]
    assert (args.num_machines, args.machine_rank, args.dist_url) == (1, 0, "auto")
    assert default_argument_parser("the end").epilog == "the end"


def test_default_setup_saves_the_config_and_seeds(tmp_path):
    cfg = tiny_cfg(tmp_path / "out")
    args = default_argument_parser().parse_args([])
    default_setup(cfg, args)
    first = torch.rand(3)
    default_setup(cfg, args)
    assert torch.equal(first, torch.rand(3))
    loaded = get_cfg()
    loaded.merge_from_file(str(tmp_path / "out" / "config.yaml"))
    assert loaded == cfg
    assert (tmp_path / "out" / "log.txt").exists()
    cfg.SEED = -1
    default_setup(cfg, args)
    assert not torch.equal(first, torch.rand(3))


def test_default_writers_are_console_json_and_tensorboard(tmp_path):
    kinds = [type(w) for w in default_writers(str(tmp_path / "new"), 10)]
    assert kinds == [CommonMetricPrinter, JSONWriter, TensorboardXWriter]
    assert os.path.isdir(tmp_path / "new")


def test_one_process_gets_no_ddp_wrapper():
    model = torch.nn.Linear(1, 1)
    assert create_ddp_model(model) is model
    called = []
    launch(called.append, 1, args=(3,))
    assert called == [3]


def test_ddp_does_not_warn_about_gradient_strides(tmp_path, monkeypatch):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    try:
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = create_ddp_model(torch.nn.Conv2d(16, 32, 1, stride=2))  # a shortcut of a ResNet
            x = torch.randn(2, 16, 12, 16).to(memory_format=torch.channels_last)
            model(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert model.module.weight.grad.any()


@pytest.mark.parametrize(
    ("args", "message"), [((0,), "num_gpus"), ((1, 2, 2), "machine_rank"), ((1, 2, 0), "dist_url")]
)
def test_launch_refuses_invalid_numbers(args, message):
    with pytest.raises(ValueError, match=message):
        launch(print, *args)


def test_missing_weights_raise_an_error_early(tmp_path):
    cfg = tiny_cfg(tmp_path)
    check_weights(cfg)
    cfg.MODEL.WEIGHTS = "https://example.com/model.pkl"
    check_weights(cfg)
    cfg.MODEL.WEIGHTS = str(tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS.*gone.pth"):
        check_weights(cfg)


def test_precise_bn_is_added_only_for_models_with_batch_norm(tmp_path):
    cfg = tiny_cfg(tmp_path, TEST__PRECISE_BN__ENABLED=True, TEST__PRECISE_BN__NUM_ITER=1)
    assert not any(isinstance(h, hooks.PreciseBN) for h in DefaultTrainer(cfg)._hooks)  # GN has none
    cfg.MODEL.RESNETS.NORM = "BN"
    assert any(isinstance(h, hooks.PreciseBN) for h in DefaultTrainer(cfg)._hooks)


def test_checkpoint_period_in_epochs_and_number_of_kept_files(tmp_path):
    """Run six steps with two of eight images each, so an epoch is four steps."""
    cfg = tiny_cfg(
        tmp_path,
        DATASETS__TEST=(),
        SOLVER__MAX_ITER=6,
        SOLVER__CHECKPOINT_EPOCHS=1,
        SOLVER__CHECKPOINT_ASYNC=True,
    )
    trainer = DefaultTrainer(cfg)
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("model*")) == ["model_0000003.pth", "model_final.pth"]
    cfg.SOLVER.CHECKPOINT_EPOCHS, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINT_KEEP_LAST = 0, 1, 2
    cfg.OUTPUT_DIR = str(tmp_path / "kept")
    DefaultTrainer(cfg).train()
    names = sorted(p.name for p in (tmp_path / "kept").glob("model*"))
    assert names == ["model_0000004.pth", "model_0000005.pth", "model_final.pth"]
