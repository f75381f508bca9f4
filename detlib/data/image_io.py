"""Reading images from files, and their color formats.

Formats are the names of Pillow's modes ("RGB", "L", ...) and two more: "BGR", and "YUV-BT.601", floating
point YUV of ITU-R BT.601 with Y in [0, 1].
"""

import io
import logging
import struct
from typing import cast

import numpy as np
import torch
from PIL import Image

from detlib.utils.file_io import PathManager

__all__ = [
    "ImageReadError",
    "SizeMismatchError",
    "check_image_size",
    "convert_PIL_to_numpy",
    "convert_image_to_rgb",
    "image_to_tensor",
    "read_image",
    "read_image_size",
    "read_label_map",
    "stored_size",
    "to_8_bits",
    "upright_size",
]

logger = logging.getLogger(__name__)

# https://en.wikipedia.org/wiki/YUV#SDTV_with_BT.601
_RGB_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]])
_YUV_TO_RGB = np.array([[1.0, 0.0, 1.13983], [1.0, -0.39465, -0.58060], [1.0, 2.03211, 0.0]])

# Raised by Pillow's decoders on malformed files.
_PIL_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)

_EXIF_ORIENTATION = 0x0112
_TIFF_WIDTH, _TIFF_HEIGHT = 0x0100, 0x0101
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class SizeMismatchError(ValueError):
    """The size of an image differs from the size that its dataset states."""


class ImageReadError(OSError, ValueError):
    """A file exists but is not a readable image: truncated, empty, or of another type."""


def to_8_bits(image: Image.Image) -> Image.Image:
    """Reduce an image of 16 bits to its upper 8, as OpenCV does, and scale floats in [0, 1] to [0, 255].

    Others are returned unchanged. Pillow's own conversion clips 16 bits at 255, which makes nearly all pixels
    white, and truncates floats, which makes nearly all pixels of an image in [0, 1] black.

    Raises:
        ValueError: if the values are 32-bit integers or floats that are not all in [0, 255].
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        low, high = cast(tuple[float, float], image.getextrema())
        if not (low >= 0 and high <= 255):
            raise ValueError(f"its values (mode {image.mode!r}) are in [{low}, {high}], not in [0, 255]")
        if image.mode == "F" and high <= 1:
            return Image.fromarray(np.rint(np.asarray(image) * 255).astype(np.uint8))
    return image


def convert_PIL_to_numpy(image: Image.Image, format: str | None) -> np.ndarray:
    """Convert a PIL image to an array of a given format.

    Args:
        image: any PIL image.
        format: one of the formats above; None keeps the image's own mode. Other formats have 8 bits, see
            `to_8_bits`.

    Returns:
        (H, W, C) array, uint8 for most formats, float64 for "YUV-BT.601"; "L" has C = 1. With None, an image
        of one channel has shape (H, W).
    """
    mode = "RGB" if format in ("BGR", "YUV-BT.601") else format
    if mode is not None and image.mode != mode:
        image = to_8_bits(image).convert(mode)
    array = np.array(image)
    if format == "L":
        return array[:, :, None]
    if format == "BGR":
        return array[:, :, ::-1]
    if format == "YUV-BT.601":
        return np.dot(array / 255.0, _RGB_TO_YUV.T)
    return array


def convert_image_to_rgb(image: np.ndarray | torch.Tensor, format: str) -> np.ndarray:
    """Convert an image of a given format to RGB.

    Args:
        image: (H, W, C) array or tensor in the value range of its format.
        format: one of the formats above.

    Returns:
        (H, W, 3) array in [0, 255]; uint8, except for "YUV-BT.601" (float) and "BGR" (the dtype of
        ``image``).
    """
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if format == "BGR":
        return image[:, :, [2, 1, 0]]
    if format == "YUV-BT.601":
        return np.dot(image, _YUV_TO_RGB.T) * 255.0
    image = image.astype(np.uint8, copy=False)
    if format == "RGB":
        return image
    if format == "L" and image.ndim == 3:
        image = image[:, :, 0]
    pil_image = Image.fromarray(image)
    if pil_image.mode != format:  # same bytes with another meaning (HSV, LAB, YCbCr)
        pil_image = Image.frombytes(format, pil_image.size, pil_image.tobytes())
    return np.asarray(pil_image.convert("RGB"))


def _upright(image: Image.Image, file_name: str) -> Image.Image:
    """Apply the EXIF orientation of ``image``; ignore broken EXIF data with a warning."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except (SyntaxError, ValueError, KeyError, TypeError, EOFError, struct.error) as error:
        logger.warning(
            "%s: cannot read the EXIF data (%s); assuming that the image is not rotated", file_name, error
        )
        return image
    method = _UPRIGHT.get(cast(int, orientation))
    return image if method is None else image.transpose(method)


def _open(file_name: str):
    try:
        return PathManager.open(file_name, "rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image file not found: {file_name}") from error


def _decode_by_opencv(file_name: str, format: str | None) -> np.ndarray | None:
    """Return (H, W, 3) uint8, or None if Pillow has to decode the image.

    This is the case for formats other than RGB and BGR, for files that OpenCV does not support, and for
    truncated JPEGs, of which OpenCV silently returns a part, and for TIFFs of floats, which it truncates.
    """
    import cv2

    if format not in ("RGB", "BGR"):
        return None
    with _open(file_name) as handle:
        data = handle.read()
    if len(data) == 0 or (data[:2] == b"\xff\xd8" and data.rfind(b"\xff\xd9", -4096) < 0):
        return None
    buffer = np.frombuffer(data, dtype=np.uint8)
    try:
        if data[:2] in (b"II", b"MM"):
            with Image.open(io.BytesIO(data)) as header:
                if header.mode == "F":
                    return None
        image = cv2.imdecode(buffer, cv2.IMREAD_COLOR)
    except (cv2.error, *_PIL_ERRORS):
        # For example, the image exceeds a size limit. Pillow raises a clearer error.
        return None
    return image if image is None or format == "BGR" else image[:, :, ::-1]


def read_image(file_name: str, format: str | None = None, decoder: str = "pil") -> np.ndarray:
    """Read an image from a file and apply its EXIF orientation.

    Args:
        file_name: path or URL that PathManager supports.
        format: see `convert_PIL_to_numpy`.
        decoder: "pil", or "opencv", which is faster for JPEG and returns equal values if both are built with
            the same JPEG library. Pillow decodes formats other than "RGB" and "BGR" and files that OpenCV
            cannot read in any case.

    Returns:
        (H, W, C) array, see `convert_PIL_to_numpy`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ImageReadError: if the file is not a readable image.
    """
    if decoder not in ("pil", "opencv"):
        raise ValueError(f"decoder (INPUT.DECODER) must be 'pil' or 'opencv', got {decoder!r}")
    if decoder == "opencv":
        image = _decode_by_opencv(file_name, format)
        if image is not None:
            return image
    image = _read_by_pillow(file_name)
    try:
        return convert_PIL_to_numpy(image, format)
    except ValueError as error:
        message = f"image file {file_name} cannot be converted to format {format!r}: {error}"
        raise ValueError(message) from error


def _read_by_pillow(file_name: str) -> Image.Image:
    with _open(file_name) as handle:
        try:
            image = Image.open(handle)
            image.load()
        except _PIL_ERRORS as error:
            raise ImageReadError(f"image file {file_name} is broken or cannot be read: {error}") from error
        return _upright(image, file_name)


def read_label_map(file_name: str) -> np.ndarray:
    """Read an image whose values are class indices.

    Args:
        file_name: path or URL that PathManager supports. The labels are the palette indices of a palette
            image, and the values of a grayscale image of any bit depth.

    Returns:
        (H, W) array, uint8, or int32 if there are values above 255.

    Raises:
        FileNotFoundError: if the file does not exist.
        ImageReadError: if the file is not a readable image.
        ValueError: if it is a color image.
    """
    image = _read_by_pillow(file_name)
    labels = np.array(image)
    if labels.ndim == 3:
        labels = labels[:, :, : 1 if image.mode == "LA" else 3]  # drop the alpha channel
        if (labels != labels[:, :, :1]).any():
            raise ValueError(
                f"label map {file_name} is a color image (mode {image.mode!r}); class indices must be stored "
                "as a grayscale or palette image"
            )
        labels = labels[:, :, 0]
    if labels.dtype == np.uint8:
        return labels
    return labels.astype(np.uint8 if labels.size == 0 or labels.max() <= 255 else np.int32)


def read_image_size(file_name: str) -> tuple[int, int]:
    """Read width and height, after applying the EXIF orientation, from the header of an image.

    Raises:
        FileNotFoundError: if the file does not exist.
        ImageReadError: if the file is not an image.
    """
    try:
        with PathManager.open(file_name, "rb") as handle, Image.open(handle) as image:
            return upright_size(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image file not found: {file_name}") from error
    except _PIL_ERRORS as error:
        raise ImageReadError(f"image file {file_name} is broken or cannot be read: {error}") from error


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of a newly opened image before its EXIF orientation is applied."""
    if image.format == "TIFF":  # Pillow applies the orientation itself, on opening or on loading
        tags = image.tag_v2  # type: ignore[attr-defined]
        return tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT]
    return image.size


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of a newly opened image after its EXIF orientation is applied."""
    try:
        turned = image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
    except (SyntaxError, ValueError, KeyError, TypeError, EOFError, struct.error):
        turned = False
    width, height = stored_size(image)
    return (height, width) if turned else (width, height)


def check_image_size(dataset_dict: dict, image: np.ndarray) -> None:
    """Compare an image's size with the dataset's "height" and "width", or add these if they are missing.

    Args:
        dataset_dict: dict of one image in the standard format.
        image: (H, W) or (H, W, C) array.

    Raises:
        SizeMismatchError: if they differ.
    """
    height, width = image.shape[:2]
    stated = dataset_dict.get("height", height), dataset_dict.get("width", width)
    if stated != (height, width):
        name = f"image {dataset_dict['image_id']!r}" if "image_id" in dataset_dict else "an image"
        file_name = f" (file {dataset_dict['file_name']})" if "file_name" in dataset_dict else ""
        hint = ""
        if stated == (width, height):
            hint = "; is the image rotated by its EXIF orientation, or are height and width swapped?"
        raise SizeMismatchError(
            f"{name}{file_name} has width {width} and height {height}, but its annotation states width "
            f"{stated[1]} and height {stated[0]}{hint}"
        )
    dataset_dict.setdefault("height", height)
    dataset_dict.setdefault("width", width)


def image_to_tensor(image: np.ndarray) -> torch.Tensor:
    """Convert an image to the tensor that models take.

    Args:
        image: (H, W, C) array of any memory layout, including flipped views.

    Returns:
        (C, H, W) contiguous tensor; it shares its memory with ``image`` if that is already stored as planes.
    """
    planes = image.transpose(2, 0, 1)
    flipped = [
        axis for axis, stride in enumerate(planes.strides) if stride < 0
    ]  # tensors have no negative strides
    if flipped:
        planes = planes[tuple(slice(None, None, -1 if axis in flipped else 1) for axis in range(3))]
    if not planes.flags.writeable:
        planes = planes.copy()
    tensor = torch.from_numpy(planes)
    return tensor.flip(flipped).contiguous() if flipped else tensor.contiguous()
