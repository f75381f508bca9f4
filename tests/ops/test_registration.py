"""Registration of operators: schemas, tracing, autocast, and fallbacks for compiled kernels."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_map

from detlib.ops import _library, batched_nms, nms, roi_align


def samples():
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(20, 2, generator=generator) * 20
    boxes = torch.cat([low, low + torch.rand(20, 2, generator=generator) * 20], 1)
    scores = torch.rand(20, generator=generator)
    rois = torch.nn.functional.pad(boxes, (1, 0))
    rotated = torch.cat([boxes, 400 * torch.rand(20, 1, generator=generator) - 200], 1)
    rotated_rois = torch.nn.functional.pad(rotated, (1, 0))
    maps = torch.rand(1, 3, 11, 13, generator=generator, requires_grad=True)
    grad = torch.rand(20, 3, 3, 2, generator=generator, requires_grad=True)
    masks = torch.rand(20, 5, 4, generator=generator, requires_grad=True)
    attention = (
        torch.rand(2, 7, 3, 4, generator=generator, requires_grad=True),
        torch.tensor([[2, 3], [1, 1]]),
        torch.tensor([0, 6]),
        torch.rand(2, 5, 3, 2, 2, 2, generator=generator, requires_grad=True),
        torch.rand(2, 5, 3, 2, 2, generator=generator, requires_grad=True),
    )
    attended_grad = torch.rand(2, 5, 12, generator=generator, requires_grad=True)
    normed = torch.randn(2, 5, 4, 3, generator=generator, requires_grad=True)
    constants = torch.rand(4, 5, generator=generator).unbind()
    return {
        "frozen_batch_norm": (normed, normed.detach() + 1, *constants, 0.1, True),
        "frozen_batch_norm_backward": (normed.detach() - 1, normed.detach(), *constants[:2], 0.1, True),
        "encode_rle": (torch.rand(3, 11, 40, generator=generator) > 0.7,),
        "ms_deform_attn": attention,
        "ms_deform_attn_backward": (attended_grad, *attention),
        "nms": (boxes, scores, 0.4),
        "batched_nms": (boxes, scores, torch.arange(20) % 3, 0.4),
        "paste_masks": (masks, boxes, 30, 25, 0.6),
        "paste_masks_to_rle": (masks, boxes, 30, 25, 0.6),
        "resize_image": (
            torch.randint(0, 256, (7, 9, 3), dtype=torch.uint8, generator=generator),
            5,
            13,
            2,
            True,
        ),
        "roi_align": (maps, rois, 0.3, 3, 2, 0, True),
        "roi_align_backward": (grad, rois, 0.3, 3, 2, 1, 3, 11, 13, 0, True),
        "box_iou_rotated": (rotated, rotated[:7]),
        "nms_rotated": (rotated, scores, 0.4),
        "batched_nms_rotated": (rotated, scores, torch.arange(20) % 3, 0.4),
        "roi_align_rotated": (maps, rotated_rois, 0.3, 3, 2, 0),
        "roi_align_rotated_backward": (grad, rotated_rois, 0.3, 3, 2, 1, 3, 11, 13, 0),
    }


@pytest.mark.parametrize("name", _library.OPERATORS)
def test_operator_passes_opcheck(name):
    operator = getattr(torch.ops.detlib, name).default
    assert set(torch.library.opcheck(operator, samples()[name]).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["roi_align", "roi_align_backward"])
def test_operator_passes_opcheck_in_channels_last(name):
    values, *rest = samples()[name]
    values = values.detach().to(memory_format=torch.channels_last).requires_grad_()
    results = torch.library.opcheck(getattr(torch.ops.detlib, name).default, (values, *rest))
    assert set(results.values()) == {"SUCCESS"}


def test_exported_graph_contains_the_operators():
    maps, rois, scale, height, width, ratio, aligned = samples()["roi_align"]
    boxes, scores, idxs, threshold = samples()["batched_nms"]

    class Pool(torch.nn.Module):
        def forward(self, maps, boxes, scores, idxs):
            kept = batched_nms(boxes, scores, idxs, threshold)
            rois = torch.nn.functional.pad(boxes[kept], (1, 0))
            return roi_align(maps, rois, (height, width), scale, ratio, aligned)

    inputs = (maps.detach(), boxes, scores, idxs)
    exported = torch.export.export(Pool(), inputs)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {"detlib.roi_align.default", "detlib.batched_nms.default"} <= targets
    torch.testing.assert_close(exported.module()(*inputs), Pool()(*inputs))


def test_autocast_keeps_dtype_and_precision():
    maps, rois, *_ = samples()["roi_align"]
    boxes, scores, threshold = samples()["nms"]
    plain = roi_align(maps, rois, 3, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(roi_align(maps, rois, 3, 0.3), plain)
        reduced = roi_align(maps.bfloat16(), rois, 3, 0.3)
        assert torch.equal(nms(boxes, scores, threshold), nms(boxes.double(), scores, threshold))
    assert reduced.dtype == torch.bfloat16
    assert torch.equal(reduced, roi_align(maps.bfloat16().float(), rois, 3, 0.3).bfloat16())


WITHOUT_NATIVE = """
import sys
if {hide_torchvision}:
    sys.modules["torchvision"] = None  # importing it raises ImportError, as in a broken installation
import torch
from detlib.ops import _library
{before}
from tests.ops.test_registration import samples
from detlib.ops import nms
expected = torch.load(sys.argv[1])
assert _library.implementation("nms", "cpu") == "{implementation}", _library.implementation("nms", "cpu")
assert "DETLIB_DISABLE_NATIVE=1" in _library.native_load_error
for name, arguments in samples().items():
    torch.testing.assert_close(getattr(torch.ops.detlib, name)(*arguments), expected[name])
for dtype in (torch.float64, torch.float16, torch.bfloat16):
    maps, *rest = samples()["roi_align"]
    got = torch.ops.detlib.roi_align(maps.to(dtype), *rest)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected["roi_align"], atol=2e-2, rtol=2e-2)
with torch.autocast("cpu", torch.bfloat16):  # matrix products keep float32
    for name in ("roi_align", "ms_deform_attn"):
        torch.testing.assert_close(getattr(torch.ops.detlib, name)(*samples()[name]), expected[name])
maps, *rest = samples()["roi_align"]
assert torch.autograd.gradcheck(lambda x: torch.ops.detlib.roi_align(x, *rest), maps[..., :4, :5].double())
checked = "nms", "roi_align", "encode_rle", "frozen_batch_norm", "ms_deform_attn"
for name in (*checked, "paste_masks", "paste_masks_to_rle"):
    torch.library.opcheck(getattr(torch.ops.detlib, name).default, samples()[name])
boxes, scores, _ = samples()["nms"]
assert nms(boxes[:0], scores[:0], 0.5).shape == (0,)
"""


@pytest.mark.parametrize(
    "hide_torchvision,implementation", [(False, "torchvision"), (True, "PyTorch reference")]
)
def test_fallbacks_match_native_kernels(hide_torchvision, implementation, tmp_path):
    if not hide_torchvision:
        pytest.importorskip("torchvision")
    values = {name: getattr(torch.ops.detlib, name)(*arguments) for name, arguments in samples().items()}
    torch.save(tree_map(torch.detach, values), tmp_path / "expected.pt")
    before = "assert 'torchvision' not in sys.modules" if not hide_torchvision else ""
    code = WITHOUT_NATIVE.format(
        hide_torchvision=hide_torchvision, implementation=implementation, before=before
    )
    environment = os.environ | {"DETLIB_DISABLE_NATIVE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "expected.pt"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_every_operator_has_a_cpu_kernel_if_built():
    if _library.native_load_error:
        pytest.skip(f"compiled operators: {_library.native_load_error}")
    assert all(_library.implementation(name, "cpu") == "native" for name in _library.OPERATORS)


def test_broken_extension_warns_and_is_ignored(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: aoti_torch_example")

    monkeypatch.delenv(_library.DISABLE_NATIVE, raising=False)
    monkeypatch.setattr(_library.importlib, "import_module", broken)
    with pytest.warns(RuntimeWarning, match="undefined symbol: aoti_torch_example"):
        assert _library._load_native() == "cannot be loaded: undefined symbol: aoti_torch_example"
