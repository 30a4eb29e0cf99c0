"""The masks of VOC 2012 (palette PNG) and SBD (MATLAB files): checked, and turned into label images. What worker processes run."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from svf_fast.train.data import VOID
from svf_fast.train.data.palette import palette_png
from svf_fast.train.data.reading import Bytes, decode_label
from svf_fast.train.prepare.pictures import picture_size

CLASSES = 20


@dataclass(frozen=True)
class InputFile:
    """A picture (`.jpg`), a mask of VOC (`.png`) or one of SBD (`.mat`): its path in the source, what to call it, and its path or bytes."""

    name: str
    where: str
    file: bytes | Path

    @property
    def content(self) -> bytes:
        if isinstance(self.file, bytes):
            return self.file
        try:
            return self.file.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.where} cannot be read ({error.strerror})") from None


@dataclass(frozen=True)
class Checked:
    """What is known of a file that can be used: its (height, width), and of a mask the label file to be written."""

    size: tuple[int, int]
    label: bytes | None


def check(given: InputFile) -> Checked:
    """ValueError for a picture or mask that cannot be used, naming it. A mask comes back as a palette PNG of class ids, VOC's as it is."""
    if given.name.endswith(".jpg"):
        return Checked(picture_size(given.file, given.where), None)
    content = given.content
    values = _values(given.name, content, given.where)
    height, width = values.shape
    is_ready = given.name.endswith(".png") and Image.open(io.BytesIO(content)).mode == "P"
    return Checked((height, width), content if is_ready else palette_png(values))


def read_sbd_mask(content: bytes, where: str) -> Bytes:
    """The class ids in a file of SBD's `cls` folder, uint8 [H, W]: field `Segmentation` of the structure `GTcls`."""
    from scipy.io import loadmat

    try:
        found = loadmat(io.BytesIO(content), variable_names=["GTcls"])["GTcls"][0, 0]["Segmentation"]
    except Exception:  # on damaged bytes SciPy fails in every way: its own errors, zlib's, TypeError, MemoryError …
        raise ValueError(
            f"{where} is truncated or no mask of SBD; a MATLAB 5 file with GTcls.Segmentation is expected"
        ) from None
    if not isinstance(found, np.ndarray) or found.dtype != np.uint8 or found.ndim != 2 or not found.size:
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else type(found).__name__
        raise ValueError(f"{where}: GTcls.Segmentation is {kind}; uint8 [height, width] is expected")
    return np.ascontiguousarray(found)


def _values(name: str, content: bytes, where: str) -> Bytes:
    values = read_sbd_mask(content, where) if name.endswith(".mat") else decode_label(content, where)
    shown = np.flatnonzero(np.bincount(values.ravel(), minlength=VOID + 1))
    if unknown := [int(value) for value in shown if CLASSES < value < VOID]:
        raise ValueError(
            f"{where} holds the values {unknown}, which are no class ids; expected 0 to {CLASSES}, and {VOID} for void"
        )
    return values
