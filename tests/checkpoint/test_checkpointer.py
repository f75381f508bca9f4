"""Saving, loading, resuming, and messages on names or shapes that differ."""

import errno
import logging
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from detlib.checkpoint import Checkpointer, DetectionCheckpointer, PeriodicCheckpointer
from detlib.checkpoint import formats as formats_module
from detlib.checkpoint.formats import read_checkpoint
from detlib.checkpoint.key_matching import group_by_module, match_by_longest_suffix


class _Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)


def _equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_round_trip_restores_model_and_optimizer(tmp_path):
    torch.manual_seed(0)
    model = _Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.head(model.backbone(torch.rand(2, 3, 4, 4)).mean((2, 3))).sum().backward()
    optimizer.step()
    saver = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer)
    saver.save("model_0000009", iteration=9, metric=np.float64(1.5), best=np.int64(3))

    other = _Tiny()
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    loader = DetectionCheckpointer(other, str(tmp_path), optimizer=other_optimizer)
    assert loader.has_checkpoint()
    assert loader.get_checkpoint_file() == str(tmp_path / "model_0000009.pth")
    rest = loader.resume_or_load("", resume=True)
    assert rest == {"iteration": 9, "metric": 1.5, "best": 3}
    assert _equal(model, other)
    assert other_optimizer.param_groups[0]["lr"] == 0.1
    for mine, theirs in zip(optimizer.state.values(), other_optimizer.state.values()):
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])
    # PyTorch alone can read it, without running code.
    assert set(torch.load(tmp_path / "model_0000009.pth", weights_only=True)) == {
        "model", "optimizer", "iteration", "metric", "best",
    }  # fmt: skip


def test_load_without_resume_leaves_other_states(tmp_path):
    model = _Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).save("a")
    other = _Tiny()
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.5)
    loader = DetectionCheckpointer(other, str(tmp_path / "elsewhere"), optimizer=other_optimizer)
    rest = loader.resume_or_load(str(tmp_path / "a.pth"), resume=True)
    assert "optimizer" in rest and _equal(model, other)
    assert other_optimizer.param_groups[0]["lr"] == 0.5


def test_only_plain_types_are_saved(tmp_path):
    checkpointer = Checkpointer(_Tiny(), str(tmp_path))
    with pytest.raises(TypeError, match=r"checkpoint\['extra'\]\['x'\] is a .*_Tiny"):
        checkpointer.save("a", extra={"x": _Tiny()})
    assert os.listdir(tmp_path) == []


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    model = _Tiny()
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model_final", iteration=1)
    before = (tmp_path / "model_final.pth").read_bytes()

    def half_a_save(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(formats_module.torch, "save", half_a_save)
    with pytest.raises(OSError, match="disk full"):
        checkpointer.save("model_final", iteration=2)
    with pytest.raises(OSError, match="disk full"):
        checkpointer.save("model_0000002", iteration=2)
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_error_of_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    checkpointer = DetectionCheckpointer(_Tiny(), str(tmp_path))
    with pytest.raises(OSError, match="No space left on device: '.*model_final.pth'"):
        checkpointer.save("model_final")
    assert os.listdir(tmp_path) == []


def test_missing_and_broken_files_are_named(tmp_path):
    checkpointer = DetectionCheckpointer(_Tiny(), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        checkpointer.load(str(tmp_path / "nowhere.pth"))
    torch.save({"model": {"a.b": torch.ones(1)}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    half = (tmp_path / "old.pth").read_bytes()[:40]
    contents = {
        "broken.pth": b"PK\x03\x04 not a zip",
        "empty.pth": b"",
        "junk.pth": b"junk",
        "half.pth": half,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            checkpointer.load(str(tmp_path / name))
    torch.save({"epoch": 3, "state": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="neither a 'model' entry.*'epoch', 'state'"):
        checkpointer.load(str(tmp_path / "other.pth"))
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        checkpointer.load(str(tmp_path / "list.pth"))
    (tmp_path / "last_checkpoint").write_text("gone.pth")
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        checkpointer.resume_or_load("", resume=True)


def test_torch_file_with_numpy_content_is_read(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    torch.save({"model": {"w": array}, "best": np.float64(0.5), "n": np.int64(2)}, tmp_path / "old.pth")
    content = read_checkpoint(str(tmp_path / "old.pth"))
    np.testing.assert_array_equal(content["model"]["w"], array)
    assert content["best"] == 0.5 and content["n"] == 2


def test_zoo_pickle_and_bare_state_dicts_are_read(tmp_path):
    model = _Tiny()
    arrays = {k: v.numpy() for k, v in model.state_dict().items()}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}))
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    wrapped = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"model": wrapped}, tmp_path / "ddp.pth")
    for name in ("zoo.pkl", "bare.pth", "ddp.pth"):
        other = _Tiny()
        assert not _equal(model, other)
        DetectionCheckpointer(other).load(str(tmp_path / name))
        assert _equal(model, other), name


def test_differences_are_reported_by_module(tmp_path, caplog):
    model = _Tiny()
    state = model.state_dict()
    del state["backbone.0.weight"], state["backbone.0.bias"]
    state["head.weight"] = torch.zeros(5, 4)
    state["mask.deconv.weight"] = state["mask.deconv.bias"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "m.pth")
    other = _Tiny()
    before = other.head.weight.clone()
    with caplog.at_level(logging.WARNING, logger="detlib"):
        DetectionCheckpointer(other).load(str(tmp_path / "m.pth"))
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "head.weight: (5, 4) in the file, (2, 4) in the model" in text
    assert "  backbone.0.{bias, weight}" in text
    assert "  mask.deconv.{bias, weight}" in text
    assert "Missing" in text and "head.{" not in text
    assert torch.equal(other.head.weight, before)
    assert torch.equal(other.head.bias, model.head.bias)


def test_no_warning_on_missing_pixel_mean_and_old_anchors(tmp_path, caplog):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("pixel_mean", torch.ones(3))
            self.fc = nn.Linear(1, 1)

    state = {**nn.Linear(1, 1).state_dict(prefix="fc."), "p.anchor_generator.cell_anchors.0": torch.ones(1)}
    torch.save({"model": state}, tmp_path / "m.pth")
    with caplog.at_level(logging.WARNING, logger="detlib"):
        DetectionCheckpointer(Detector()).load(str(tmp_path / "m.pth"))
    assert not caplog.records


def test_matching_heuristics_load_a_backbone(tmp_path):
    model = _Tiny()
    part = {"0.weight": np.full((4, 3, 1, 1), 7, np.float32), "1.weight": np.full(4, 5, np.float32)}
    content = {"model": part, "__author__": "x", "matching_heuristics": True}
    (tmp_path / "part.pkl").write_bytes(pickle.dumps(content))
    DetectionCheckpointer(model).load(str(tmp_path / "part.pkl"))
    assert (model.backbone[0].weight == 7).all() and (model.backbone[1].weight == 5).all()


def test_longest_suffix_wins():
    shapes = {"bottom_up.stem.conv1.weight": (1,), "bottom_up.res2.conv1.weight": (1,), "fc.w": (2,)}
    state = {"conv1.weight": np.zeros(1), "stem.conv1.weight": np.ones(1), "w": np.zeros(3), "v1.weight": 0}
    got = match_by_longest_suffix(shapes, state)
    assert list(got) == ["bottom_up.res2.conv1.weight", "bottom_up.stem.conv1.weight", "fc.w", "v1.weight"]
    assert got["bottom_up.stem.conv1.weight"] == 1
    with pytest.raises(ValueError, match="'w' .* both 'a.w' and 'b.w'"):
        match_by_longest_suffix({"a.w": (1,), "b.w": (1,)}, {"w": np.zeros(1)})
    assert list(match_by_longest_suffix({"a.w": (1,), "b.w": (2,)}, {"w": np.zeros(2)})) == ["b.w"]
    assert list(match_by_longest_suffix({"a.w": (1,), "b.w": (2,)}, {"w": np.zeros(3)})) == ["w"]


def test_group_by_module_has_one_line_per_module():
    assert group_by_module(["a.b.w", "a.b.v", "c", "a.w"]) == "  a.b.{v, w}\n  c\n  a.w"


def test_duplicate_or_unknown_object_fails(tmp_path):
    checkpointer = Checkpointer(_Tiny(), str(tmp_path))
    checkpointer.add_checkpointable("o", nn.Linear(1, 1))
    with pytest.raises(KeyError, match="'o'"):
        checkpointer.add_checkpointable("o", nn.Linear(1, 1))
    with pytest.raises(TypeError, match="state_dict"):
        checkpointer.add_checkpointable("p", 3)
    checkpointer.save("x")
    with pytest.raises(KeyError, match="'q'"):
        checkpointer.load(str(tmp_path / "x.pth"), checkpointables=["q"])


def test_periodic_checkpointer_keeps_the_newest_files(tmp_path):
    checkpointer = Checkpointer(_Tiny(), str(tmp_path))
    periodic = PeriodicCheckpointer(checkpointer, 2, max_iter=9, max_to_keep=2)
    for iteration in range(9):
        periodic.step(iteration, extra=iteration * 10)
    files = [os.path.basename(path) for path in checkpointer.get_all_checkpoint_files()]
    assert files == ["model_0000005.pth", "model_0000007.pth", "model_final.pth"]
    assert checkpointer.get_checkpoint_file().endswith("model_final.pth")
    final = read_checkpoint(checkpointer.get_checkpoint_file())
    assert final["iteration"] == 8 and final["extra"] == 80
    with pytest.raises(ValueError, match="max_to_keep"):
        PeriodicCheckpointer(checkpointer, 2, max_to_keep=0)


def test_save_to_disk_false_writes_nothing(tmp_path):
    checkpointer = Checkpointer(_Tiny(), str(tmp_path), save_to_disk=False)
    PeriodicCheckpointer(checkpointer, 1, max_iter=1, max_to_keep=1).step(0)
    assert os.listdir(tmp_path) == []


def test_object_store_can_be_saved_to_and_resumed_from(tmp_path, monkeypatch):
    monkeypatch.setenv("DETLIB_CACHE", str(tmp_path))
    folder = "memory://bucket/checkpoints"
    model = nn.Linear(2, 3)
    Checkpointer(model, folder).save("model_0000001", iteration=1)
    again = nn.Linear(2, 3)
    checkpointer = Checkpointer(again, folder)
    assert checkpointer.has_checkpoint()
    assert checkpointer.get_all_checkpoint_files() == [f"{folder}/model_0000001.pth"]
    assert checkpointer.resume_or_load("")["iteration"] == 1
    assert torch.equal(model.weight, again.weight)


@pytest.mark.parametrize(
    "name", ["../evil.pth", "/etc/passwd", "a/../../evil.pth", "..", "", "C:\\x.pth", "a\0b", "x" * 5000]
)
def test_last_checkpoint_must_not_lead_out_of_its_folder(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"model": _Tiny().state_dict()}, tmp_path / "evil.pth")
    (folder / "last_checkpoint").write_text(name)
    checkpointer = DetectionCheckpointer(_Tiny(), str(folder))
    with pytest.raises(ValueError, match="last_checkpoint must hold the name of a file in its folder"):
        checkpointer.resume_or_load("", resume=True)


def test_last_checkpoint_that_is_not_text_fails(tmp_path):
    (tmp_path / "last_checkpoint").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ValueError, match="last_checkpoint must hold"):
        DetectionCheckpointer(_Tiny(), str(tmp_path)).get_checkpoint_file()


@pytest.mark.parametrize("name", ["../precious.pth", "/precious.pth", 3])
def test_checkpoint_cannot_have_files_outside_of_its_folder_removed(tmp_path, name):
    checkpointer = Checkpointer(_Tiny(), str(tmp_path))
    periodic = PeriodicCheckpointer(checkpointer, period=1, max_to_keep=1)
    with pytest.raises(ValueError, match="recent_checkpoints must be names of files"):
        periodic.load_state_dict({"recent_checkpoints": [name]})


@pytest.mark.parametrize("state", [{}, 3, {"state": {}, "param_groups": [{"lr": 1, "params": [9, 9, 9]}]}])
def test_error_of_a_state_that_does_not_fit_names_the_file(tmp_path, state):
    torch.save({"model": _Tiny().state_dict(), "optimizer": state}, tmp_path / "a.pth")
    model = _Tiny()
    checkpointer = DetectionCheckpointer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="state of 'optimizer' in checkpoint file .*a.pth cannot be loaded"):
        checkpointer.load(str(tmp_path / "a.pth"))
