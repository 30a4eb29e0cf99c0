"""Decoding of pictures and label images, with one sentence for a file that cannot be used.

Pictures go through OpenCV, as in the field; labels through Pillow, because OpenCV makes colours of a palette PNG, where
the raw indices are the class ids. Knows nothing of lists, classes or episodes.
"""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]

_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG", b"IEND"
_START_BYTES = 4
_TAIL_BYTES = 1024
_EXIF_ORIENTATION = 0x0112
_EXIF_QUARTER_TURNS = (5, 6, 7, 8)
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(path: Path) -> Bytes:
    """The picture in `path` as RGB, uint8 [H, W, 3], turned as its EXIF orientation says.

    Raises FileNotFoundError for a missing file and ValueError for one that is truncated or no picture.
    """
    content = _read(path)
    _require_complete(content, path)
    # an empty buffer is an exception in OpenCV, an unknown format None
    decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) if content else None
    if decoded is None:
        raise _no_picture(path)
    return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB, dst=decoded), np.uint8)


def read_label(path: Path) -> Bytes:
    """The class ids in the one-channel label image `path`, uint8 [H, W]: palette indices, or grey values as they are.

    Raises FileNotFoundError for a missing file and ValueError for one that is truncated, no picture, or not 8-bit
    single-channel.
    """
    return _label_in(path, path)


def decode_label(content: bytes, where: object) -> Bytes:
    """As `read_label`, of a file's bytes; `where` names the file in an error."""
    return _label_in(io.BytesIO(content), where)


def read_pair(image_path: Path, label_path: Path) -> tuple[Bytes, Bytes]:
    """Picture [H, W, 3] and label [H, W] of one size; ValueError names both files when the sizes differ."""
    image, label = read_image(image_path), read_label(label_path)
    require_same_size(image_path, image.shape[:2], label_path, label.shape)
    return image, label


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) in pixels that `read_image` will give, from the header alone.

    The end of the file is looked at as well, so that a truncated picture is found without decoding it. Raises like
    `read_image`.
    """
    start = _read(path, first=_START_BYTES)
    # a JPEG's end marker may be followed by other bytes: only then is the whole file read
    if not (_is_complete(start, _read(path, last=_TAIL_BYTES)) or _is_complete(start, _read(path))):
        raise _truncated(path)
    return _size_in(path, path)


def encoded_size(content: bytes, where: object) -> tuple[int, int]:
    """As `image_size`, of a file's bytes; `where` names the file in an error."""
    _require_complete(content, where)
    return _size_in(io.BytesIO(content), where)


def require_same_size(
    image_path: object, image_shape: tuple[int, ...], label_path: object, label_shape: tuple[int, ...]
) -> None:
    """ValueError naming both files unless the (height, width) pairs are equal."""
    if image_shape != label_shape:
        raise ValueError(
            f"{image_path} is {image_shape[1]}x{image_shape[0]} pixels (width x height) but its label {label_path} "
            f"is {label_shape[1]}x{label_shape[0]}"
        )


def _read(path: Path, *, first: int = -1, last: int = 0) -> bytes:
    """The `first` or the `last` bytes of a file, by default all of it."""
    try:
        with path.open("rb") as file:
            if last:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last))
            return file.read(first)
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None


def _label_in(file: Path | io.BytesIO, where: object) -> Bytes:
    try:
        with Image.open(file) as opened:
            mode, values = opened.mode, np.array(opened)
    except FileNotFoundError:
        raise _missing(where) from None
    except _PILLOW_ERRORS:
        raise ValueError(f"{where} cannot be decoded as a label image; a whole PNG file is expected") from None
    if mode not in ("P", "L"):
        raise ValueError(
            f"{where} is a label of Pillow mode {mode}; expected one 8-bit channel (palette P or grey L) of class ids"
        )
    return values


def _size_in(file: Path | io.BytesIO, where: object) -> tuple[int, int]:
    try:
        with Image.open(file) as opened:
            width, height = opened.size
            turned = _orientation(opened) in _EXIF_QUARTER_TURNS
    except _PILLOW_ERRORS:
        raise _no_picture(where) from None
    return (width, height) if turned else (height, width)


def _orientation(opened: Image.Image) -> object:
    """EXIF's alone, as OpenCV reads it: Pillow's own `getexif` also believes what XMP says."""
    opened.getexif()  # a PNG may have it behind its picture
    exif = Image.Exif()
    exif.load(opened.info.get("exif", b""))
    return exif.get(_EXIF_ORIENTATION)


def _require_complete(content: bytes, where: object) -> None:
    if not _is_complete(content[:_START_BYTES], content):
        raise _truncated(where)


def _is_complete(start: bytes, content: bytes) -> bool:
    """Whether `content`, a whole file or its tail, holds the end marker of the format that the file's `start` shows.

    Inside a JPEG's compressed scan no marker can occur, so an end marker that belongs to an EXIF thumbnail is followed
    by the start of the picture's own scan. Other formats than JPEG and PNG count as complete.
    """
    if start.startswith(_JPEG_START):
        return content.rfind(_JPEG_END) > content.rfind(_JPEG_SCAN)
    if start.startswith(_PNG_START):
        return _PNG_END in content
    return True


def _missing(path: object) -> FileNotFoundError:
    return FileNotFoundError(f"{path} does not exist")


def _truncated(path: object) -> ValueError:
    return ValueError(f"{path} is truncated: its end marker is missing")


def _no_picture(path: object) -> ValueError:
    return ValueError(f"{path} cannot be decoded as a picture; a JPEG or PNG file is expected")
