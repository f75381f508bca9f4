"""Reading every picture of a data set, to find those that cannot be read or have another size than said."""

from __future__ import annotations

import io
import struct
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from detlib.data.readers import stored_size, to_8_bits, upright_size
from detlib.utils.file_io import PathManager

__all__ = ["Picture", "read_pictures"]

_SECONDS = 5.0  # between two lines of progress


@dataclass(frozen=True)
class Picture:
    """What a file turned out to be.

    Attributes:
        fault: the kind of finding; empty for a good picture.
        detail: what was found.
        size: width and height, upright by EXIF.
        stored_size: width and height before the turn.
        checksum: length and CRC of the file.
    """

    fault: str = ""
    detail: str = ""
    size: tuple[int, int] = (0, 0)
    stored_size: tuple[int, int] = (0, 0)
    checksum: tuple[int, int] = (0, 0)


def _read(path: str) -> Picture:
    try:
        with PathManager.open(path, "rb") as file:
            data = file.read()
    except (FileNotFoundError, IsADirectoryError):
        return Picture("missing-picture", f"{path} does not exist")
    except OSError as error:
        return Picture("unreadable-picture", f"{path}: {error}")
    checksum = (len(data), zlib.crc32(data))
    size = None
    try:
        image = Image.open(io.BytesIO(data))
        size, stored = upright_size(image), stored_size(image)
        image.load()
        to_8_bits(image)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        # Pillow raises any of these for broken files; a header that was read tells where it broke.
        kind = "truncated-picture" if size and "truncated" in str(error) else "unreadable-picture"
        return Picture(kind, f"{path}: {error}", checksum=checksum)
    except Image.DecompressionBombError as error:
        return Picture("unreadable-picture", f"{path}: {error}", checksum=checksum)
    return Picture("", "", size, stored, checksum)


def read_pictures(paths: Iterable[str], num_threads: int = 8) -> Iterator[Picture]:
    """Yields what each file is, in their order; says on stderr how far it is where that takes long."""
    paths = list(paths)
    said = time.monotonic()
    with ThreadPoolExecutor(num_threads) as pool:
        for number, picture in enumerate(pool.map(_read, paths), start=1):
            if time.monotonic() - said > _SECONDS:
                said = time.monotonic()
                print(f"read {number} of {len(paths)} pictures", file=sys.stderr, flush=True)
            yield picture
