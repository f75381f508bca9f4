"""Weights, images and objects that are generated from names and seeds.

The numbers of the cases were computed with exactly these values, so implementations with the same parameter
names can be compared without a weight file. Random numbers come from generators seeded with the CRC of a
text.
"""

import math
import zlib
from collections.abc import Mapping

import numpy as np

CLASSIFIER_BIAS = {"head.cls_score.bias": -2.0}


def _generator(text: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(text.encode())))


def _spread(name: str, shape: tuple[int, ...]) -> float:
    """Return the standard deviation of a weight: He's, or less where activations would grow."""
    spread = math.sqrt(2.0 / math.prod(shape[1:]))
    if ".stem.conv1." in name or "patch_embed" in name:
        return spread * 0.015
    if "fpn_" in name or "offset" in name:
        return spread * 0.4
    return spread


def weight(
    name: str, shape: tuple[int, ...], scale: Mapping[str, float], alias: Mapping[str, str]
) -> np.ndarray:
    """Return the value of a parameter or buffer.

    Args:
        name: full name in the state dict.
        shape: shape of the value.
        scale: factors by name.
        alias: maps names to the name that they share a tensor with.

    Returns:
        A float32 array; for batch counters, int64 zeros.
    """
    name = alias.get(name, name)
    kind = name.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    generator = _generator(name)
    noise = generator.standard_normal(shape, dtype=np.float32)
    factor = np.float32(scale.get(name, 1.0))
    if kind == "running_var":
        return 0.5 + generator.random(shape, dtype=np.float32)
    if kind == "running_mean":
        return 0.1 * noise
    if kind == "bias":
        shift = -4.0 if "class_embed." in name else CLASSIFIER_BIAS.get(name, 0.0)
        value = factor * np.float32(0.05) * noise + np.float32(shift)
    elif len(shape) == 1:
        gain = 0.25 if ".conv3.norm." in name else 1.0
        value = factor * gain * (1 + 0.1 * noise)
    else:
        value = factor * np.float32(_spread(name, shape)) * noise
    return value.astype(np.float32)


def synthetic_image(height: int, width: int, seed: int) -> np.ndarray:
    """Draw a wave, constant rectangles on top of it, and noise.

    Returns:
        float32 array (3, height, width) of integers in [0, 255].
    """
    generator = _generator(f"image-{seed}")
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = []
    for _ in range(3):
        per_row, per_column = generator.uniform(0.01, 0.06), generator.uniform(0.01, 0.06)
        phase = generator.uniform(0, 6.28)
        channels.append(110 + 60 * np.sin(per_row * rows + per_column * columns + phase))
    image = np.stack(channels)
    for _ in range(8):
        h = generator.integers(height // 10, height // 2)
        w = generator.integers(width // 10, width // 2)
        y, x = generator.integers(0, height - h), generator.integers(0, width - w)
        image[:, y : y + h, x : x + w] = generator.uniform(0, 255, (3, 1, 1))
    image += generator.normal(0, 6, image.shape)
    return image.round().clip(0, 255).astype(np.float32)


def semantic_map(height: int, width: int, seed: int, num_classes: int) -> np.ndarray:
    """Return an int64 label map (height, width): 8 x 8 blocks, and 255 (no label) in the top left corner."""
    blocks = _generator(f"sem-{seed}").integers(0, num_classes, (8, 8))
    rows, columns = -(-height // 8), -(-width // 8)
    labels = blocks.repeat(rows, axis=0).repeat(columns, axis=1)[:height, :width]
    labels[: height // 10, : width // 10] = 255
    return labels


def objects(height: int, width: int, seed: int, num_classes: int, count: int = 4) -> list[dict]:
    """Return `count` random objects of an image, with ellipses of eight corners as masks.

    Each is a dict of "box" (xyxy), "class", "polygon" (x, y, x, y, ...) and "keypoints" (17, 3), in pixels.
    """
    generator = _generator(f"truth-{seed}")
    corners = np.arange(8) * np.pi / 4
    found = []
    for _ in range(count):
        w = generator.uniform(0.2, 0.6) * width
        h = generator.uniform(0.2, 0.6) * height
        x = generator.uniform(w / 2, width - w / 2)
        y = generator.uniform(h / 2, height - h / 2)
        outline = np.stack([x + w / 2 * np.cos(corners), y + h / 2 * np.sin(corners)], axis=1)
        joints_x = x + generator.uniform(-0.45, 0.45, 17) * w
        joints_y = y + generator.uniform(-0.45, 0.45, 17) * h
        visible = generator.integers(0, 3, 17)
        found.append(
            {
                "box": [*outline.min(axis=0).tolist(), *outline.max(axis=0).tolist()],
                "class": int(generator.integers(0, num_classes)),
                "polygon": outline.round(2).ravel().tolist(),
                "keypoints": np.stack([joints_x, joints_y, visible], axis=1).round(2).tolist(),
            }
        )
    return found
