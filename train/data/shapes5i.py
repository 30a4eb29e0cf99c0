"""Shapes-5i: a drawn stand-in for Pascal-5i in exact Pascal-VOC layout, so that the whole pipeline runs without a download.

Writes folders and lists that any VOC reader takes; how a picture is drawn is `shapes5i_draw.py`'s business.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from svf_fast.train.data import VOID
from svf_fast.train.data.folds import FOLD_RULES, fold_of
from svf_fast.train.data.palette import palette_png
from svf_fast.train.data.shapes5i_draw import CLASSES, draw

CLASS_NAMES: tuple[str, ...] = tuple(shape.name for shape in CLASSES)
FOLDS = FOLD_RULES["pascal"].folds
_LAYOUT = 2  # goes up whenever the same settings would give other masks or lists
_SETTINGS_FILE = "shapes5i.json"
_EVERY_NTH_VALIDATES = 5
_SMALLEST_SIZE = 64


@dataclass(frozen=True)
class Settings:
    """All that decides what is drawn; kept beside the pictures, so that the same request is not drawn twice."""

    seed: int
    images: int
    size: int
    layout: int = _LAYOUT


@dataclass(frozen=True)
class _Drawn:
    stem: str
    validates: bool
    classes: frozenset[int]

    @property
    def line(self) -> str:
        return f"JPEGImages/{self.stem}.jpg SegmentationClass/{self.stem}.png\n"


def generate(
    root: Path,
    *,
    seed: int = 321,
    images: int = 2000,
    size: int = 152,
    on_picture: Callable[[int, int], None] | None = None,
) -> Path:
    """Draw the data set into `root` and return it; a folder that already holds these settings is left as it is.

    `images` pictures of long side `size` pixels, every fifth of them for validation. Layout: `JPEGImages/*.jpg`,
    `SegmentationClass/*.png` (VOC palette; 0 ground, 1–20 classes, 255 void), `ImageSets/Segmentation/{train,val}.txt`,
    `classes.txt` (`id name` a line), `lists/{train,val}.txt` (every picture of the part, `image mask` a line, relative to
    `root`) and `lists/fold{0..3}_{train,val}.txt`. Fold i's novel classes are those of Pascal-5i; its training list holds
    no picture that shows one of them, its validation list only pictures that show at least one. Masks and lists depend
    on the settings alone; JPEG bytes also on the OpenCV version.
    `on_picture(done, all)` is called as pictures are finished. The folder appears whole or not at all.

    Raises ValueError for impossible settings and FileExistsError when `root` holds something else.
    """
    settings = Settings(seed=seed, images=images, size=size)
    _refuse_impossible(settings)
    root = Path(root)
    if root.exists():
        if _settings_of(root) == settings:
            return root
        raise FileExistsError(
            f"root: {root} exists and does not hold Shapes-5i with seed {seed}, {images} images of size {size} as this "
            "version lays it out; remove it or choose another folder"
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        _write(building, settings, on_picture)
        building.chmod(0o755)  # mkdtemp's own mode would shut other users out
        os.replace(building, root)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return root


def _refuse_impossible(settings: Settings) -> None:
    if settings.seed < 0:
        raise ValueError(f"seed: found {settings.seed}, expected 0 or more")
    if settings.images < _EVERY_NTH_VALIDATES:
        raise ValueError(
            f"images: found {settings.images}, expected at least {_EVERY_NTH_VALIDATES}, "
            f"because one picture in {_EVERY_NTH_VALIDATES} is for validation"
        )
    if settings.size < _SMALLEST_SIZE:
        raise ValueError(f"size: found {settings.size} pixels, expected at least {_SMALLEST_SIZE}")


def _settings_of(root: Path) -> Settings | None:
    """The settings a folder was drawn with, or None when it is no (readable) Shapes-5i folder."""
    try:
        return Settings(**json.loads((root / _SETTINGS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(root: Path, settings: Settings, on_picture: Callable[[int, int], None] | None) -> None:
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "lists"):
        (root / folder).mkdir(parents=True)
    drawn: list[_Drawn] = []
    for index in range(settings.images):
        drawn.append(_draw_to_files(root, settings, index))
        if on_picture is not None:
            on_picture(len(drawn), settings.images)
    _write_lists(root, drawn)
    (root / _SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def _draw_to_files(root: Path, settings: Settings, index: int) -> _Drawn:
    """Draw picture `index` with a generator of its own: the first hundred of a thousand are the hundred of a hundred."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([settings.seed, index])))
    picture, label = draw(_choose_classes(rng), settings.size, rng)
    stem = f"shapes_{index:06d}"
    target = root / "JPEGImages" / f"{stem}.jpg"
    if not cv2.imwrite(str(target), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92]):
        raise OSError(f"{target}: the picture could not be written")
    (root / "SegmentationClass" / f"{stem}.png").write_bytes(palette_png(label))
    shown = frozenset(int(c) for c in np.flatnonzero(np.bincount(label.ravel(), minlength=VOID + 1)) if 0 < c < VOID)
    return _Drawn(stem, index % _EVERY_NTH_VALIDATES == _EVERY_NTH_VALIDATES - 1, shown)


def _choose_classes(rng: np.random.Generator) -> list[int]:
    """One to three objects of different classes, as photographs in VOC have them, and in a third of the pictures one more of the first."""
    amount = (1, 1, 2, 2, 3)[int(rng.integers(5))]
    chosen = [int(position) + 1 for position in rng.permutation(len(CLASSES))[:amount]]
    if rng.random() < 1 / 3:
        chosen.append(chosen[0])
    return chosen


def _write_lists(root: Path, drawn: list[_Drawn]) -> None:
    classes = "".join(f"{class_id} {name}\n" for class_id, name in enumerate(CLASS_NAMES, start=1))
    (root / "classes.txt").write_text(classes, encoding="utf-8")
    for part, validates in (("train", False), ("val", True)):
        pool = [picture for picture in drawn if picture.validates is validates]
        stems = "".join(f"{picture.stem}\n" for picture in pool)
        (root / "ImageSets" / "Segmentation" / f"{part}.txt").write_text(stems, encoding="utf-8")
        listed = {part: pool}
        for fold in range(FOLDS):
            novel = set(fold_of("pascal", fold).novel)
            listed[f"fold{fold}_{part}"] = [picture for picture in pool if bool(picture.classes & novel) is validates]
        for name, pictures in listed.items():
            lines = "".join(picture.line for picture in pictures)
            (root / "lists" / f"{name}.txt").write_text(lines, encoding="utf-8")
