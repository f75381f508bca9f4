"""env, file_io, memory, serialize, colormap."""

import json
import logging
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from detlib.utils import env
from detlib.utils.colormap import colormap, random_color, random_colors
from detlib.utils.env import resolve_device, seed_all_rng, seeded
from detlib.utils.file_io import PathManager
from detlib.utils.memory import retry_if_cuda_oom
from detlib.utils.serialize import PicklableWrapper


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.fixture
def random_state(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # seed_all_rng sets it; monkeypatch restores it
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def test_seed_all_rng(random_state):
    assert seed_all_rng(5) == 5
    first = draw()
    seed_all_rng(5)
    assert draw() == first
    drawn = seed_all_rng(-1)
    again = draw()
    assert drawn >= 0 and again != first
    seed_all_rng(drawn)
    assert draw() == again
    assert seed_all_rng() != seed_all_rng()


@pytest.mark.parametrize("all_devices", [False, True])
def test_seeded_does_not_affect_numbers_outside(random_state, all_devices):
    seed_all_rng(5)
    first, second = draw(), draw()
    seed_all_rng(5)
    assert draw() == first
    drawn = []
    for seed in (7, 2**64 - 1, 7):
        with pytest.raises(KeyError), seeded(seed, all_devices=all_devices):
            drawn.append(draw())
            raise KeyError
    assert drawn[0] == drawn[2] and not set(drawn[0]) & {*drawn[1], *first}
    assert draw() == second
    seed_all_rng(5)
    with seeded(None, all_devices=all_devices):
        assert draw() == first
    assert draw() == second


@pytest.mark.gpu
def test_seeded_does_not_affect_gpu_numbers_outside(random_state):
    torch.cuda.manual_seed(5)
    first, second = (torch.rand(1, device="cuda") for _ in range(2))
    torch.cuda.manual_seed(5)
    assert torch.rand(1, device="cuda") == first
    within = []
    for _ in range(2):
        with seeded(7, all_devices=True):
            within.append(torch.rand(1, device="cuda"))
    assert within[0] == within[1] != first
    assert torch.rand(1, device="cuda") == second


def test_resolve_device(monkeypatch, caplog):
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(env, "_announced", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(env.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("detlib"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="detlib.utils.env"):
        assert resolve_device("auto") == resolve_device("AUTO") == torch.device("cpu")
    assert len(caplog.messages) == 1 and "cpu" in caplog.messages[0]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="'cuda:1'.*1 cuda device"):
        resolve_device("cuda:1")


def test_resolve_device_errors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="'gpu'.*'auto'"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match="'cuda'.*no cuda device.*'auto'"):
        resolve_device("cuda")


def test_local_files(tmp_path):
    path = str(tmp_path / "a.txt")
    with PathManager.open(path, "w") as f:
        f.write("x")
    assert PathManager.isfile(path) and PathManager.get_local_path(path) == path


class OutOfMemoryFunction:
    """A function that runs out of memory in the first `times` calls."""

    def __init__(self, times, error=torch.cuda.OutOfMemoryError):
        self.times, self.error, self.calls = times, error, []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        if len(self.calls) <= self.times:
            raise self.error("CUDA out of memory.")
        return "done"


class OnGpu:
    """An object that looks like a tensor on a GPU."""

    def __init__(self, device="cuda"):
        self.device = torch.device(device)

    def to(self, device):
        return OnGpu(device)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("times", [0, 1, 2])
def test_retry_if_cuda_oom(times, error):
    func = OutOfMemoryFunction(times, error)
    value = OnGpu()
    assert retry_if_cuda_oom(func)(value, [value, 3], key={"a": (value,)}) == "done"
    assert len(func.calls) == times + 1
    args, kwargs = func.calls[-1]
    expected = "cpu" if times == 2 else "cuda"
    assert {x.device.type for x in (args[0], args[1][0], kwargs["key"]["a"][0])} == {expected}
    assert args[1][1] == 3 and isinstance(kwargs["key"]["a"], tuple)


def test_retry_passes_on_other_errors_and_the_last_one():
    with pytest.raises(torch.cuda.OutOfMemoryError):
        retry_if_cuda_oom(OutOfMemoryFunction(3))()

    def broken():
        raise RuntimeError("other")

    with pytest.raises(RuntimeError, match="other"):
        retry_if_cuda_oom(broken)()


def test_picklable_wrapper(monkeypatch):
    wrapped = PicklableWrapper(PicklableWrapper(json.dumps))
    assert wrapped._obj is json.dumps
    again = pickle.loads(pickle.dumps(wrapped))
    assert again([1]) == "[1]" and again.__name__ == "dumps"
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(pickle.PicklingError, match="cloudpickle"):
        pickle.dumps(PicklableWrapper(lambda x: x))


def test_colormap():
    colors = colormap(rgb=True)
    assert colors.shape == (74, 3) and colors.dtype == np.float32
    # Entries of the published colormap, truncated to uint8.
    known = {0: (0, 113, 188), 7: (76, 76, 76), 11: (190, 190, 0), 24: (0, 84, 127), 39: (0, 84, 255)}
    known |= {53: (84, 0, 0), 58: (0, 42, 0), 70: (0, 0, 0), 71: (36, 36, 36), 73: (255, 255, 255)}
    for index, color in known.items():
        assert tuple(colors[index].astype(int)) == color, index
    np.testing.assert_allclose(colormap(rgb=False, maximum=1)[:, ::-1] * 255, colors, rtol=1e-6)
    with pytest.raises(ValueError, match="maximum"):
        colormap(maximum=2)


def test_random_colors():
    table = {tuple(color) for color in colormap(rgb=True, maximum=1)}
    assert tuple(random_color(rgb=True, maximum=1)) in table
    assert len({tuple(color) for color in random_colors(60, rgb=True, maximum=1)}) > 55  # a few repeat
    many = random_colors(100, rgb=True, maximum=1)
    assert len(many) == 100 and {tuple(color) for color in many} == table


def test_utils_do_not_import_other_packages_or_heavy_dependencies():
    code = (
        "import sys; import detlib.utils.events, detlib.utils.logger, detlib.utils.comm, "
        "detlib.utils.registry, detlib.utils.env, detlib.utils.memory, detlib.utils.serialize, "
        "detlib.utils.colormap; "
        "print([m for m in sys.modules if m.startswith('detlib') and m != 'detlib' "
        "and not m.startswith('detlib.utils')], "
        "[m for m in ('tensorboard', 'tabulate', 'matplotlib', 'cv2', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"
