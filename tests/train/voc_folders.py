"""Small folders in VOC layout for tests: pictures of noise, labels drawn as rectangles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

CLASSES = {1: "one", 2: "two", 3: "three", 4: "four"}

Rectangle = tuple[int, int, int, int, int]  # value, top, left, height, width


def write_label(path: Path, label: np.ndarray, mode: str = "P") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)  # mode L
    if mode == "P":
        image.putpalette([(7 * value + channel * 50) % 256 for value in range(256) for channel in range(3)])
    elif mode != "L":
        image = image.convert(mode)
    image.save(path)


def write_picture(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Returns the RGB values written (exact for PNG)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return picture


def draw(height: int, width: int, rectangles: Sequence[Rectangle]) -> np.ndarray:
    label = np.zeros((height, width), np.uint8)
    for value, top, left, rows, columns in rectangles:
        label[top : top + rows, left : left + columns] = value
    return label


def line(name: str) -> str:
    return f"JPEGImages/{name}.jpg SegmentationClass/{name}.png"


def write_folder(root: Path, labels: Mapping[str, np.ndarray], list_file: str = "list.txt") -> Path:
    """JPEGImages, SegmentationClass, classes.txt and one list with every label, in order; returns the root."""
    for seed, (name, label) in enumerate(labels.items()):
        height, width = label.shape
        write_picture(root / "JPEGImages" / f"{name}.jpg", height, width, seed)
        write_label(root / "SegmentationClass" / f"{name}.png", label, mode="L" if seed % 2 else "P")
    (root / list_file).write_text("".join(line(name) + "\n" for name in labels))
    names = {0: "background", **CLASSES}
    (root / "classes.txt").write_text("".join(f"{class_id} {name}\n" for class_id, name in names.items()))
    return root
