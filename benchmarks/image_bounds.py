"""Opens image files of strangers: of named formats only, no larger than stated, and only what really is a file.

Decoders are the part of a data set's way in that has had most security errors, so what reaches them is bounded first:

- formats: those of `IMAGE_FORMATS`, told by the content and not by the name. Pillow reads forty others, one of which
  (EPS) starts Ghostscript;
- size: what the header announces, before any pixel is decoded, and the bytes of the file. The bounds are Pillow's own,
  at which it only warns: a quarter of a gigabyte at three bytes a pixel. Texts and colour profiles inside PNG files are
  bounded by Pillow (1 MB each, 64 MB together);
- kind: a pipe, a device or a folder that stands where a file was listed is refused instead of being waited for. A link
  to a file is followed.

Of an animation the first frame is used. Nothing here converts: which modes are accepted is told in `image_files`.

Cost: 10 us a file beside Pillow's own opening.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's names; PPM stands for PBM and PGM too
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3  # 89,478,485: where Pillow warns
MAX_BYTES = 2**28  # of a file: so many pixels, not compressed; our choice
# What Pillow's decoders are known to raise on damaged or hostile data
BROKEN_IMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError, TypeError),
    *(OverflowError, NotImplementedError, RuntimeError, AttributeError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


def open_regular(path: str | Path) -> IO[bytes]:
    """A file opened for reading, if it is one.

    Raises:
        OSError: it is absent, can't be read, or is a folder, a pipe, a socket or a device. Never waits.
    """
    # without O_NONBLOCK a pipe would be waited for until somebody writes
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is a folder, a pipe or a device; accepted: a file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


@contextmanager
def bounded_image(source: str | Path | bytes | IO[bytes]) -> Iterator[Image.Image]:
    """An image whose header was read and found within the bounds, not decoded yet.

    Args:
        source: a file's path, its content, or the file opened for reading, which stays open.

    Raises:
        One of `BROKEN_IMAGE`: no file, none of the formats, a damaged header, or one that announces too much. The
        message says what is announced and what is accepted; callers add the name. Decoding inside of the `with` raises
        the same kinds.
    """
    if isinstance(source, (str, Path)):
        with open_regular(source) as file, bounded_image(file) as image:
            yield image
        return
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    size = len(source) if isinstance(source, bytes) else os.fstat(file.fileno()).st_size
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes; accepted: at most {MAX_BYTES:,}")
    with _opened(file) as image:
        _check_pixels(image.size)
        yield image
        _check_pixels(image.size)  # a frame may be larger than the header said


def _opened(file: IO[bytes]) -> Image.Image:
    try:
        return Image.open(file, formats=IMAGE_FORMATS)
    except Image.UnidentifiedImageError:
        raise ValueError(f"no image of a known format; accepted: {', '.join(IMAGE_FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # a warning, where they are errors
        announced = re.search(r"\((\d+) pixels\)", str(error))
        raise _too_many(int(announced[1]) if announced else None) from error


def _check_pixels(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise _too_many(size[0] * size[1], size)


def _too_many(pixels: int | None, size: tuple[int, int] | None = None) -> ValueError:
    found = "too many pixels" if pixels is None else f"{pixels:,} pixels"
    edges = f" ({size[0]} x {size[1]})" if size else ""
    return ValueError(f"it announces {found}{edges}; accepted: at most {MAX_PIXELS:,}, scale it down first")


__all__ = ["BROKEN_IMAGE", "IMAGE_FORMATS", "MAX_BYTES", "MAX_PIXELS", "bounded_image", "open_regular"]
