"""A folder in VOC layout with photographs made up for `loader.py`, of the size and about the bytes of the data sets' own, so that
the benchmark runs where no data set is. Knows nothing of what is measured."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from svf_fast.train.data import VOID
from svf_fast.train.data.palette import voc_palette

CLASS_IDS = (1, 2, 3, 4)
LIST_FILE = "list.txt"
_JPEG_QUALITY = 90
# side of a cell in pixels, and its share of the contrast
_OCTAVES = ((96, 110.0), (24, 60.0), (6, 35.0), (2, 110.0))


def write_photos(root: Path, count: int, height: int, width: int, seed: int) -> None:
    """`count` pictures with one object each and a list of them, in `root`."""
    rng = np.random.default_rng(seed)
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    names = [f"photo_{number:04d}" for number in range(count)]
    for number, name in enumerate(names):
        picture = _texture(height, width, rng)
        cv2.imwrite(str(root / "JPEGImages" / f"{name}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        label = Image.fromarray(_object(height, width, CLASS_IDS[number % len(CLASS_IDS)], rng))
        label.putpalette(voc_palette())
        label.save(root / "SegmentationClass" / f"{name}.png")
    (root / LIST_FILE).write_text("".join(f"JPEGImages/{n}.jpg SegmentationClass/{n}.png\n" for n in names), "utf-8")
    classes = "".join(f"{class_id} kind {class_id}\n" for class_id in CLASS_IDS)
    (root / "classes.txt").write_text(f"0 background\n{classes}", "utf-8")


def _texture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Noise at several scales, uint8 [H, W, 3]: compresses about as badly as a photograph."""
    picture = np.full((height, width, 3), 128, np.float32)
    for cell, contrast in _OCTAVES:
        coarse = rng.random((height // cell + 2, width // cell + 2, 3), np.float32) - 0.5
        picture += contrast * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(picture, 0, 255), np.uint8)


def _object(height: int, width: int, class_id: int, rng: np.random.Generator) -> np.ndarray:
    """A label with one ellipse of `class_id` in a thin border of void, as in VOC."""
    label = np.zeros((height, width), np.uint8)
    centre = (int(rng.integers(width // 3, 2 * width // 3)), int(rng.integers(height // 3, 2 * height // 3)))
    axes = (int(rng.integers(width // 8, width // 4)), int(rng.integers(height // 8, height // 4)))
    for value, margin in ((VOID, 4), (class_id, 0)):
        cv2.ellipse(label, centre, (axes[0] + margin, axes[1] + margin), 20.0, 0.0, 360.0, value, -1)
    return label
