"""Time detlib's operators against torchvision's, or against a plain PyTorch formula.

    python benchmarks/ops.py [--only nms] [--threads 2] [--seconds 4] [--devices cpu cuda]

Prints one table. Both sides get the same inputs and run in turn, so that other programs slow them down
equally; the figures are medians. To add an operator, write a generator of `Case`s and decorate it with
`@benchmark`.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torchvision
from pycocotools import mask as mask_utils
from torch.nn import functional as F

from detlib.ops import (
    _library,
    batched_nms,
    box_iou_rotated,
    encode_rle,
    frozen_batch_norm,
    ms_deform_attn,
    nms,
    nms_rotated,
    paste_masks,
    paste_masks_to_rle,
    roi_align,
    roi_align_rotated,
)
from detlib.ops.ms_deform_attn import reference_ms_deform_attn
from detlib.ops.roi_align_rotated import reference_roi_align_rotated
from detlib.ops.rotated import reference_box_iou_rotated, reference_nms_rotated


@dataclass
class Case:
    """One line of the table: its title, and the functions to compare."""

    title: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    reference: str = "torchvision"


BENCHMARKS: dict[str, Callable[[str], Iterator[Case]]] = {}


def benchmark(function: Callable[[str], Iterator[Case]]) -> Callable[[str], Iterator[Case]]:
    """Register a function that takes a device ("cpu" or "cuda") and yields cases."""
    BENCHMARKS[function.__name__] = function
    return function


def uniform(generator: torch.Generator, *size: int, high: float = 1.0) -> torch.Tensor:
    return torch.rand(*size, generator=generator) * high


def random_boxes(count: int, extent: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    """Return (count, 4) absolute XYXY boxes: first corners uniform in `extent`, sides uniform in 0..200."""
    corner = uniform(generator, count, 2) * torch.tensor(extent)
    return torch.cat([corner, corner + uniform(generator, count, 2, high=200)], 1)


@benchmark
def roi_aligns(device: str) -> Iterator[Case]:
    """Pool 1000 boxes from a stride-4 feature map of an 800x1088 image, with 256 channels."""
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(1000, (1088.0, 800.0), generator)
    boxes[:, 0::2].clamp_(max=1088)
    boxes[:, 1::2].clamp_(max=800)
    boxes = torch.nn.functional.pad(boxes, (1, 0)).to(device)
    feature_map = torch.randn(1, 256, 200, 272, generator=generator).to(device)
    grad = torch.randn(1000, 256, 7, 7, generator=generator).to(device)
    our_backward = torch.ops.detlib.roi_align_backward
    their_backward = torch.ops.torchvision._roi_align_backward
    for layout, name in ((torch.contiguous_format, "NCHW"), (torch.channels_last, "channels-last")):
        x, g = feature_map.to(memory_format=layout), grad.to(memory_format=layout)
        for ratio, samples in ((0, "adaptive"), (2, "2 samples")):
            arguments = x, boxes, (7, 7), 0.25, ratio, True
            yield Case(
                f"roi_align, {name}, {samples}",
                partial(roi_align, *arguments),
                partial(torchvision.ops.roi_align, *arguments),
            )
            arguments = g, boxes, 0.25, 7, 7, *x.shape, ratio, True
            yield Case(
                f"roi_align backward, {name}, {samples}",
                partial(our_backward, *arguments),
                partial(their_backward, *arguments),
            )


@benchmark
def frozen_norms(device: str) -> Iterator[Case]:
    """Compute the end of a bottleneck block for two 800x1088 images: 256 channels at stride 4."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 2, 256, 200, 272, generator=generator).to(device)
    mean, var, weight, bias = (uniform(generator, 4, 256) + 0.5).to(device)

    def theirs(x, residual):
        y = F.batch_norm(x, mean, var, weight, bias)
        y += residual
        return F.relu_(y)

    def ours(x, residual):
        return frozen_batch_norm(x, mean, var, weight, bias, residual=residual, relu=True)

    for layout, name in ((torch.contiguous_format, "NCHW"), (torch.channels_last, "channels-last")):
        x, residual, grad = (feature_map.contiguous(memory_format=layout) for feature_map in maps)
        title = f"frozen norm + sum + ReLU, {name}"
        yield Case(title, partial(ours, x, residual), partial(theirs, x, residual), "PyTorch")
        inputs = [feature_map.clone().requires_grad_() for feature_map in (x, residual)]
        steps = [
            partial(torch.autograd.grad, f(*inputs), inputs, grad, retain_graph=True) for f in (ours, theirs)
        ]
        yield Case(f"frozen norm ... backward, {name}", *steps, "PyTorch")


@benchmark
def suppression(device: str) -> Iterator[Case]:
    """Suppress boxes in a square of 1000 pixels, with 80 categories and threshold 0.5."""
    for count in (10, 100, 1000, 5000, 20000, 100000):
        generator = torch.Generator().manual_seed(count)
        boxes = random_boxes(count, (1000.0, 1000.0), generator).to(device)
        scores = uniform(generator, count).to(device)
        categories = torch.randint(80, (count,), generator=generator).to(device)
        if count <= 20000:
            arguments = boxes, scores, 0.5
            yield Case(
                f"nms, {count} boxes", partial(nms, *arguments), partial(torchvision.ops.nms, *arguments)
            )
        arguments = boxes, scores, categories, 0.5
        yield Case(
            f"batched_nms, {count} boxes",
            partial(batched_nms, *arguments),
            partial(torchvision.ops.batched_nms, *arguments),
        )


@benchmark
def rotated(device: str) -> Iterator[Case]:
    """Run the operators of rotated boxes.

    Centers are in a square of 1000 pixels, sides are uniform in 0..200, with any angle. The feature map is as
    for axis-aligned boxes.
    """
    generator = torch.Generator().manual_seed(0)
    parts = [uniform(generator, 1000, 2, high=1000), uniform(generator, 1000, 2, high=200)]
    boxes = torch.cat([*parts, uniform(generator, 1000, 1, high=360) - 180], 1).to(device)
    scores = uniform(generator, 1000).to(device)
    yield Case(
        "box_iou_rotated, 1000 x 1000 boxes",
        partial(box_iou_rotated, boxes, boxes),
        partial(reference_box_iou_rotated, boxes, boxes),
        "formula",
    )
    yield Case(
        "nms_rotated, 1000 boxes",
        partial(nms_rotated, boxes, scores, 0.5),
        partial(reference_nms_rotated, boxes, scores, None, 0.5),
        "formula",
    )
    feature_map = torch.randn(1, 256, 200, 272, generator=generator).to(device)
    rois = torch.nn.functional.pad(boxes, (1, 0))
    yield Case(
        "roi_align_rotated, NCHW, 2 samples",
        partial(roi_align_rotated, feature_map, rois, (7, 7), 0.25, 2),
        partial(reference_roi_align_rotated, feature_map, rois, 0.25, 7, 7, 2),
        "formula",
    )


@benchmark
def deformable_attention(device: str) -> Iterator[Case]:
    """Run Deformable DETR's encoder on an 800x1088 image: 8 heads of 32 channels, 4 levels, 4 points."""
    generator = torch.Generator().manual_seed(0)
    shapes = torch.tensor([[100, 136], [50, 68], [25, 34], [13, 17]])
    cells = shapes.prod(1)
    value = torch.randn(1, int(cells.sum()), 8, 32, generator=generator)
    locations = uniform(generator, 1, value.shape[1], 8, 4, 4, 2)
    weights = uniform(generator, 1, value.shape[1], 8, 16).softmax(-1).view(1, -1, 8, 4, 4)
    inputs = [value, shapes, cells.cumsum(0) - cells, locations, weights]
    inputs = [x.to(device).requires_grad_(x.is_floating_point()) for x in inputs]

    def step(operator):
        output = operator(*inputs)
        return torch.autograd.grad(output.sum(), [inputs[0], *inputs[3:]])

    yield Case(
        "ms_deform_attn, forward + backward",
        partial(step, ms_deform_attn),
        partial(step, reference_ms_deform_attn),
        "grid_sample",
    )


def grid_sample_paste(masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return masks pasted into images, (R, H, W) bool, one at a time and only around their boxes."""
    images = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for mask, box, image in zip(masks, boxes.tolist(), images):
        x0, y0, x1, y1 = box
        top, bottom = max(int(y0) - 1, 0), min(int(y1) + 2, height)
        left, right = max(int(x0) - 1, 0), min(int(x1) + 2, width)
        y = (torch.arange(top, bottom, device=mask.device) + 0.5 - y0) / (y1 - y0) * 2 - 1
        x = (torch.arange(left, right, device=mask.device) + 0.5 - x0) / (x1 - x0) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        values = torch.nn.functional.grid_sample(mask[None, None], grid[None], align_corners=False)
        image[top:bottom, left:right] = values[0, 0] >= 0.5
    return images


def pycocotools_encode(images: torch.Tensor) -> list[dict]:
    arrays = images.cpu().numpy().view(np.uint8)
    return [mask_utils.encode(np.asfortranarray(image)) for image in arrays]


@benchmark
def masks(device: str) -> Iterator[Case]:
    """Paste and encode 100 masks of 28x28 cells, noisy blobs, in an 800x1333 image.

    The sides of boxes are log-uniform from 16 to 800.
    """
    height, width = 800, 1333
    generator = torch.Generator().manual_seed(0)
    center = uniform(generator, 100, 2) * torch.tensor([float(width), float(height)])
    half = 8 * 50 ** uniform(generator, 100, 2)
    boxes = torch.cat([center - half, center + half], 1)
    boxes[:, 0::2].clamp_(0, width)
    boxes[:, 1::2].clamp_(0, height)
    cells = torch.linspace(-1, 1, 28)
    blobs = torch.sigmoid(
        6 * (0.6 + uniform(generator, 100, 1, 1, high=0.4) - torch.hypot(cells[:, None], cells))
    )
    blobs = (blobs + uniform(generator, 100, 28, 28, high=0.2) - 0.1).clamp(0, 1)
    blobs, boxes = blobs.to(device), boxes.to(device)
    images = paste_masks(blobs, boxes, (height, width))
    arguments = blobs, boxes, (height, width)
    formula = partial(grid_sample_paste, blobs, boxes, height, width)
    yield Case(
        "paste + RLE, 100 masks",
        partial(paste_masks_to_rle, *arguments),
        lambda: pycocotools_encode(formula()),
        "grid_sample, pycocotools",
    )
    yield Case("paste, 100 masks", partial(paste_masks, *arguments), formula, "grid_sample")
    yield Case(
        "RLE, 100 masks", partial(encode_rle, images), partial(pycocotools_encode, images), "pycocotools"
    )


def median_times(case: Case, device: str, seconds: float) -> tuple[float, float]:
    """Return the median milliseconds of both functions.

    Each is called at least three times, and up to 200 times while `seconds` have not passed.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    case.ours(), case.theirs(), wait()
    times = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < 200):
        for function, series in zip((case.ours, case.theirs), times):
            begin = time.perf_counter()
            function()
            wait()
            series.append((time.perf_counter() - begin) * 1e3)
    return median(times[0]), median(times[1])


def processor() -> str:
    """Return the processor's model name, as reported by the operating system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(devices: list[str], threads: int) -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    parts = [f"{processor()} ({capability}), {os.cpu_count()} cores, {threads} threads"]
    if "cuda" in devices:
        parts.append(torch.cuda.get_device_name())
    return "; ".join([*parts, f"torch {torch.__version__}, torchvision {torchvision.__version__}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    found = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--only", default="", help="run only cases with this text in their title")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="number of PyTorch threads on the CPU"
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="time for each case; at least three calls are made"
    )
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), default=found)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine(args.devices, args.threads))
    for device in args.devices:
        names = [name for name in _library.OPERATORS if not _library.has_native_kernel(name, device)]
        print(f"Without a compiled kernel on {device}: {', '.join(sorted(names)) or 'none'}.")
    print(f"\n| {'operator':46} | device | detlib, ms | reference, ms | ratio | reference |")
    print(f"|{'-' * 48}|---|---:|---:|---:|---|")
    for device in args.devices:
        for cases in BENCHMARKS.values():
            for case in cases(device):
                if args.only not in case.title:
                    continue
                ours, theirs = median_times(case, device, args.seconds)
                times = f"{ours:9.3f} | {theirs:9.3f} | {theirs / ours:6.1f}"
                print(f"| {case.title:46} | {device:4} | {times} | {case.reference} |", flush=True)


if __name__ == "__main__":
    main()
