"""Pickles of plain data are read as they are; anything that could run code is refused."""

import collections
import io
import os
import pickle

import numpy as np
import pytest
import torch

from detlib.checkpoint.formats import read_checkpoint
from detlib.checkpoint.safe_pickle import load_plain_pickle


def _load(data: bytes):
    return load_plain_pickle(io.BytesIO(data))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back_equal(protocol):
    rng = np.random.default_rng(0)
    data = {
        "model": collections.OrderedDict(
            a=rng.standard_normal((2, 3, 4)).astype(np.float32),
            b=np.asfortranarray(rng.standard_normal((3, 5))),
            c=rng.integers(0, 9, (4,)).astype(">i4"),
            d=np.zeros((0, 4), np.float16),
            e=np.array(["x", "yz"]),
            f=np.array(3.5),
            g=rng.random((6, 6))[::2, ::3],
            h=np.array([True, False]),
        ),
        "scalar": np.float64(2.5),
        "list": [1, (2.0, "three"), {4, 5}, None, b"\x00\xff", 1 + 2j, frozenset([6])],
    }
    loaded = _load(pickle.dumps(data, protocol=protocol))
    assert list(loaded) == ["model", "scalar", "list"]
    assert loaded["scalar"] == 2.5 and loaded["list"] == data["list"]
    assert type(loaded["model"]) is collections.OrderedDict
    for name, array in data["model"].items():
        got = loaded["model"][name]
        assert type(got) is np.ndarray and got.dtype == array.dtype and got.flags.writeable
        np.testing.assert_array_equal(got, array)


def test_reads_pickles_of_python_2():
    # pickle.dumps({"w": np.float32 array [1, 2]}, 2) of Python 2: raw bytes are "str" there.
    array = np.array([1, 2], np.float32)
    program = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89U\x08" + array.tobytes() + b"tbs."
    )
    np.testing.assert_array_equal(_load(program)["w"], array)


class _Evil:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("ending", [".pkl", ".pth"])
def test_code_is_refused_and_not_run(tmp_path, protocol, ending):
    witness = tmp_path / "witness"
    path = tmp_path / f"model{ending}"
    content = {"model": {"w": _Evil(f"touch {witness}")}, "__author__": "mallory"}
    if ending == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        torch.save(content, path, pickle_protocol=max(protocol, 2))
    # PyTorch's reader knows protocol 2 alone, and gives up on newer ones before it meets the name.
    said = r"(posix|nt)\.system" if ending == ".pkl" or protocol <= 3 else "cannot be loaded"
    with pytest.raises(ValueError, match=said) as error:
        read_checkpoint(str(path))
    assert str(path) in str(error.value)
    assert not witness.exists()
    # The same file does run its command in a trusting reader, so the test would notice.
    if ending == ".pkl":
        pickle.loads(path.read_bytes())
        assert witness.exists()


@pytest.mark.parametrize(
    ("program", "named"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", "builtins.eval"),
        (b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.", "builtins.getattr"),
        (b"(S'1'\ni__builtin__\neval\n.", "__builtin__.eval"),
        (b"\x80\x04\x8c\x05numpy\x8c\x11core.multiarray.x\x93.", "numpy.core.multiarray.x"),
        (b"cnumpy.testing._private.utils\nrunstring\n.", "runstring"),
        (b"cnumpy\nload\n.", "numpy.load"),
    ],
)
def test_every_way_to_import_is_refused(program, named):
    with pytest.raises(pickle.UnpicklingError, match=named.replace(".", r"\.")):
        _load(program)


def test_object_arrays_and_lying_shapes_are_refused():
    with pytest.raises(pickle.UnpicklingError, match="dtype 'O8'"):
        _load(pickle.dumps(np.array([{}, 1], dtype=object)))
    honest = pickle.dumps(np.arange(7, dtype=np.int64), protocol=2)
    lying = honest.replace(b"K\x07\x85", b"K\x09\x85")
    assert lying != honest
    with pytest.raises(pickle.UnpicklingError, match="56 bytes"):
        _load(lying)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x04.", pickle.dumps([1, 2, 3])[:-3]])
def test_broken_pickles_are_named(tmp_path, data):
    path = tmp_path / "broken.pkl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="broken.pkl"):
        read_checkpoint(str(path))
