import json
import logging

import numpy as np
import pytest
import torch

from detlib.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
    has_event_storage,
)


def test_get_event_storage_returns_the_innermost():
    assert not has_event_storage()
    with pytest.raises(RuntimeError, match="with EventStorage"):
        get_event_storage()
    with EventStorage() as outer:
        with EventStorage(5) as inner:
            assert get_event_storage() is inner and inner.iter == inner.iteration == 5
        assert has_event_storage() and get_event_storage() is outer
    assert not has_event_storage()


def test_storage_is_exited_after_an_error():
    with pytest.raises(ZeroDivisionError), EventStorage():
        1 / 0  # noqa: B018
    assert not has_event_storage()


def test_scalars_and_windows():
    rng = np.random.default_rng(0)
    values = rng.normal(size=50)
    with EventStorage(100) as storage:
        for i, value in enumerate(values):
            storage.put_scalar("every", torch.tensor(value))
            storage.put_scalar("lr", value, smoothing_hint=False)
            if i % 5 == 0:
                storage.put_scalars(fifth=value, cur_iter=100 + i)
            storage.step()
    assert storage.iter == 150
    assert storage.latest()["every"] == (pytest.approx(values[-1]), 149)
    assert storage.count_samples("every", 20) == 20
    assert storage.count_samples("fifth", 20) == 4  # iterations 130, 135, 140, 145
    smooth = storage.latest_with_smoothing_hint(20)
    assert smooth["every"] == (pytest.approx(np.median(values[-20:])), 149)
    assert smooth["fifth"] == (pytest.approx(np.median(values[[30, 35, 40, 45]])), 145)
    assert smooth["lr"] == (values[-1], 149)
    assert storage.smoothing_hints() == {"every": True, "lr": False, "fifth": True}
    assert storage.history("every").global_avg() == pytest.approx(values.mean())
    assert set(storage.histories()) == {"every", "lr", "fifth"}
    with pytest.raises(KeyError, match="'nothing'.*every"):
        storage.history("nothing")


def test_smoothing_hint_must_not_change():
    storage = EventStorage()
    storage.put_scalar("loss", 1.0)
    with pytest.raises(ValueError, match="'loss'.*smoothing_hint=True"):
        storage.put_scalar("loss", 1.0, smoothing_hint=False)


def test_name_scope():
    storage = EventStorage()
    with storage.name_scope("stage1/"):
        storage.put_scalar("loss", 1.0)
        with storage.name_scope("box"):
            storage.put_scalar("loss", 2.0)
    with pytest.raises(ZeroDivisionError), storage.name_scope("broken"):
        1 / 0  # noqa: B018
    storage.put_scalar("loss", 3.0)
    assert {k: v[0] for k, v in storage.latest().items()} == {
        "stage1/loss": 1,
        "stage1/box/loss": 2,
        "loss": 3,
    }


def test_histogram_matches_numpy():
    values = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    storage = EventStorage(3)
    storage.put_histogram("weights", values, bins=20)
    (got,) = storage._histograms
    counts, edges = np.histogram(values.numpy(), bins=20)
    assert got["bucket_counts"] == counts.tolist()
    np.testing.assert_allclose(got["bucket_limits"], edges[1:], rtol=1e-5)
    assert (got["num"], got["global_step"], got["tag"]) == (77, 3, "weights")
    assert got["sum"] == pytest.approx(values.sum().item(), rel=1e-5)
    assert got["sum_squares"] == pytest.approx(values.square().sum().item(), rel=1e-5)
    with pytest.raises(ValueError, match="'empty'"):
        storage.put_histogram("empty", torch.zeros(0))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_writer(tmp_path):
    file = tmp_path / "new" / "metrics.json"
    with EventStorage() as storage:
        writer = JSONWriter(str(file), window_size=3)
        for value in (4.0, 1.0, 2.0):
            storage.put_scalar("total_loss", value)
            storage.put_scalar("lr", value, smoothing_hint=False)
            storage.step()
        storage.put_scalar("bbox/AP", 50.0, smoothing_hint=False, cur_iter=1)
        writer.write()
        writer.write()  # nothing new, so nothing is written
        storage.put_scalar("lr", 8.0, smoothing_hint=False)
        writer.write()
        writer.close()
    assert read_lines(file) == [
        {"bbox/AP": 50.0, "iteration": 1},
        {"iteration": 2, "lr": 2.0, "total_loss": 2.0},
        {"iteration": 3, "lr": 8.0},
    ]
    assert file.read_text().splitlines()[1].startswith('{"iteration": 2, "lr"')


def test_json_writer_appends_after_a_truncated_line(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_text('{"iteration": 0}\n{"iteration": 1, "lo')
    with EventStorage(2) as storage:
        writer = JSONWriter(str(file))
        storage.put_scalar("loss", 1.0)
        writer.write()
        writer.close()
    lines = file.read_text().splitlines()
    assert json.loads(lines[0]) == {"iteration": 0}
    assert json.loads(lines[2]) == {"iteration": 2, "loss": 1.0}


def test_tensorboard_writer(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    unused = TensorboardXWriter(str(tmp_path / "unused"))
    unused.close()
    assert not (tmp_path / "unused").exists()
    with EventStorage(7) as storage:
        writer = TensorboardXWriter(str(tmp_path / "tb"))
        storage.put_scalar("loss", 0.5)
        storage.put_image("image", torch.zeros(3, 4, 5, dtype=torch.uint8))
        storage.put_histogram("values", torch.arange(10.0), bins=5)
        writer.write()
        storage.step()
        storage.put_scalar("other", 0.25)
        writer.write()
        writer.close()
    assert storage._images == [] and storage._histograms == []
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(7, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("other")] == [(8, 0.25)]
    assert (events.Images("image")[0].height, events.Images("image")[0].width) == (4, 5)
    assert sum(events.Histograms("values")[0].histogram_value.bucket) == 10


@pytest.fixture
def printed(caplog):
    logger = logging.getLogger("detlib.utils.events")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="detlib.utils.events")
    yield caplog
    logger.removeHandler(caplog.handler)


def test_printer_line(printed):
    with EventStorage(19) as storage:
        storage.put_scalars(total_loss=1.5, loss_cls=0.5, time=0.25, data_time=0.125, accuracy=0.9)
        storage.put_scalar("lr", 0.02, smoothing_hint=False)
        CommonMetricPrinter(max_iter=100).write()
        line = printed.messages[-1]
        assert line.startswith("iter: 20/100  eta: 0:00:20  total_loss: 1.5  loss_cls: 0.5  ")
        assert "time: 0.2500  last_time: 0.2500  data_time: 0.1250  last_data_time: 0.1250  lr: 0.02" in line
        assert "max_mem: " in line and "accuracy" not in line
        storage.put_scalars(**{"validation_loss": 2.5, "val_loss": 3.5, "val/total_loss": 4.5})
        CommonMetricPrinter(max_iter=100).write()
        line = printed.messages[-1]
        assert "  validation_loss: 2.5  val_loss: 3.5  " in line and "val/" not in line
        assert storage.latest()["eta_seconds"] == (20.0, 19)


def test_printer_without_max_iter_or_times(printed):
    with EventStorage(3) as storage:
        storage.put_scalar("loss", 1.0)
        CommonMetricPrinter().write()
        assert printed.messages[-1].startswith("iter: 4  loss: 1  ")
        printer = CommonMetricPrinter(max_iter=10)
        printer.write()
        assert "eta" not in printed.messages[-1]  # no estimate is possible yet
        storage.iter = 8
        printer.write()
        assert "iter: 9/10  eta: 0:00:00" in printed.messages[-1]
        count = len(printed.messages)
        storage.iter = 10
        printer.write()  # nothing is new after the last iteration
        assert len(printed.messages) == count
