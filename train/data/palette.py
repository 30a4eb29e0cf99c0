"""Label images as they are written: palette PNGs whose values are class ids, under Pascal VOC's colours."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from svf_fast.train.data.reading import Bytes


def palette_png(label: Bytes) -> bytes:
    """A PNG file whose pixels are the values of `label`, uint8 [H, W], and whose palette only gives them colours."""
    image = Image.frombytes("P", (label.shape[1], label.shape[0]), label.tobytes())
    image.putpalette(voc_palette())
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@cache
def voc_palette() -> bytes:
    """The Pascal VOC colour map, 256 × (red, green, blue): the bits of the id, three at a time, from the colours' high bits down."""
    palette: NDArray[np.int64] = np.zeros((256, 3), dtype=np.int64)
    for class_id in range(256):
        rest = class_id
        for bit in range(7, -1, -1):
            for channel in range(3):
                palette[class_id, channel] |= ((rest >> channel) & 1) << bit
            rest >>= 3
    return palette.astype(np.uint8).tobytes()
