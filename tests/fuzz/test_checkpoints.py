"""Damaged checkpoints and proposal files."""

import os
import pickle

import numpy as np
import torch

from detlib.checkpoint.formats import read_checkpoint
from detlib.data.proposals import load_proposals_into_dataset, transform_proposals
from detlib.data.transforms import HFlipTransform
from tests.fuzz import mutations
from tests.fuzz.engine import Target, fuzz_tests


def _state():
    return {"conv.weight": torch.arange(12.0).reshape(3, 4), "conv.bias": torch.ones(3, dtype=torch.float16)}


def _write_pth(folder):
    torch.save({"model": _state(), "iteration": 7, "names": ["a", "b"]}, os.path.join(folder, "model.pth"))


def _write_legacy_pth(folder):
    path = os.path.join(folder, "model.pth")
    torch.save({"model": _state()}, path, _use_new_zipfile_serialization=False)


def _write_pkl(folder):
    content = {"model": {k: v.numpy() for k, v in _state().items()}, "__author__": "test"}
    with open(os.path.join(folder, "model.pkl"), "wb") as file:
        pickle.dump(content, file, protocol=2)


def _write_safetensors(folder):
    from safetensors.torch import save_file

    save_file(_state(), os.path.join(folder, "model.safetensors"))


def _write_proposals(folder):
    rng = np.random.default_rng(0)
    content = {
        "ids": [1, 2],
        "boxes": [rng.random((3, 4), dtype=np.float32), rng.random((1, 4), dtype=np.float32)],
        "objectness_logits": [np.ones(3, dtype=np.float32), np.ones(1, dtype=np.float32)],
        "bbox_mode": 0,
    }
    with open(os.path.join(folder, "proposals.pkl"), "wb") as file:
        pickle.dump(content, file)


def _read(name):
    return lambda folder: read_checkpoint(os.path.join(folder, name))


def _load_proposals(folder):
    """Load proposals and transform them as the mapper does."""
    path = os.path.join(folder, "proposals.pkl")
    for record in load_proposals_into_dataset([{"image_id": 1}, {"image_id": 2}], path):
        transform_proposals(record, (20, 30), HFlipTransform(30), proposal_topk=100)
        boxes = record["proposals"].proposal_boxes.tensor
        assert torch.isfinite(boxes).all()


_BYTES = mutations.mutate_bytes
TARGETS = [
    Target("pth", _write_pth, ("model.pth",), _BYTES, _read("model.pth"), 300),
    Target("legacy-pth", _write_legacy_pth, ("model.pth",), _BYTES, _read("model.pth"), 300),
    Target("pkl", _write_pkl, ("model.pkl",), mutations.mutate_pickle, _read("model.pkl"), 300),
    Target(
        "safetensors",
        _write_safetensors,
        ("model.safetensors",),
        _BYTES,
        _read("model.safetensors"),
        count=400,
    ),
    Target("proposals", _write_proposals, ("proposals.pkl",), mutations.mutate_pickle, _load_proposals, 300),
]

test_damaged_files_are_refused_or_read, test_damaged_files_for_five_minutes = fuzz_tests(TARGETS)
