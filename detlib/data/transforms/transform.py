"""Deterministic transforms of images and their annotations.

Coordinates are continuous: an image of shape (H, W) spans [0, W] x [0, H], and pixel (row i, column j) has
its center at (j + 0.5, i + 0.5). A rotated box is (x, y, width, height, angle) as in
`detlib.structures.RotatedBoxes`: its width lies along (cos, -sin) of the angle and its height along
(sin, cos), with y pointing down. Importing this module gives every fvcore transform ``apply_rotated_box``.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.transforms import transform as fvt
from fvcore.transforms.transform import (
    HFlipTransform,
    NoOpTransform,
    Transform,
    TransformList,
    VFlipTransform,
)
from PIL import Image

from detlib.ops import resize_image
from detlib.ops._library import has_native_kernel
from detlib.structures.masks import clip_polygon

__all__ = [
    "ColorTransform",
    "CropTransform",
    "ExtentTransform",
    "HFlipTransform",
    "NoOpTransform",
    "PILColorTransform",
    "PadTransform",
    "ResizeTransform",
    "RotationTransform",
    "Transform",
    "TransformList",
    "VFlipTransform",
]


def transform_rotated_boxes(transform: Transform, rotated_boxes: np.ndarray) -> np.ndarray:
    """Apply an affine transform to rotated boxes.

    A resize by different factors turns a rectangle into a parallelogram. The result is the rectangle with the
    same center and side lengths and with the direction of its height, as in detectron2. The up direction of a
    box is
    kept: a vertical flip results in 180 degrees minus the angle.

    Args:
        transform: transform whose ``apply_coords`` is affine.
        rotated_boxes: (N, 5) of any float type, pixels and degrees counter-clockwise.

    Returns:
        (N, 5) float64, angles in [-180, 180].
    """
    boxes = np.asarray(rotated_boxes, dtype=np.float64).reshape(-1, 5)
    radians = np.deg2rad(boxes[:, 4])
    cos, sin = np.cos(radians), np.sin(radians)
    center = boxes[:, :2]
    along_width, along_height = np.stack([cos, -sin], axis=1), np.stack([sin, cos], axis=1)
    points = np.concatenate([center, center + along_width, center + along_height])
    moved = np.asarray(transform.apply_coords(points)).reshape(3, -1, 2)
    center, along_width, along_height = moved[0], moved[1] - moved[0], moved[2] - moved[0]
    width = boxes[:, 2] * np.hypot(*along_width.T)
    height = boxes[:, 3] * np.hypot(*along_height.T)
    angle = np.rad2deg(np.arctan2(*along_height.T))
    return np.concatenate([center, np.stack([width, height, angle], axis=1)], axis=1)


def _flip_rotated_boxes(transform: HFlipTransform, rotated_boxes: np.ndarray) -> np.ndarray:
    """Flip rotated boxes horizontally, without rounding: the angle changes its sign."""
    boxes = np.array(rotated_boxes, dtype=np.float64).reshape(-1, 5)
    boxes[:, 0] = transform.width - boxes[:, 0]
    boxes[:, 4] = -boxes[:, 4]
    return boxes


def _keep_rotated_boxes(t: NoOpTransform, x: np.ndarray) -> np.ndarray:
    return x


# Registered for the base class, so that transforms of users have it too.
Transform.register_type("rotated_box", transform_rotated_boxes)
HFlipTransform.register_type("rotated_box", _flip_rotated_boxes)
NoOpTransform.register_type("rotated_box", _keep_rotated_boxes)


# Resizing as Pillow does, by the compiled operator if its values are equal. Pillow filters along x first;
# from version 13 on, along y first if that saves work. Which of the two the installed version does is found
# out once, with small images; if neither rule fits, Pillow itself resizes.

_FAST = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)

OrderRule = Callable[[int, int, int, int], bool]


def to_pil(img: np.ndarray) -> Image.Image:
    """Convert a uint8 array of shape (H, W), (H, W, 1) or (H, W, C) to a PIL image."""
    if img.ndim == 3 and img.shape[2] == 1:
        img = img[:, :, 0]
    return Image.fromarray(img)


def from_pil(image: Image.Image, like: np.ndarray) -> np.ndarray:
    """Convert a PIL image to an array with as many dimensions as ``like``."""
    array = np.asarray(image)
    return array[:, :, None] if like.ndim == 3 and array.ndim == 2 else array


def _rows_first(height: int, width: int, new_height: int, new_width: int) -> bool:
    """Return whether Pillow 13 filters along y first."""
    return new_height < height and height - new_height > 2 * (width - new_width)


def _never(height: int, width: int, new_height: int, new_width: int) -> bool:
    return False


# (height, width, new height, new width): up, down and mixed scaling, on either side of the rule.
_PROBES = (
    (12, 15, 19, 26),
    (12, 15, 7, 26),
    (12, 15, 19, 6),
    (24, 24, 12, 16),
    (24, 24, 12, 17),
    (24, 24, 12, 18),
    (24, 24, 12, 19),
    (24, 24, 20, 23),
    (24, 40, 9, 12),
    (40, 24, 9, 20),
)


def _fits(rule: OrderRule) -> bool:
    """Return whether the operator, with the order of ``rule``, has the same results as Pillow."""
    rng = np.random.default_rng(0)
    for height, width, new_height, new_width in _PROBES:
        img = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for method in _FAST:
            expected = np.asarray(Image.fromarray(img).resize((new_width, new_height), method))
            if not np.array_equal(_resize(img, new_height, new_width, method, rule), expected):
                return False
    return True


@cache
def _order_rule() -> OrderRule | None:
    """Return the rule of the installed Pillow; None if it is unknown or there is no compiled operator."""
    if not has_native_kernel("resize_image", "cpu"):
        return None
    return next((rule for rule in (_rows_first, _never) if _fits(rule)), None)


def _resize(img: np.ndarray, new_height: int, new_width: int, method: int, rule: OrderRule) -> np.ndarray:
    reverse = img.strides[2] < 0  # a BGR view of RGB; tensors have no negative strides
    source = img[:, :, ::-1] if reverse else img
    if min(source.strides) < 0 or not source.flags.writeable:
        source = source.copy()
    height, width = img.shape[:2]
    first = rule(height, width, new_height, new_width)
    planes = resize_image(torch.from_numpy(source), (new_height, new_width), int(method), first)
    out = planes.numpy().transpose(1, 2, 0)
    return out[:, :, ::-1] if reverse else out


def resize_as_pillow(img: np.ndarray, new_height: int, new_width: int, method: int) -> np.ndarray:
    """Resize an image as `PIL.Image.Image.resize` does, to the last bit.

    Args:
        img: (H, W) or (H, W, C) uint8, of any memory layout.
        new_height, new_width: positive.
        method: a `PIL.Image.Resampling`.

    Returns:
        uint8 array with as many dimensions as ``img``; its memory may be laid out as planes.
    """
    channels = 1 if img.ndim == 2 else img.shape[2]
    # Pillow weights colors by alpha if there are two or four channels.
    rule = _order_rule() if method in _FAST and channels in (1, 3) and img.size > 0 else None
    if rule is None or img.shape[:2] == (new_height, new_width):
        return from_pil(to_pil(img).resize((new_width, new_height), method), img)
    if img.ndim == 2:
        return _resize(img[:, :, None], new_height, new_width, method, rule)[:, :, 0]
    return _resize(img, new_height, new_width, method, rule)


_TORCH_MODES = {
    Image.Resampling.NEAREST: "nearest",
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.BICUBIC: "bicubic",
}


def _nearest_indices(size: int, new_size: int) -> np.ndarray:
    """Return which of ``size`` pixels Pillow picks for each of ``new_size``, with its rule for ties."""
    line = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    return np.asarray(line.resize((new_size, 1), Image.Resampling.NEAREST))[0]


class ResizeTransform(Transform):
    """Resize an image to a given size.

    uint8 images are resized as Pillow does, which antialiases when it downscales; other types by
    `torch.nn.functional.interpolate` with ``align_corners=False``, without antialiasing.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int, interp: int | None = None):
        """
        Args:
            h, w: size of the input images.
            new_h, new_w: size of the output images.
            interp: a `PIL.Image.Resampling` method, by default bilinear.
        """
        super().__init__()
        if interp is None:
            interp = Image.Resampling.BILINEAR
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resize ``img``, an array of shape (H, W), (H, W, C) or (N, H, W, C), and keep its dtype.

        Raises:
            ValueError: if the size of ``img`` is not (h, w).
        """
        spatial = img.shape[1:3] if img.ndim == 4 else img.shape[:2]
        if img.ndim not in (2, 3, 4) or tuple(spatial) != (self.h, self.w):
            raise ValueError(
                f"ResizeTransform is for images of height {self.h} and width {self.w}, "
                f"got an array of shape {img.shape}"
            )
        method = Image.Resampling(self.interp if interp is None else interp)
        if img.dtype == np.uint8 and img.ndim < 4:
            return resize_as_pillow(img, self.new_h, self.new_w, method)
        if method == Image.Resampling.NEAREST and not np.issubdtype(img.dtype, np.floating):
            return self._pick_nearest(img)
        return self._interpolate(img, method)

    def _pick_nearest(self, img: np.ndarray) -> np.ndarray:
        """Resize arrays of any dtype (ids, masks) to the pixels that Pillow picks from a uint8 image."""
        rows = _nearest_indices(self.h, self.new_h)
        cols = _nearest_indices(self.w, self.new_w)
        axis = 1 if img.ndim == 4 else 0
        return img.take(rows, axis=axis).take(cols, axis=axis + 1)

    def _interpolate(self, img: np.ndarray, method: Image.Resampling) -> np.ndarray:
        if method not in _TORCH_MODES:
            legal = ", ".join(m.name for m in _TORCH_MODES)
            raise ValueError(f"interp {method.name} needs uint8 images; for {img.dtype} use one of {legal}")
        mode = _TORCH_MODES[method]
        if np.issubdtype(img.dtype, np.floating):
            source = np.ascontiguousarray(img)
        else:
            source = img.astype(np.float32)
        batch = source.reshape((-1, self.h, self.w, 1 if img.ndim == 2 else img.shape[-1]))
        tensor = torch.from_numpy(batch).permute(0, 3, 1, 2)
        resized = F.interpolate(
            tensor,
            (self.new_h, self.new_w),
            mode=mode,
            align_corners=None if mode == "nearest" else False,
        )
        out = resized.permute(0, 2, 3, 1).numpy()
        out = out.reshape(
            img.shape[:-3] + (self.new_h, self.new_w) + (img.shape[-1:] if img.ndim > 2 else ())
        )
        if out.dtype == img.dtype:
            return out
        if img.dtype == np.bool_:
            return out >= 0.5
        limits = np.iinfo(img.dtype)
        return np.rint(out).clip(limits.min, limits.max).astype(img.dtype)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Scale (N, 2) xy coordinates, in place."""
        coords[:, 0] = coords[:, 0] * (self.new_w * 1.0 / self.w)
        coords[:, 1] = coords[:, 1] * (self.new_h * 1.0 / self.h)
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Resize with nearest-neighbor interpolation, which creates no new ids."""
        return self.apply_image(segmentation, interp=Image.Resampling.NEAREST)

    def inverse(self) -> Transform:
        return ResizeTransform(self.new_h, self.new_w, self.h, self.w, self.interp)


class ExtentTransform(Transform):
    """Crop a rectangle from an image and scale it to an output size (Pillow's EXTENT).

    The part of the rectangle outside the image is filled.
    """

    def __init__(self, src_rect, output_size, interp: int = Image.Resampling.BILINEAR, fill: float = 0):
        """
        Args:
            src_rect: (x0, y0, x1, y1) in absolute pixels of the input image.
            output_size: (height, width) of the output image.
            interp: a `PIL.Image.Resampling` method.
            fill: value of pixels outside the input image; a segmentation is filled with 0.
        """
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Crop and scale ``img``, a uint8 array of shape (H, W) or (H, W, C)."""
        return self._extent(img, self.interp if interp is None else interp, self.fill)

    def _extent(self, img: np.ndarray, interp: int, fill: float) -> np.ndarray:
        height, width = self.output_size
        source = to_pil(img)
        color = int(fill) if source.mode == "L" else (int(fill),) * len(source.getbands())
        out = source.transform(
            size=(width, height),
            method=Image.Transform.EXTENT,
            data=tuple(float(v) for v in self.src_rect),
            resample=interp,
            fillcolor=color,
        )
        return from_pil(out, img)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Shift and scale (N, 2) xy coordinates."""
        height, width = self.output_size
        x0, y0, x1, y1 = self.src_rect
        scale = np.array([width / (x1 - x0), height / (y1 - y0)], dtype=np.float64)
        return (coords.astype(np.float64) - np.array([x0, y0], dtype=np.float64)) * scale

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Crop and scale with nearest-neighbor interpolation."""
        return self._extent(segmentation, Image.Resampling.NEAREST, 0)


class RotationTransform(Transform):
    """Rotate an image about a point."""

    def __init__(
        self, h: int, w: int, angle: float, expand: bool = True, center=None, interp: int | None = None
    ):
        """
        Args:
            h, w: size of the input images.
            angle: degrees, counter-clockwise as seen on the screen.
            expand: enlarge the result so that it contains the full rotated image; ``center`` then has no
                effect.
            center: (x, y) of the fixed point, absolute pixels; by default the center of the image.
            interp: an OpenCV interpolation flag, by default ``cv2.INTER_LINEAR``.
        """
        super().__init__()
        import cv2

        image_center = np.array((w / 2, h / 2))
        if center is None:
            center = image_center
        if interp is None:
            interp = cv2.INTER_LINEAR
        abs_cos, abs_sin = (abs(np.cos(np.deg2rad(angle))), abs(np.sin(np.deg2rad(angle))))
        if expand:
            bound_w, bound_h = np.rint([h * abs_sin + w * abs_cos, h * abs_cos + w * abs_sin]).astype(int)
        else:
            bound_w, bound_h = w, h
        self._set_attributes(locals())
        self.rm_coords = self.create_rotation_matrix()
        # OpenCV has pixel centers at integers: shift by half a pixel before and after.
        self.rm_image = self.create_rotation_matrix(offset=-0.5)

    def create_rotation_matrix(self, offset: float = 0) -> np.ndarray:
        """Return the (2, 3) affine matrix of the rotation in a frame shifted by ``offset`` pixels."""
        import cv2

        center = (self.center[0] + offset, self.center[1] + offset)
        matrix = cv2.getRotationMatrix2D(tuple(float(c) for c in center), self.angle, 1)
        if self.expand:
            middle = matrix[:, :2] @ (self.image_center + offset) + matrix[:, 2]
            matrix[:, 2] += np.array([self.bound_w / 2, self.bound_h / 2]) + offset - middle
        return matrix

    def _is_identity(self) -> bool:
        return self.angle % 360 == 0

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Rotate ``img`` of shape (H, W) or (H, W, C); fill pixels from outside the image with 0."""
        import cv2

        if len(img) == 0 or self._is_identity():
            return img
        if tuple(img.shape[:2]) != (self.h, self.w):
            raise ValueError(
                f"RotationTransform is for images of height {self.h} and width {self.w}, "
                f"got an array of shape {img.shape}"
            )
        interp = self.interp if interp is None else interp
        size = (int(self.bound_w), int(self.bound_h))
        out = cv2.warpAffine(np.ascontiguousarray(img), self.rm_image, size, flags=interp)
        return out[:, :, None] if out.ndim < img.ndim else out

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Rotate (N, 2) xy coordinates."""
        coords = np.asarray(coords, dtype=float)
        if len(coords) == 0 or self._is_identity():
            return coords
        return coords @ self.rm_coords[:, :2].T + self.rm_coords[:, 2]

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Rotate with nearest-neighbor interpolation."""
        import cv2

        return self.apply_image(segmentation, interp=cv2.INTER_NEAREST)

    def inverse(self) -> Transform:
        """Return the rotation back, with ``expand`` followed by a crop to the original size."""
        if not self.expand:
            return RotationTransform(self.h, self.w, -self.angle, False, self.center, self.interp)
        back = RotationTransform(self.bound_h, self.bound_w, -self.angle, True, None, self.interp)
        crop = CropTransform((back.bound_w - self.w) // 2, (back.bound_h - self.h) // 2, self.w, self.h)
        return TransformList([back, crop])


class ColorTransform(Transform):
    """Change the colors of an image by any function, but not its geometry."""

    def __init__(self, op):
        """
        Args:
            op: function from an image array to one of the same size.
        """
        if not callable(op):
            raise TypeError(f"{type(self).__name__}: op must be callable, got {type(op).__name__}")
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return self.op(img)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation

    def inverse(self) -> Transform:
        return NoOpTransform()


class PILColorTransform(ColorTransform):
    """A `ColorTransform` whose function takes and returns a PIL image."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return np.asarray(self.op(Image.fromarray(img)))


class CropTransform(fvt.CropTransform):
    """Crop ``image[y0 : y0 + h, x0 : x0 + w]``; polygons are clipped to it, boxes only shifted."""

    def apply_polygons(self, polygons: list) -> list:
        """Clip polygons ((P, 2) arrays, xy) to the rectangle; drop those outside it."""
        corners = (self.x0, self.y0, self.x0 + self.w, self.y0 + self.h)
        clipped = [clip_polygon(polygon, *corners) for polygon in polygons]
        return [self.apply_coords(points) for points in clipped if len(points)]


class PadTransform(fvt.PadTransform):
    """Pad by ``x0``, ``y0`` (left, top) and ``x1``, ``y1`` (right, bottom) pixels."""

    def inverse(self) -> Transform:
        if self.orig_w is None or self.orig_h is None:
            raise ValueError("PadTransform can be inverted only if orig_w and orig_h are given")
        width, height = self.orig_w + self.x0 + self.x1, self.orig_h + self.y0 + self.y1
        return CropTransform(self.x0, self.y0, self.orig_w, self.orig_h, orig_w=width, orig_h=height)
