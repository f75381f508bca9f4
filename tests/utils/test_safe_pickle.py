"""Pickles of plain data are read unchanged; anything that could run code is refused."""

import collections
import io
import os
import pickle
import tracemalloc

import numpy as np
import pytest
import torch

from detlib.checkpoint.formats import read_checkpoint
from detlib.utils.safe_pickle import load_plain_pickle


def _load(data: bytes):
    return load_plain_pickle(io.BytesIO(data))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_round_trip(protocol):
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
    # PyTorch's reader supports only protocol 2 and fails on newer ones before it reaches the name.
    message = r"(posix|nt)\.system" if ending == ".pkl" or protocol <= 3 else "cannot be loaded"
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(str(path))
    assert str(path) in str(error.value)
    assert not witness.exists()
    # Plain pickle does run the command of the same file, so the test is meaningful.
    if ending == ".pkl":
        pickle.loads(path.read_bytes())
        assert witness.exists()


@pytest.mark.parametrize(
    ("program", "name"),
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
def test_every_import_opcode_is_refused(program, name):
    with pytest.raises(pickle.UnpicklingError, match=name.replace(".", r"\.")):
        _load(program)


def test_object_arrays_and_wrong_shapes_are_refused():
    with pytest.raises(pickle.UnpicklingError, match="dtype 'O8'"):
        _load(pickle.dumps(np.array([{}, 1], dtype=object)))
    correct = pickle.dumps(np.arange(7, dtype=np.int64), protocol=2)
    wrong = correct.replace(b"K\x07\x85", b"K\x09\x85")
    assert wrong != correct
    with pytest.raises(pickle.UnpicklingError, match="56 bytes"):
        _load(wrong)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x04.", pickle.dumps([1, 2, 3])[:-3]])
def test_error_of_broken_pickle_has_its_path(tmp_path, data):
    path = tmp_path / "broken.pkl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="broken.pkl"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_torch_tensors_round_trip(protocol):
    base = torch.arange(24, dtype=torch.float32)
    model = {
        "plain": base.reshape(4, 6),
        "view": base.reshape(4, 6)[1:, ::2].T,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "half": torch.randn(3).to(torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7),
    }
    loaded = _load(pickle.dumps({"model": model, "size": base.shape, "dtype": torch.int8}, protocol=protocol))
    assert loaded["size"] == (24,) and loaded["dtype"] is torch.int8
    for name, tensor in model.items():
        got = loaded["model"][name]
        assert type(got) is torch.Tensor and got.dtype == tensor.dtype and not got.requires_grad
        assert torch.equal(got, tensor)


def test_state_dict_versions_and_shared_arrays_are_kept():
    state = torch.nn.BatchNorm2d(2).state_dict()
    array = np.arange(3)
    loaded = _load(pickle.dumps({"model": state, "a": array, "b": [array, (array,)]}))
    assert loaded["model"]._metadata == state._metadata
    assert loaded["a"] is loaded["b"][0] is loaded["b"][1][0]


def test_tensors_beyond_their_storage_are_refused():
    program = pickle.dumps(torch.arange(6.0).reshape(2, 3), protocol=2)
    assert program.count(b"K\x02K\x03\x86") == 1
    with pytest.raises(pickle.UnpicklingError, match=r"\(2, 99\) reaches beyond"):
        _load(program.replace(b"K\x02K\x03\x86", b"K\x02K\x63\x86"))


def test_code_inside_a_tensor_storage_is_refused(tmp_path):
    witness = tmp_path / "witness"
    inner = io.BytesIO()
    torch.save(_Evil(f"touch {witness}"), inner)
    for nested in (inner.getvalue(), pickle.dumps(_Evil(f"touch {witness}"))):

        class Storage:
            def __reduce__(self, nested=nested):
                return torch.storage._load_from_bytes, (nested,)

        with pytest.raises(pickle.UnpicklingError):
            _load(pickle.dumps({"model": {"w": Storage()}}))
    assert not witness.exists()


class _Calls:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


BOMBS = {
    "bytes of a length": pickle.dumps(_Calls(bytes, 1 << 45)),
    "bytearray of a length": pickle.dumps(_Calls(bytearray, 1 << 45)),
    "memo table": b"\x80\x02]r\xff\xff\xff\x7f.",
    "memo table in text": b"(lp4294967290\n.",
    "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x0f]\x94.",
    "long bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\x0f\x00\x00abc.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent id": b"\x80\x02]Q.",
    "nesting": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_pickles_cannot_allocate_gigabytes(name):
    tracemalloc.start()
    with pytest.raises(pickle.UnpicklingError):
        _load(BOMBS[name])
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_shared_nested_lists_are_not_expanded():
    value = [np.arange(2)]
    for _ in range(60):
        value = [value, value]
    value = _load(pickle.dumps(value))
    assert value[0] is value[1]


def _nested_tuples(depth):
    value = (1,)
    for _ in range(depth):
        value = (value, value)
    return value


def _program(value, protocol=4):
    """Return the pickle of a value without its header and STOP."""
    data = pickle.dumps(value, protocol=protocol)
    assert protocol < 4 or data[2:3] == b"\x95"  # a frame of 9 bytes
    return data[11 if protocol >= 4 else 2 : -1]


@pytest.mark.parametrize(
    "start_end",
    [
        (b"}", b"Ns."),
        (b"}(", b"Nu."),
        (b"(", b"Nd."),
        (b"\x8f(", b"\x90."),
        (b"(", b"\x91."),
        (b"cbuiltins\nset\n](", b"e\x85R."),
        (b"cbuiltins\ndict\n](](", b"Nee\x85R."),
        (b"ccollections\nOrderedDict\n(](](", b"NeetR."),
    ],
)
def test_keys_that_take_long_to_hash_are_refused(start_end):
    start, end = start_end
    value = _load(b"\x80\x04" + start + _program(_nested_tuples(3)) + end)
    assert _nested_tuples(3) in value
    with pytest.raises(pickle.UnpicklingError, match="too long to hash"):
        _load(b"\x80\x04" + start + _program(_nested_tuples(60)) + end)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_shared_tuples_that_are_not_keys_are_read(protocol):
    value = _load(pickle.dumps({"a": _nested_tuples(60), (1, 2): {(3, (4, 5)), frozenset([6])}}, protocol))
    assert value["a"][0] is value["a"][1] and value[1, 2] == {(3, (4, 5)), frozenset([6])}
    many = {(i, (i, i)): [(i,)] for i in range(2000)}
    assert _load(pickle.dumps(many, protocol)) == many


def test_shape_of_many_dimensions_is_refused():
    program = pickle.dumps(np.arange(7, dtype=np.int64), protocol=2)
    shape = b"(" + b"K\x07" * 70_000 + b"t"
    with pytest.raises(pickle.UnpicklingError, match="shape"):
        _load(program.replace(b"K\x07\x85", shape))


def test_pickle_cannot_modify_the_stand_ins():
    # BUILD with (None, {name: value}) sets attributes of the object on the stack, here a stand-in.
    program = b"\x80\x02cnumpy\nndarray\nN}U\x05buildK\x01s\x86b."
    with pytest.raises(pickle.UnpicklingError, match="AttributeError"):
        _load(program)
    for name in ("numpy.dtype", "collections.OrderedDict", "_codecs.encode", "torch.Size"):
        module, _, attribute = name.rpartition(".")
        for key in (b"__class__", b"__call__", b"x"):
            change = b"N}U" + bytes([len(key)]) + key + b"K\x01s\x86b."
            with pytest.raises(pickle.UnpicklingError):
                _load(b"\x80\x02c" + module.encode() + b"\n" + attribute.encode() + b"\n" + change)
    test_plain_data_round_trip(4)
