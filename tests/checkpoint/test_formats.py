"""Reading of checkpoint files in all formats, refusal of unsafe ones, and the report of loaded parameters."""

import io
import logging
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from detlib.checkpoint import Checkpointer, DetectionCheckpointer
from detlib.checkpoint.formats import CheckpointError, read_checkpoint, write_checkpoint
from detlib.utils.logger import setup_logger


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(backbone=nn.Conv2d(3, 4, 1), head=nn.Linear(4, 2)))


def equal(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def changed(model):
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    return model


def as_arrays(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def write(path, content, kind, protocol=4):
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old torch")


FILES = {
    "zoo.pkl": ("pickle", lambda m: {"model": as_arrays(m), "__author__": "Detectron2 Model Zoo"}),
    "tensors.pkl": ("pickle", lambda m: {"model": m.state_dict()}),
    "bare.pkl": ("pickle", lambda m: OrderedDict(m.state_dict())),
    "torch.pkl": ("torch", lambda m: {"model": m.state_dict()}),
    "old_torch.pkl": ("old torch", lambda m: {"model": m.state_dict()}),
    "trainer.pth": ("torch", lambda m: {"model": m.state_dict(), "optimizer": {"state": {}}, "iteration": 9}),
    "old.pth": ("old torch", lambda m: {"model": m.state_dict(), "iteration": np.int64(9)}),
    "bare.pth": ("torch", lambda m: m.state_dict()),
    "parallel.pth": ("torch", lambda m: {"model": {f"module.{k}": v for k, v in m.state_dict().items()}}),
    "lightning.ckpt": ("torch", lambda m: {"state_dict": m.state_dict()}),
    "slowfast.pyth": ("torch", lambda m: {"model_state": m.state_dict(), "epoch": 3, "cfg": "A: 1"}),
}


@pytest.mark.parametrize("name", FILES)
def test_file_sets_all_parameters(tmp_path, name):
    kind, content = FILES[name]
    model = small_model()
    for protocol in range(2, 6) if kind == "pickle" else (2,):
        write(tmp_path / name, content(model), kind, protocol)
        other = changed(small_model())
        checkpointer = DetectionCheckpointer(other)
        checkpointer.load(str(tmp_path / name), checkpointables=[])
        assert equal(model, other)
        assert sorted(checkpointer.report.loaded) == sorted(model.state_dict())
        assert not checkpointer.report.missing_keys and not checkpointer.report.unexpected_keys


def test_safetensors_round_trip_with_shared_and_strided_tensors(tmp_path):
    model = small_model()
    model.tied = model.head  # two names of one parameter
    model.register_buffer("view", torch.arange(12.0).reshape(3, 4).T)
    Checkpointer(model, str(tmp_path)).save("weights.safetensors", iteration=3)
    assert (tmp_path / "weights.safetensors").exists()
    other = changed(small_model())
    other.tied = other.head
    other.register_buffer("view", torch.zeros(4, 3))
    DetectionCheckpointer(other).load(str(tmp_path / "weights.safetensors"))
    assert equal(model, other)
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 50)
    with pytest.raises(ValueError, match="broken.safetensors is broken"):
        read_checkpoint(str(tmp_path / "broken.safetensors"))


class Evil:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (self.witness,)


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "a.pyth", "a.ckpt", "old.pth", "torch.pkl"])
def test_code_runs_only_with_trust(tmp_path, name):
    witness = str(tmp_path / "witness")
    kind = "old torch" if name == "old.pth" else "pickle" if name == "a.pkl" else "torch"
    content = {"model": small_model().state_dict(), "extra": Evil(witness)}
    write(tmp_path / name, content, kind, 2)
    checkpointer = DetectionCheckpointer(small_model())
    with pytest.raises(ValueError, match=r"(posix|nt)\.mkdir"):
        checkpointer.load(str(tmp_path / name))
    assert not os.path.exists(witness)
    checkpointer.load(str(tmp_path / name), trust=True)
    assert os.path.exists(witness)


def test_zip_inside_a_zip_is_refused(tmp_path):
    inner = io.BytesIO()
    torch.save({"model": {"w": Evil(str(tmp_path / "witness"))}}, inner)

    class Nested:
        def __reduce__(self):
            return torch.load, (io.BytesIO(inner.getvalue()),)

    torch.save({"model": {"w": Nested()}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="could run code"):
        read_checkpoint(str(tmp_path / "a.pth"))
    assert not (tmp_path / "witness").exists()


def test_zip_bomb_is_refused(tmp_path):
    torch.save({"model": {"w": torch.zeros(1_000_000)}}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as source:
        with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
            for entry in source.infolist():
                bomb.writestr(entry.filename, source.read(entry))
    with pytest.raises(ValueError, match=r"refused: its \d+ bytes would expand to \d{7}"):
        read_checkpoint(str(tmp_path / "bomb.pth"))


def mutated(rng, data):
    """Cut, change, remove, repeat or clear a part of a file."""
    data = bytearray(data)
    start, length = rng.integers(len(data)), rng.integers(1, 60)
    match rng.integers(5):
        case 0:
            del data[start:]
        case 1:
            data[start : start + length % 8] = rng.bytes(length % 8)
        case 2:
            del data[start : start + length]
        case 3:
            data[start : start + length] = data[: 2 * length]
        case 4:
            data[start : start + length] = bytes(length)
    return bytes(data)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["zip.pth", "old torch.pth", "pickle.pkl", "weights.safetensors"])
def test_damaged_file_fails_with_one_error_type_and_its_name(tmp_path, kind, count):
    intact, damaged = tmp_path / kind, tmp_path / f"damaged {kind}"
    if kind == "weights.safetensors":
        write_checkpoint(str(intact), {"model": small_model().state_dict()})
    else:
        content = {"model": as_arrays(small_model()), "iteration": np.int64(3)}
        write(intact, content, os.path.splitext(kind)[0])
    rng = np.random.default_rng(0)
    failed = 0
    for _ in range(count):
        damaged.write_bytes(mutated(rng, intact.read_bytes()))
        try:
            read_checkpoint(str(damaged))
        except CheckpointError as error:
            assert str(damaged) in str(error)
            failed += 1
    assert failed > count / 3


def test_other_formats_are_recognized(tmp_path):
    archive = io.BytesIO()
    np.savez(archive, a=np.zeros(2))
    script = io.BytesIO()
    with zipfile.ZipFile(script, "w") as file:
        file.writestr("m/data.pkl", pickle.dumps(1))
        file.writestr("m/constants.pkl", pickle.dumps(1))
    whole = io.BytesIO()
    torch.save({"model": {}}, whole)
    cases = {
        "empty.pth": (b"", "is empty"),
        "page.pkl": (b"\n<!DOCTYPE html><html>", "is a web page"),
        "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        "keras.pth": (b"\x89HDF\r\n\x1a\n", "HDF5"),
        "arrays.pth": (archive.getvalue(), "zip archive of a.npy"),
        "script.pth": (script.getvalue(), "TorchScript"),
        "cut.pth": (whole.getvalue()[:-30], "is broken: the end of the zip archive is missing"),
        "net.onnx": (b"\x08\x07", "ONNX"),
        "notes.pth": (b"learning rate 0.01", "is a text file, which begins with 'learning rate"),
        "cfg.yaml": (b"MODEL: {}", "is a config: pass it as --config-file, and set MODEL.WEIGHTS"),
        "cfg.py": (b"model = 1", "is a config"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as error:
            DetectionCheckpointer(small_model()).load(str(tmp_path / name))
        assert name in str(error.value)
    with pytest.raises(FileNotFoundError, match="R_50.yaml.*get_checkpoint_url"):
        read_checkpoint("COCO-Detection/R_50.yaml")
    # A wrong extension does not matter.
    write(tmp_path / "pickle.pth", {"model": as_arrays(small_model())}, "pickle")
    write_checkpoint(str(tmp_path / "a.safetensors"), {"model": small_model().state_dict()})
    (tmp_path / "a.safetensors").rename(tmp_path / "safe.pth")
    for name in ("pickle.pth", "safe.pth"):
        assert set(read_checkpoint(str(tmp_path / name))["model"]) == set(small_model().state_dict())


def test_trusted_file_that_is_damaged_is_named(tmp_path):
    torch.save({"model": small_model().state_dict()}, tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:400])
    with pytest.raises(CheckpointError, match="a.pth is broken"):
        read_checkpoint(str(tmp_path / "a.pth"), trust=True)


def test_parameter_names_must_be_strings(tmp_path):
    torch.save({"model": {3: torch.zeros(1)}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="a.pth has the parameter name 3"):
        read_checkpoint(str(tmp_path / "a.pth"))


def nested_tuples():
    value = (1,)
    for _ in range(60):
        value = (value, value)
    return pickle.dumps(value, protocol=2)[2:-1]


@pytest.mark.parametrize("kind", ["pickle", "zip", "old torch"])
def test_keys_that_take_long_to_hash_are_refused(tmp_path, kind):
    program = b"\x80\x02}" + nested_tuples() + b"Ns."
    path = tmp_path / ("a.pkl" if kind == "pickle" else "a.pth")
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/data.pkl", program)
            file.writestr("a/version", "3")
    elif kind == "old torch":
        torch.save({}, path, _use_new_zipfile_serialization=False)
        empty = pickle.dumps({}, protocol=2)
        assert empty in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(empty, program))
    else:
        path.write_bytes(program)
    with pytest.raises(CheckpointError, match="a.p.*would take too long to hash"):
        read_checkpoint(str(path))


def test_file_that_is_not_a_checkpoint_fails(tmp_path):
    for content, message in (([1], "a list instead"), ({"a": 1}, "not arrays: 'a'"), ({}, "it is empty")):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=message):
            read_checkpoint(str(tmp_path / "a.pth"))
    torch.save({"model": [1]}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds a list under 'model'"):
        read_checkpoint(str(tmp_path / "a.pth"))


def logged(caplog, model, path):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="detlib"):
        checkpointer = DetectionCheckpointer(model)
        checkpointer.load(path)
    levels = {
        level: "\n".join(r.getMessage() for r in caplog.records if r.levelno == level) for level in (20, 30)
    }
    return levels[20], levels[30], checkpointer.report


def test_report_has_the_renamed_parameters(tmp_path, caplog):
    model = small_model()
    part = {name.removeprefix("backbone."): value for name, value in model.backbone.state_dict().items()}
    write_checkpoint(str(tmp_path / "a.pth"), {"model": part, "matching_heuristics": True})
    model = nn.Sequential(OrderedDict(backbone=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm1d(2, affine=False)))
    info, warning, report = logged(caplog, model, str(tmp_path / "a.pth"))
    assert report.renamed == {"backbone.weight": "weight", "backbone.bias": "bias"}
    assert "  (no module) -> backbone" in info and "  backbone: 2 of 2" in info and "  norm: 0 of 2" in info
    assert "norm.{running_mean, running_var}" in warning


def test_other_number_of_classes_loads_the_rest(tmp_path, caplog):
    model = small_model()
    write_checkpoint(str(tmp_path / "a.pth"), {"model": model.state_dict()})
    other = changed(small_model())
    other.head = nn.Linear(4, 5)
    _, warning, report = logged(caplog, other, str(tmp_path / "a.pth"))
    assert torch.equal(other.backbone.weight, model.backbone.weight)
    assert "head.weight: (2, 4) in the file, (5, 4) in the model" in warning
    assert "keep their initial values" in warning
    assert [name for name, _, _ in report.incorrect_shapes] == ["head.weight", "head.bias"]


def test_file_of_another_model_gives_a_warning(tmp_path, caplog):
    write_checkpoint(str(tmp_path / "a.pth"), {"model": {"layer1.w": torch.ones(1)}})
    _, warning, report = logged(caplog, small_model(), str(tmp_path / "a.pth"))
    assert "Almost nothing" in warning and "0 of 4" in warning
    assert "'layer1.w'" in warning and "'backbone.weight'" in warning and "matching_heuristics" in warning
    assert report.loaded == []


def test_options_at_the_end_of_a_path(tmp_path):
    model = small_model()
    state = {name.partition(".")[2]: value for name, value in model.state_dict().items() if "head" in name}
    write_checkpoint(str(tmp_path / "a.pth"), {"model": {f"head.{k}": v for k, v in state.items()}})
    wrapped = nn.ModuleDict({"deep": changed(small_model())})
    DetectionCheckpointer(wrapped).load(f"{tmp_path}/a.pth?matching_heuristics=True")
    assert torch.equal(wrapped["deep"].head.weight, model.head.weight)
    with pytest.raises(ValueError, match="no conversion 'torchvison'.*'torchvision'"):
        DetectionCheckpointer(wrapped).load(f"{tmp_path}/a.pth?convert=torchvison")
    with pytest.raises(FileNotFoundError, match=r"a.pth\?other=1"):
        DetectionCheckpointer(wrapped).load(f"{tmp_path}/a.pth?other=1")


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to measure memory")
def test_large_file_is_in_memory_once(tmp_path):
    """Loading 60 MB of weights must take at most 1.3 times as much memory, in addition to the model."""
    code = """
import re, sys, torch
from detlib.checkpoint import DetectionCheckpointer
class Big(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for i in range(15):
            self.register_parameter(f"p{i}", torch.nn.Parameter(torch.ones(1_000_000)))
model = Big()
DetectionCheckpointer(model).load(sys.argv[2])  # a small file, so that imports do not count
def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # reset the peak
before = memory("VmRSS")
DetectionCheckpointer(model).load(sys.argv[1])
print((memory("VmHWM") - before) / 60e6)
assert model.p7[0] == 7
"""
    import subprocess
    import sys

    arrays = {f"p{i}": np.full(1_000_000, i, np.float32) for i in range(15)}
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    files = {
        "a.pth": lambda path: write_checkpoint(path, {"model": tensors}),
        "a.safetensors": lambda path: write_checkpoint(path, {"model": tensors}),
        "a.pkl": lambda path: open(path, "wb").write(pickle.dumps({"model": arrays, "__author__": "x"})),
    }
    for name, save in files.items():
        save(str(tmp_path / name))
        small = tmp_path / f"small{name[1:]}"
        empty = {"p0": np.zeros(1, np.float32)}
        if name == "a.pkl":
            small.write_bytes(pickle.dumps({"model": empty, "__author__": "x"}))
        else:
            write_checkpoint(str(small), {"model": {"p0": torch.zeros(1)}})
        command = [sys.executable, "-c", code, str(tmp_path / name), str(small)]
        ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        # Less than the file itself would mean that the measurement is wrong.
        assert 0.9 < ratio < 1.3, f"{name}: {ratio:.2f}"


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "detector.", "_orig_mod.", "ema.", "module.model.", "model._orig_mod.detector."],
)
def test_prefix_of_all_names_is_removed_where_the_model_has_the_rest(tmp_path, caplog, prefix):
    model = small_model()
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    other = changed(small_model())
    info, _, report = logged(caplog, other, str(tmp_path / "a.ckpt"))
    assert equal(model, other) and not report.renamed
    assert f"Removed the prefix '{prefix}'" in info and "All 4 parameters" in info


def test_prefix_is_kept_where_the_model_has_it(tmp_path):
    inner = small_model()
    model = nn.ModuleDict({"model": inner})
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    other = nn.ModuleDict({"model": changed(small_model())})
    DetectionCheckpointer(other).load(str(tmp_path / "a.pth"))
    assert equal(model, other)
    # Not all names have the prefix.
    torch.save({"model": inner.state_dict() | {"model.x": torch.ones(1)}}, tmp_path / "a.pth")
    checkpointer = DetectionCheckpointer(changed(inner))
    checkpointer.load(str(tmp_path / "a.pth"))
    assert len(checkpointer.report.loaded) == 4 and checkpointer.report.unexpected_keys == ["model.x"]


def test_averaged_model_of_torch_is_read(tmp_path):
    model = small_model()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save(averaged.state_dict(), tmp_path / "a.pth")
    other = changed(small_model())
    DetectionCheckpointer(other).load(str(tmp_path / "a.pth"))
    assert equal(model, other)


def test_values_that_are_not_finite_are_reported(tmp_path, caplog):
    state = small_model().state_dict()
    state["head.bias"][1] = float("nan")
    state["backbone.bias"][1] = float("inf")
    torch.save({"model": state}, tmp_path / "a.pth")
    _, warning, _ = logged(caplog, small_model(), str(tmp_path / "a.pth"))
    assert "2 of the loaded parameters and buffers have values that are NaN or infinite" in warning
    assert "backbone.bias, head.bias" in warning
    _, warning, _ = logged(caplog, small_model(), str(tmp_path / "a.pth?matching_heuristics=True"))
    assert "head.bias" in warning


def test_infinite_values_are_not_reported_where_the_model_has_them(tmp_path, caplog):
    model = small_model()
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    assert logged(caplog, model, str(tmp_path / "a.pth"))[1] == ""


def test_arrays_that_are_not_real_numbers_fail(tmp_path):
    def fails(value, message):
        path = tmp_path / "a.pkl"
        path.write_bytes(pickle.dumps({"model": as_arrays(small_model()) | {"head.bias": value}}))
        with pytest.raises(ValueError, match=f"a.pkl cannot be loaded: .*'head.bias' .*{message}"):
            DetectionCheckpointer(small_model()).load(str(path))

    fails(np.zeros(2, np.complex64), "complex type torch.complex64")
    fails(np.array(["a", "b"]), "type <U1, which is not a number")
    fails([1.0], "is a list, not an array")


def test_big_endian_arrays_are_read(tmp_path):
    model = small_model()
    arrays = {name: value.astype(">f4") for name, value in as_arrays(model).items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": arrays}))
    other = changed(small_model())
    DetectionCheckpointer(other).load(str(tmp_path / "a.pkl"))
    assert equal(model, other)


def test_long_report_is_complete_in_the_log_file_and_short_on_the_console(tmp_path, capsys):
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(40)])
    torch.save({"model": {f"{i}.weight": torch.ones(2, 2) for i in range(20)}}, tmp_path / "a.pth")
    log = setup_logger(str(tmp_path), name="detlib")
    try:
        DetectionCheckpointer(model).load(str(tmp_path / "a.pth"))
    finally:
        for handler in list(log.handlers):
            log.removeHandler(handler)
    console, file = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    assert "39.{bias, weight}" in file and "  19.bias" in file and "more lines" not in file
    assert "39.{bias, weight}" not in console and "  ... and 33 more lines in the log file" in console
    assert console.count("\n") < 25 < file.count("\n")
