"""Writers of metrics files and tracking services, in particular for resumed runs."""

import csv
import json
import logging
import os
import sys
import types

import pytest
import torch

from detlib.utils.events import EventStorage, EventWriter, JSONWriter, TensorboardXWriter
from detlib.utils.writers import WRITERS, CSVWriter, MLflowWriter, WandbWriter, build_writers


def _rows(path):
    if path.suffix == ".json":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, newline="") as f:
        return [
            {k: float(v) for k, v in row.items() if v != ""} | {"iteration": int(row["iteration"])}
            for row in csv.DictReader(f)
        ]


def _run(writer, start, end, period=2, evaluate_at=(), final=None):
    """Run the steps from `start` to before `end` like a trainer, and write every `period`-th."""
    with EventStorage(start) as storage:
        writer.start()
        for i in range(start, end):
            storage.iter = i
            storage.put_scalar("total_loss", float(i))
            storage.put_scalar("lr", 0.5, smoothing_hint=False)
            if i in evaluate_at:
                storage.put_scalar("bbox/AP", i + 0.25, smoothing_hint=False)
            if (i + 1) % period == 0:
                writer.write()
        if final is not None:
            storage.iter = end
            storage.put_scalar("bbox/AP", final, smoothing_hint=False)
        writer.finish()


@pytest.mark.parametrize("writer", [JSONWriter, CSVWriter])
def test_resumed_run_has_every_iteration_once(tmp_path, writer, caplog):
    path = tmp_path / ("metrics.json" if writer is JSONWriter else "metrics.csv")
    _run(writer(str(path)), 0, 8)
    assert [r["iteration"] for r in _rows(path)] == [1, 3, 5, 7]
    # Resumed from the checkpoint after iteration 3: the steps of rows 5 and 7 are repeated.
    _run(writer(str(path)), 4, 6)
    assert [r["iteration"] for r in _rows(path)] == [1, 3, 5]
    # A run without new rows keeps the old ones.
    with EventStorage(1):
        writer(str(path)).finish()
    assert [r["iteration"] for r in _rows(path)] == [1, 3, 5]


@pytest.mark.parametrize("writer", [JSONWriter, CSVWriter])
def test_results_after_the_last_step_are_kept(tmp_path, writer):
    path = tmp_path / ("metrics.json" if writer is JSONWriter else "metrics.csv")
    _run(writer(str(path)), 0, 4, final=40.0)
    _run(writer(str(path)), 4, 8, final=42.0)
    rows = _rows(path)
    assert [(r["iteration"], r.get("bbox/AP")) for r in rows] == [
        (1, None),
        (3, None),
        (4, 40.0),
        (5, None),
        (7, None),
        (8, 42.0),
    ]
    # A resumed finished run repeats the last evaluation.
    _run(writer(str(path)), 8, 8, final=43.0)
    assert [(r["iteration"], r.get("bbox/AP")) for r in _rows(path)[-2:]] == [(7, None), (8, 43.0)]
    # The row of a repeated step with that number is dropped.
    _run(writer(str(path)), 7, 8)
    assert [r["iteration"] for r in _rows(path)] == [1, 3, 4, 5, 7]


@pytest.mark.parametrize("writer", [JSONWriter, CSVWriter])
@pytest.mark.parametrize("killed", ["before the row", "before the results", "after the results"])
def test_results_of_re_run_evaluation_are_merged_into_their_row(tmp_path, writer, killed):
    path = tmp_path / ("metrics.json" if writer is JSONWriter else "metrics.csv")
    _run(writer(str(path)), 0, 2 if killed == "before the row" else 4)
    if killed == "after the results":
        _run(writer(str(path)), 2, 6, evaluate_at=(3,))  # later than the checkpoint from which it resumes
    before = _rows(path)
    with EventStorage(4) as storage:
        resumed = writer(str(path))
        storage.iter = 3
        storage.put_scalar("bbox/AP", 40.5, smoothing_hint=False)
        storage.put_scalar("val/loss", 7.25, smoothing_hint=False)
        storage.iter = 4
        resumed.write()
        between = _rows(path)
        storage.put_scalar("total_loss", 9.0)
        storage.iter = 5
        storage.put_scalar("bbox/AP", 41.5, smoothing_hint=False)
        resumed.finish()
    results = {"iteration": 3, "bbox/AP": 40.5, "val/loss": 7.25}
    row = {**(before[1] if len(before) > 1 else {}), **results}
    assert between == [before[0], row]
    assert _rows(path) == [
        *between,
        {"iteration": 4, "total_loss": 9.0},
        {"iteration": 5, "bbox/AP": 41.5},
    ]
    losses = {"before the row": None, "before the results": 1.5, "after the results": 2.5}
    assert row.get("total_loss") == losses[killed] and before[-1].get("bbox/AP") is None


@pytest.mark.parametrize("writer", [JSONWriter, CSVWriter])
def test_new_run_renames_the_old_file(tmp_path, writer, caplog):
    suffix = "json" if writer is JSONWriter else "csv"
    path = tmp_path / f"metrics.{suffix}"
    with caplog.at_level(logging.INFO, logger="detlib"):
        for end in (2, 4, 6):
            _run(writer(str(path)), 0, end)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"metrics.1.{suffix}", f"metrics.2.{suffix}", f"metrics.{suffix}"]
    assert [len(_rows(tmp_path / name)) for name in names] == [1, 2, 3]
    assert f"to metrics.2.{suffix}" in caplog.text


def test_csv_adds_columns_for_new_scalars(tmp_path):
    path = tmp_path / "new" / "metrics.csv"
    _run(CSVWriter(str(path)), 0, 6, evaluate_at=(3,))
    assert path.read_text() == ("iteration,lr,total_loss,bbox/AP\n1,0.5,0.5,\n3,0.5,1.5,3.25\n5,0.5,2.5,\n")
    # A resumed run keeps the columns and their order, and drops a truncated row.
    with open(path, "a") as f:
        f.write("7,0.5")
    _run(CSVWriter(str(path)), 6, 8, evaluate_at=(7,))
    assert path.read_text().splitlines()[-2:] == ["5,0.5,2.5,", "7,0.5,6.5,7.25"]


def test_tensorboard_hides_repeated_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _run(TensorboardXWriter(str(tmp_path)), 0, 8)
    _run(TensorboardXWriter(str(tmp_path)), 4, 6)
    events = EventAccumulator(str(tmp_path), purge_orphaned_data=True).Reload()
    assert [e.step for e in events.Scalars("total_loss")] == [1, 3, 5]


def test_tensorboard_hides_repeated_results_and_earlier_runs(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def points(name):
        events = EventAccumulator(str(tmp_path), purge_orphaned_data=True).Reload()
        return [(e.step, e.value) for e in events.Scalars(name)]

    _run(TensorboardXWriter(str(tmp_path)), 0, 4, final=40.0)
    # The last results are kept if training continues, and replaced if a finished run is resumed.
    _run(TensorboardXWriter(str(tmp_path)), 4, 8, final=42.0)
    assert points("bbox/AP") == [(4, 40.0), (8, 42.0)]
    _run(TensorboardXWriter(str(tmp_path)), 8, 8, final=43.0)
    assert points("bbox/AP") == [(4, 40.0), (8, 43.0)]
    # A run that restarts at 0, such as after a kill before the first checkpoint.
    _run(TensorboardXWriter(str(tmp_path)), 0, 2, period=1)
    assert [step for step, _ in points("total_loss")] == [0, 1] and points("bbox/AP") == []


def test_tensorboard_orders_runs_started_in_the_same_second(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    uids = iter(("9", "10"))  # suffixes of the file names; as text, "10" is less than "9"
    monkeypatch.setattr(event_file_writer, "_global_uid", types.SimpleNamespace(get=lambda: next(uids)))
    for start in (0, 4):
        _run(TensorboardXWriter(str(tmp_path)), start, start + 4)
    events = EventAccumulator(str(tmp_path), purge_orphaned_data=True).Reload()
    assert [e.step for e in events.Scalars("total_loss")] == [1, 3, 5, 7]


def test_unknown_writer_raises():
    assert list(WRITERS) == ["console", "json", "csv", "wandb", "mlflow", "tensorboard"]
    with pytest.raises(
        ValueError, match="Unknown writer 'tensorbord'.*choose from console, json.*'tensorboard'"
    ):
        build_writers(["json", "tensorbord"], "nowhere")
    with pytest.raises(TypeError, match="list of names, got 'json'"):
        build_writers("json", "nowhere")
    assert not os.path.exists("nowhere")


def test_build_writers_passes_arguments(tmp_path):
    names = ("tensorboard", "csv", "console")
    writers = build_writers(names, str(tmp_path), 10, {"csv": {"window_size": 3}, "json": {"no": 1}})
    assert [type(w).__name__ for w in writers] == ["CommonMetricPrinter", "CSVWriter", "TensorboardXWriter"]
    assert writers[1]._new._window_size == 3


@pytest.mark.parametrize("writer", [WandbWriter, MLflowWriter])
def test_missing_package_error_has_the_install_command(tmp_path, writer, monkeypatch):
    monkeypatch.setitem(sys.modules, writer.name, None)
    with pytest.raises(ImportError, match=rf"pip install 'detlib\[{writer.name}\]'.*TRAIN.WRITERS"):
        writer(str(tmp_path))


class _FakeRun:
    def __init__(self, kwargs):
        self.kwargs = kwargs
        self.id = kwargs.get("id", "abc")
        self.logged, self.defined, self.is_finished = [], [], False

    def define_metric(self, *args, **kwargs):
        self.defined.append((args, kwargs))

    def log(self, data):
        self.logged.append(data)

    def finish(self):
        self.is_finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    runs = []
    module = types.SimpleNamespace(
        init=lambda **kwargs: runs.append(_FakeRun(kwargs)) or runs[-1], Image=lambda array: ("image", array)
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_wandb_gets_scalars_and_images(tmp_path, fake_wandb):
    writer = WandbWriter(str(tmp_path), project="cells")
    assert fake_wandb == []  # no run before training starts
    with EventStorage() as storage:
        writer.start()
        storage.put_scalar("total_loss", 2.0)
        storage.put_image("train_images", torch.zeros(3, 4, 5, dtype=torch.uint8))
        writer.write()
        writer.write()  # nothing new
        storage.step()
        storage.put_image("train_images", torch.ones(3, 4, 5))
        writer.finish()
    (run,) = fake_wandb
    assert run.kwargs == {"dir": str(tmp_path), "project": "cells"} and run.is_finished
    assert (("*",), {"step_metric": "iteration"}) in run.defined
    assert run.logged[0] == {"total_loss": 2.0, "iteration": 0}
    assert [(d["iteration"], d["train_images"][1].shape) for d in run.logged[1:]] == [
        (0, (4, 5, 3)),
        (1, (4, 5, 3)),
    ]
    assert run.logged[2]["train_images"][1].min() == 255
    # A resumed training run continues its wandb run; a new one gets its own.
    _run(WandbWriter(str(tmp_path)), 1, 3)
    _run(WandbWriter(str(tmp_path)), 0, 1)
    assert fake_wandb[1].kwargs == {"dir": str(tmp_path), "id": "abc", "resume": "allow"}
    assert "id" not in fake_wandb[2].kwargs


def test_failing_service_does_not_end_training(tmp_path, fake_wandb, caplog):
    def fails(data):
        raise ConnectionError("no network")

    writer = WandbWriter(str(tmp_path))
    with EventStorage() as storage, caplog.at_level(logging.WARNING, logger="detlib"):
        writer.start()
        fake_wandb[0].log = fails
        for _ in range(9):
            storage.put_scalar("total_loss", 1.0)
            writer.write()
            storage.step()
        writer.finish()
    assert caplog.text.count("no network") == 5 and "further warnings are suppressed" in caplog.text


@pytest.fixture
def fake_mlflow(monkeypatch):
    class Client:
        made = []

        def __init__(self, tracking_uri):
            self.uri, self.calls, self.metrics, self.images = tracking_uri, [], [], []
            Client.made.append(self)

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            self.calls.append(("experiment", name))
            return "7"

        def create_run(self, experiment_id, run_name):
            self.calls.append(("run", experiment_id, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        def update_run(self, run_id, status):
            self.calls.append(("update", run_id, status))

        def get_run(self, run_id):
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

        def log_batch(self, run_id, metrics):
            self.metrics += metrics

        def log_image(self, run_id, image, artifact_file):
            self.images.append((artifact_file, image.shape))

        def set_terminated(self, run_id):
            self.calls.append(("terminated", run_id))

    def metric(key, value, timestamp, step):
        return (key, value, step)

    entities = types.SimpleNamespace(Metric=metric)
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client, entities=entities))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return Client.made


def test_mlflow_gets_scalars_and_images(tmp_path, fake_mlflow):
    folder = tmp_path / "my run"
    writer = MLflowWriter(str(folder))
    with EventStorage() as storage:
        storage.put_scalar("val/shapes:val?num=3/loss", 2.0)
        storage.put_image("train_images", torch.zeros(3, 4, 5, dtype=torch.uint8))
        writer.write()
        writer.finish()
    (client,) = fake_mlflow
    assert client.uri == f"file://{folder}/mlruns"
    assert client.calls == [("experiment", "detlib"), ("run", "7", "my run"), ("terminated", "r1")]
    assert client.metrics == [("val/shapes:val_num_3/loss", 2.0, 0)]
    assert client.images == [("train_images_0000000.png", (4, 5, 3))]
    _run(MLflowWriter(str(folder), tracking_uri="http://host", experiment="cells"), 4, 6)
    assert fake_mlflow[1].uri == "http://host" and fake_mlflow[1].calls[0] == ("update", "r1", "RUNNING")
    assert ("total_loss", 4.5, 5) in fake_mlflow[1].metrics


def test_real_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    _run(MLflowWriter(str(tmp_path)), 0, 4)
    _run(MLflowWriter(str(tmp_path)), 4, 6, final=float("nan"))
    client = mlflow.MlflowClient(f"file://{tmp_path}/mlruns")
    (run,) = client.search_runs([client.get_experiment_by_name("detlib").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
    history = client.get_metric_history(run.info.run_id, "total_loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (3, 1.5), (5, 4.5)]


def test_real_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = WandbWriter(str(tmp_path), project="cells")
    with EventStorage() as storage:
        writer.start()
        storage.put_scalar("total_loss", 2.0)
        storage.put_image("train_images", torch.zeros(3, 4, 5, dtype=torch.uint8))
        writer.write()
        summary = dict(writer.run.summary)
        writer.finish()
    assert summary["total_loss"] == 2.0
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_storage_is_bounded():
    storage = EventStorage()
    values = storage.history
    for i in range(25000):
        storage.iter = i
        storage.put_scalar("loss", float(i))
    history = values("loss")
    assert 10000 <= len(history.values()) <= 20000
    assert history.values()[-1] == (24999.0, 24999) and history.latest() == 24999.0
    assert history.median(5) == 24997.0 and history.avg(4) == 24997.5
    assert history.global_avg() == pytest.approx(12499.5)
    assert storage.count_samples("loss", 20) == 20
    for _ in range(100):
        storage.put_image("image", torch.zeros(3, 1, 1))
        storage.put_histogram("values", torch.arange(3.0), bins=2)
    assert len(storage._images) == len(storage._histograms) == 64


def test_custom_writer_needs_only_write():
    class MyWriter(EventWriter):
        written = 0

        def write(self):
            self.written += 1

    writer = MyWriter()
    writer.start(), writer.step(), writer.finish()
    assert writer.written == 1
