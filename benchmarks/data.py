"""Time the default training mapper against a plain implementation, and measure the memory of dataset records.

    python benchmarks/data.py [--images 50] [--rounds 3] [--decoders pil opencv]
    python benchmarks/data.py --memory 120000 [--workers 8] [--start-method fork]

The first form writes JPEGs of 640 x 480 pixels with 8 polygons each. It maps each of them in turn with
`DatasetMapper` and with a plain implementation in Pillow and numpy of what detectron2's mapper is documented
to do. Both use one thread, and arrays and labels must be bit-equal. Times are CPU times of the process, which
depend less on other programs; figures are medians over images and rounds.

The second form loads records in worker processes and prints the memory of all of them as PSS, which counts a
shared page once.
"""

import argparse
import copy
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import PIL
import torch
from PIL import Image

from detlib.config import get_cfg
from detlib.data import DatasetMapper
from detlib.data.shared_memory import measure
from detlib.structures import Boxes, BoxMode, Instances, PolygonMasks


def make_records(directory: Path, count: int) -> list[dict]:
    """Write images with large shapes, edges and noise, which compress like photographs (about 110 kB).

    Args:
        directory: an existing folder for the JPEG files.
        count: number of images.

    Returns:
        A record for each image, with 8 polygons.
    """
    rng = np.random.default_rng(0)
    records = []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
        path = directory / f"{i}.jpg"
        Image.fromarray(pixels).save(path, quality=90)
        annotations = []
        for _ in range(8):
            center, radius = rng.uniform([60, 60], [580, 420]), rng.uniform(15, 60)
            angles = np.linspace(0, 2 * np.pi, 25)[:-1]
            polygon = center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            low, high = polygon.min(axis=0), polygon.max(axis=0)
            annotations.append(
                {
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": int(rng.integers(80)),
                    "iscrowd": 0,
                    "segmentation": [polygon.reshape(-1).round(2).tolist()],
                }
            )
        records.append(
            {"file_name": str(path), "image_id": i, "height": 480, "width": 640, "annotations": annotations}
        )
    return records


class PlainMapper:
    """A plain mapper with Pillow and numpy that has the same results; records the time of each part."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    def _timed(self, name: str, function: Callable):
        begin = time.process_time()
        result = function()
        self.seconds[name] += time.process_time() - begin
        return result

    def __call__(self, record: dict) -> dict:
        record = copy.deepcopy(record)
        image = self._timed("decode", lambda: self._read(record["file_name"]))
        np.random.choice((800,))
        height, width = image.shape[:2]
        scale = min(800 / min(height, width), 1333 / max(height, width))
        new_h, new_w = int(height * scale + 0.5), int(width * scale + 0.5)
        image = self._timed("resize", lambda: self._resize(image, new_h, new_w))
        flip = np.random.uniform(0, 1.0, []) < 0.5
        if flip:
            image = np.flip(image, axis=1)
        record["image"] = self._timed(
            "to tensor", lambda: torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        )
        scales = np.array([new_w / width, new_h / height])
        record["instances"] = self._timed(
            "annotations", lambda: self._label(record, scales, flip, new_h, new_w)
        )
        return record

    @staticmethod
    def _read(file_name: str) -> np.ndarray:
        with open(file_name, "rb") as handle:
            image = Image.open(handle)
            image.getexif()
            return np.asarray(image.convert("RGB"))[:, :, ::-1]

    @staticmethod
    def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))

    @staticmethod
    def _label(record: dict, scales: np.ndarray, flip: bool, height: int, width: int) -> Instances:
        def move(points: np.ndarray) -> np.ndarray:
            points = points * scales
            if flip:
                points[:, 0] = width - points[:, 0]
            return points

        boxes, polygons, classes = [], [], []
        for annotation in record.pop("annotations"):
            x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            corners = move(np.array([(x0, y0), (x1, y0), (x0, y1), (x1, y1)], dtype=np.float64))
            box = np.concatenate([corners.min(axis=0), corners.max(axis=0)]).clip(min=0)
            boxes.append(np.minimum(box, [width, height, width, height]))
            parts = [np.asarray(part).reshape(-1, 2) for part in annotation["segmentation"]]
            polygons.append([move(part).reshape(-1) for part in parts])
            classes.append(annotation["category_id"])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(np.stack(boxes))
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        instances.gt_masks = PolygonMasks(polygons)
        return instances[instances.gt_boxes.nonempty() & instances.gt_masks.nonempty()]


def check_equal(plain: dict, ours: dict) -> None:
    """Raise an AssertionError unless both results are bit-equal."""
    if not torch.equal(plain["image"], ours["image"]):
        raise AssertionError(f"the images of {plain['file_name']} differ")
    first, second = plain["instances"], ours["instances"]
    same = torch.equal(first.gt_boxes.tensor, second.gt_boxes.tensor)
    same &= torch.equal(first.gt_classes, second.gt_classes)
    for one, other in zip(first.gt_masks.polygons, second.gt_masks.polygons):
        same &= all(np.array_equal(a, b) for a, b in zip(one, other))
    if not same:
        raise AssertionError(f"the labels of {plain['file_name']} differ")


def our_mapper(decoder: str) -> DatasetMapper:
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.DECODER = decoder
    return DatasetMapper(cfg, True)


PARTS = ("decode", "resize", "to tensor", "annotations")


def our_parts(mapper: DatasetMapper, records: list[dict]) -> dict[str, float]:
    """Return the median seconds per image of each part of `DatasetMapper`."""
    from detlib.data import detection_utils as utils
    from detlib.data import transforms as T  # noqa: N812

    steps = [T.ResizeTransform(480, 640, 800, 1067), T.HFlipTransform(1067)]
    seconds: dict[str, list[float]] = defaultdict(list)
    for record in records:
        times = [time.process_time()]
        image = utils.read_image(record["file_name"], "BGR", mapper.decoder)
        times.append(time.process_time())
        resized = steps[0].apply_image(image)
        times.append(time.process_time())
        utils.image_to_tensor(np.flip(resized, axis=1))
        times.append(time.process_time())
        annotations = mapper._move_annotations(record, T.TransformList(steps), (800, 1067))
        mapper._to_instances(annotations, (800, 1067), record["file_name"])
        times.append(time.process_time())
        for name, begin, end in zip(PARTS, times, times[1:]):
            seconds[name].append(end - begin)
    return {name: median(values) for name, values in seconds.items()}


def time_mappers(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        records = make_records(Path(directory), args.images)
        plain = PlainMapper()
        mappers = {"plain": plain} | {f"detlib, {name}": our_mapper(name) for name in args.decoders}
        seconds: dict[str, list[float]] = {name: [] for name in mappers}
        for turn in range(args.rounds + 1):
            if turn == 1:  # the first round warms up
                seconds = {name: [] for name in mappers}
                plain.seconds.clear()
            for i, record in enumerate(records):
                results = {}
                for name, mapper in mappers.items():
                    np.random.seed(1000 * turn + i)
                    begin = time.process_time()
                    results[name] = mapper(record)
                    seconds[name].append(time.process_time() - begin)
                for name in mappers:
                    check_equal(results["plain"], results[name])
        parts = {"plain": {k: v / len(seconds["plain"]) for k, v in plain.seconds.items()}}
        parts |= {name: our_parts(mappers[name], records) for name in mappers if name != "plain"}
    print_table(seconds, parts)


def print_table(seconds: dict[str, list[float]], parts: dict[str, dict[str, float]]) -> None:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load}, one thread;")
    print(f"torch {torch.__version__}, Pillow {PIL.__version__}; arrays and labels are bit-equal\n")
    base = median(seconds["plain"])
    print(f"| mapper | images / s | ratio | {', '.join(PARTS).replace(', ', ', ms | ')}, ms | other, ms |")
    print("|---|---:|---:|" + "---:|" * (len(PARTS) + 1))
    for name, values in seconds.items():
        total = median(values)
        known = [parts[name][part] for part in PARTS]
        columns = [f"{1000 * part:.2f}" for part in [*known, max(total - sum(known), 0.0)]]
        print(f"| {name} | {1 / total:.1f} | {base / total:.2f} | {' | '.join(columns)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=50, help="number of images")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all images")
    parser.add_argument("--decoders", nargs="+", default=["pil", "opencv"], choices=["pil", "opencv"])
    parser.add_argument(
        "--memory", type=int, metavar="RECORDS", help="measure the memory of this many records"
    )
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--start-method", default="fork", choices=["fork", "spawn", "forkserver"])
    args = parser.parse_args()
    if args.memory is None:
        time_mappers(args)
        return
    result = measure(args.memory, args.workers, args.start_method)
    print(
        f"{args.memory} records, {args.workers} workers ({args.start_method}): serialized "
        f"{result.serialized / 2**20:.1f} MiB; all processes together use {result.records / 2**20:.1f} MiB "
        f"for them, {result.ratio:.2f} times as much"
    )


if __name__ == "__main__":
    main()
