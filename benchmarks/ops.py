"""Time detlib's operators against torchvision's on the CPU, calls of both in turn.

    python benchmarks/ops.py [--threads 2] [--repeats 5] [--images 4] [--height 800] [--width 1088]

RoIAlign runs as in training Faster and Mask R-CNN with FPN: 512 boxes an image spread over four levels of 256
channels by their size, 7x7 bins for the box head and 14x14 for the mask head (128 boxes an image), adaptive
grid. NMS runs as in the RPN (1000 boxes a level, five levels) and on one large set. Masks are blobs of 28x28
cells, pasted and encoded for COCO, against grid_sample around each box and pycocotools.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch
import torchvision
from pycocotools import mask as mask_utils

from detlib.ops import (
    _library,
    batched_nms,
    encode_rle,
    nms,
    paste_masks,
    paste_masks_to_rle,
    roi_align,
)

CHANNELS = 256
STRIDES = (4, 8, 16, 32)


def random_boxes(count: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Boxes (count, 4), absolute xyxy pixels, with log-uniform sides from 16 pixels up, clipped to the
    picture."""
    limit = torch.tensor([width, height], dtype=torch.float32)
    center = torch.rand(count, 2, generator=generator) * limit
    side = 16 * (min(height, width) / 16) ** torch.rand(count, 1, generator=generator)
    aspect = 2 ** (torch.rand(count, 1, generator=generator) - 0.5)
    half = torch.cat([side * aspect, side / aspect], 1) / 2
    low = (center - half).clamp(min=0)
    return torch.cat([low, torch.minimum(center + half, limit)], 1)


def fpn_inputs(args: argparse.Namespace, boxes_per_image: int) -> list[tuple]:
    """(features, boxes, scale) of each level, boxes given to levels by FPN's rule."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.cat(
        [
            torch.nn.functional.pad(
                random_boxes(boxes_per_image, args.height, args.width, generator), (1, 0), value=i
            )
            for i in range(args.images)
        ]
    )
    area = (boxes[:, 3:] - boxes[:, 1:3]).prod(1)
    level = (4 + (area.sqrt() / 224).log2()).floor().clamp(2, 5)
    return [
        (
            torch.randn(args.images, CHANNELS, args.height // s, args.width // s, generator=generator),
            boxes[level == i + 2],
            1 / s,
        )
        for i, s in enumerate(STRIDES)
    ]


def compare(
    title: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int,
    other_name: str = "torchvision",
) -> None:
    """Print the median times of both and their ratio; they run in turn, so that both meet the same noise."""
    ours(), theirs()
    times = ([], [])
    for _ in range(repeats):
        for function, series in zip((ours, theirs), times):
            begin = time.perf_counter()
            function()
            series.append(time.perf_counter() - begin)
    mine, other = median(times[0]) * 1e3, median(times[1]) * 1e3
    print(f"{title:44s} detlib {mine:8.2f} ms   {other_name} {other:8.2f} ms   ratio {other / mine:6.1f}")


def bench_roi_align(args: argparse.Namespace, boxes_per_image: int, bins: int) -> None:
    levels = fpn_inputs(args, boxes_per_image)
    grads = [torch.randn(len(boxes), CHANNELS, bins, bins) for _, boxes, _ in levels]

    def forward(operator):
        return lambda: [operator(x, boxes, (bins, bins), scale, 0, True) for x, boxes, scale in levels]

    def backward(operator):
        return lambda: [
            operator(grad, boxes, scale, bins, bins, *x.shape, 0, True)
            for grad, (x, boxes, scale) in zip(grads, levels)
        ]

    counts = "+".join(str(len(boxes)) for _, boxes, _ in levels)
    for name, pair in {
        "forward": (forward(roi_align), forward(torchvision.ops.roi_align)),
        "backward": (
            backward(torch.ops.detlib.roi_align_backward),
            backward(torch.ops.torchvision._roi_align_backward),
        ),
    }.items():
        compare(f"roi_align {name} {bins}x{bins}, {counts} boxes", *pair, args.repeats)


def bench_nms(args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1000, 5000):
        boxes = random_boxes(count, args.height, args.width, generator)
        plain = (boxes, torch.rand(count, generator=generator), 0.7)
        by_category = (*plain[:2], torch.arange(count) % 5, 0.7)
        for name, operator, reference, inputs in (
            ("nms", nms, torchvision.ops.nms, plain),
            ("batched_nms, 5 categories", batched_nms, torchvision.ops.batched_nms, by_category),
        ):
            pair = partial(operator, *inputs), partial(reference, *inputs)
            compare(f"{name}, {count} boxes", *pair, 4 * args.repeats)


def grid_sample_paste(masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Masks in pictures (R, H, W) bool, one at a time and only around their boxes."""
    pictures = torch.zeros(len(masks), height, width, dtype=torch.bool)
    for mask, box, picture in zip(masks, boxes, pictures):
        x0, y0, x1, y1 = box.tolist()
        top, bottom = max(int(y0) - 1, 0), min(int(y1) + 2, height)
        left, right = max(int(x0) - 1, 0), min(int(x1) + 2, width)
        y = (torch.arange(top, bottom) + 0.5 - y0) / (y1 - y0) * 2 - 1
        x = (torch.arange(left, right) + 0.5 - x0) / (x1 - x0) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        values = torch.nn.functional.grid_sample(mask[None, None], grid[None], align_corners=False)
        picture[top:bottom, left:right] = values[0, 0] >= 0.5
    return pictures


def pycocotools_encode(pictures: torch.Tensor) -> list[dict]:
    return [mask_utils.encode(np.asfortranarray(picture.numpy().view(np.uint8))) for picture in pictures]


def bench_masks(args: argparse.Namespace) -> None:
    height, width = 800, 1333
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(100, height, width, generator)
    cells = torch.linspace(-1, 1, 28)
    radius = 0.6 + 0.4 * torch.rand(100, 1, 1, generator=generator)
    masks = torch.sigmoid(6 * (radius - torch.hypot(cells[:, None], cells)))
    masks = (masks + 0.2 * torch.rand(masks.shape, generator=generator) - 0.1).clamp(0, 1)
    pictures = paste_masks(masks, boxes, (height, width))

    def formula():
        return pycocotools_encode(grid_sample_paste(masks, boxes, height, width))

    for title, ours, theirs in (
        ("paste + RLE", lambda: paste_masks_to_rle(masks, boxes, (height, width)), formula),
        (
            "paste",
            lambda: paste_masks(masks, boxes, (height, width)),
            lambda: grid_sample_paste(masks, boxes, height, width),
        ),
        ("RLE", lambda: encode_rle(pictures), lambda: pycocotools_encode(pictures)),
    ):
        compare(f"{title}, 100 masks on {height}x{width}", ours, theirs, args.repeats, "reference  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("threads", 2), ("repeats", 5), ("images", 4), ("height", 800), ("width", 1088)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    served = {name: _library.implementation(name, "cpu") for name in _library.SCHEMAS}
    print(f"torch {torch.__version__}, {args.threads} threads, operators: {served}")
    bench_roi_align(args, 512, 7)
    bench_roi_align(args, 128, 14)
    bench_nms(args)
    bench_masks(args)


if __name__ == "__main__":
    main()
