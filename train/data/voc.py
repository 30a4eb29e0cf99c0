"""Folders in Pascal-VOC layout: list files, classes, folds, and the lists of pictures that a fold's episodes draw from.

A list file has one `image label` pair a line, relative to the root. Every file of a list is checked here, once, so that
`episodes.py` meets no surprises in the middle of a run. Knows nothing of tensors or of how episodes are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from svf_fast.train.data import VOID
from svf_fast.train.data.reading import image_size, read_label, require_same_size

MINIMUM_CLASS_PIXELS = 2 * 32 * 32  # a class smaller than this in a label, at its original size, does not count
BACKGROUND = 0

_NAMES_IN_AN_ERROR = 20
_PASCAL_CLASSES = 20
_PASCAL_FOLDS = 4


@dataclass(frozen=True)
class Fold:
    """Which classes are novel (met only in validation) and which are base (trained on), as ascending 1-based ids."""

    novel: tuple[int, ...]
    base: tuple[int, ...]


def pascal_fold(index: int) -> Fold:
    """Fold `index` (0–3) of Pascal-5i: classes 5i+1 … 5i+5 are novel, the other 15 base."""
    if index not in range(_PASCAL_FOLDS):
        raise ValueError(f"fold is {index}; Pascal-5i has the folds 0 to {_PASCAL_FOLDS - 1}")
    per_fold = _PASCAL_CLASSES // _PASCAL_FOLDS
    novel = tuple(range(per_fold * index + 1, per_fold * (index + 1) + 1))
    return Fold(novel, tuple(c for c in range(1, _PASCAL_CLASSES + 1) if c not in novel))


@dataclass(frozen=True)
class Entry:
    """One picture of a split: paths as in the list file, and the split's classes in its label, however small.

    In a split of a whole list (`VOCFolder.whole`) all classes of the data set in its label.
    """

    image: str
    label: str
    present_classes: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """The pictures that episodes of `class_ids` draw from, in the order of the list file.

    `files_of_class[c]` are the indices of the entries in which class c covers at least `MINIMUM_CLASS_PIXELS` (in a
    split of a whole list: one pixel).
    """

    root: Path
    list_file: Path
    class_names: Mapping[int, str]
    class_ids: tuple[int, ...]
    entries: tuple[Entry, ...]
    files_of_class: Mapping[int, tuple[int, ...]]

    def __len__(self) -> int:
        """Number of query pictures."""
        return len(self.entries)


class VOCFolder:
    """A data root and its classes (1-based id → name); `classes` defaults to what `classes.txt` in the root says."""

    def __init__(self, root: str | Path, classes: Mapping[int, str] | None = None) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"data root {self.root} is not a folder; expected pictures and labels in VOC layout"
            )
        self.classes = dict(classes) if classes is not None else read_classes(self.root / "classes.txt")
        for class_id in self.classes:
            _require_class_id(class_id, "classes")

    def split(self, list_file: str | Path, class_ids: Iterable[int], *, drop_images_with: Iterable[int] = ()) -> Split:
        """The split of `list_file` (relative to the root, or absolute) for the classes `class_ids`.

        A class counts in a picture if it covers at least 2·32·32 pixels of the label; pictures in which no class of
        `class_ids` counts are left out. Pictures that show any class of `drop_images_with`, be it one pixel, are left
        out too: pass the fold's novel classes for training (the "dataset trick" of BAM; PFENet passes none).

        Raises FileNotFoundError or ValueError, naming every file that is missing, truncated, of another size than its
        partner, or labelled with an unknown class.
        """
        wanted, dropped = (
            self._known_classes(class_ids, "class_ids"),
            self._known_classes(drop_images_with, "drop_images_with"),
        )
        if not wanted:
            raise ValueError("class_ids is empty; expected at least one class id")
        if both := sorted(set(wanted) & set(dropped)):
            raise ValueError(f"drop_images_with holds classes that class_ids asks for: {both}")
        path = self.root / list_file
        pairs = _read_list(path)
        class_pixels = self._scan(path, pairs)

        entries: list[Entry] = []
        files_of_class: dict[int, list[int]] = {class_id: [] for class_id in wanted}
        for (image, label), pixels in zip(pairs, class_pixels, strict=True):
            counted = [c for c in wanted if pixels.get(c, 0) >= MINIMUM_CLASS_PIXELS]
            if not counted or any(c in pixels for c in dropped):
                continue
            for class_id in counted:
                files_of_class[class_id].append(len(entries))
            entries.append(Entry(image, label, tuple(c for c in wanted if c in pixels)))
        if not entries:
            raise ValueError(
                f"{path} leaves no picture for the classes {list(wanted)}: none of its {len(pairs)} labels shows "
                f"one of them on at least {MINIMUM_CLASS_PIXELS} pixels"
                + (f" without a class of {list(dropped)}" if dropped else "")
            )
        return Split(
            root=self.root,
            list_file=path,
            class_names={c: self.classes[c] for c in wanted},
            class_ids=wanted,
            entries=tuple(entries),
            files_of_class={c: tuple(files) for c, files in files_of_class.items()},
        )

    def whole(self, list_file: str | Path, class_ids: Iterable[int]) -> Split:
        """Every picture of `list_file`, whatever it shows and however small: no area rule, nothing left out.

        `present_classes` of an entry and `class_names` are here of all classes of the data set; `files_of_class` are
        kept for `class_ids` and hold every picture that shows the class at all. Raises like `split`.
        """
        wanted = self._known_classes(class_ids, "class_ids")
        path = self.root / list_file
        pairs = _read_list(path)
        entries = tuple(
            Entry(image, label, tuple(sorted(pixels)))
            for (image, label), pixels in zip(pairs, self._scan(path, pairs), strict=True)
        )
        return Split(
            root=self.root,
            list_file=path,
            class_names=dict(self.classes),
            class_ids=wanted,
            entries=entries,
            files_of_class={
                c: tuple(index for index, entry in enumerate(entries) if c in entry.present_classes) for c in wanted
            },
        )

    def _known_classes(self, class_ids: Iterable[int], argument: str) -> tuple[int, ...]:
        ids = tuple(sorted(set(class_ids)))
        if unknown := [c for c in ids if c not in self.classes]:
            raise ValueError(
                f"{argument} holds {unknown}, which are not classes of {self.root} ({sorted(self.classes)})"
            )
        return ids

    def _scan(self, list_file: Path, pairs: Sequence[tuple[str, str]]) -> list[dict[int, int]]:
        """Pixels per class for every pair; one error lists all pairs that cannot be used."""
        class_pixels: list[dict[int, int]] = []
        problems: list[str] = []
        console = Console(stderr=True)
        for image, label in track(
            pairs, f"Checking {list_file.name}", console=console, transient=True, disable=not console.is_terminal
        ):
            try:
                class_pixels.append(self._class_pixels(self.root / image, self.root / label))
            except (FileNotFoundError, ValueError) as error:
                problems.append(str(error))
        if problems:
            shown = problems[:_NAMES_IN_AN_ERROR]
            if more := len(problems) - len(shown):
                shown.append(f"and {more} more")
            raise ValueError(
                "\n  ".join([f"{len(problems)} of the {len(pairs)} lines of {list_file} cannot be used:", *shown])
            )
        return class_pixels

    def _class_pixels(self, image_path: Path, label_path: Path) -> dict[int, int]:
        size = image_size(image_path)
        label = read_label(label_path)
        require_same_size(image_path, size, label_path, label.shape)
        counts = np.bincount(label.ravel(), minlength=256)
        pixels = {int(c): int(counts[c]) for c in np.flatnonzero(counts) if c not in (BACKGROUND, VOID)}
        if unknown := [c for c in pixels if c not in self.classes]:
            raise ValueError(
                f"{label_path} holds the values {unknown}, which are no class ids of {self.root}; "
                f"expected 0, 255 and class ids"
            )
        return pixels


def read_classes(path: Path) -> dict[int, str]:
    """Class id → name from a file of `id name` lines; id 0 (background) may be listed and is left out."""
    classes: dict[int, str] = {}
    for number, line in _numbered_lines(path):
        identifier, _, name = line.partition(" ")
        if not identifier.isdecimal() or not name.strip():
            raise ValueError(f"{path} line {number} is {line!r}; expected `id name`")
        if int(identifier) in classes:
            raise ValueError(f"{path} line {number} gives class {identifier} a second time")
        classes[int(identifier)] = name.strip()
    classes.pop(BACKGROUND, None)
    if not classes:
        raise ValueError(f"{path} lists no class besides the background")
    for class_id in classes:
        _require_class_id(class_id, str(path))
    return classes


def _read_list(path: Path) -> list[tuple[str, str]]:
    first_line_of: dict[tuple[str, str], int] = {}
    for number, line in _numbered_lines(path):
        parts = line.split()
        if len(parts) != 2:
            raise ValueError(
                f"{path} line {number} is {line!r}; expected `image label`, two paths with a space between"
            )
        pair = (parts[0], parts[1])
        if pair in first_line_of:
            raise ValueError(f"{path} line {number} repeats line {first_line_of[pair]} ({line!r})")
        first_line_of[pair] = number
    if not first_line_of:
        raise ValueError(f"{path} is empty; expected one `image label` pair a line")
    return list(first_line_of)


def _numbered_lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path} cannot be read as a text file") from None
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _require_class_id(class_id: int, where: str) -> None:
    if not 0 < class_id < VOID:
        raise ValueError(
            f"{where} holds the class id {class_id}; expected 1 to {VOID - 1} (0 is background, {VOID} void)"
        )
