"""Which pictures of a list the episodes of some classes draw from, and which picture serves for which class: the field's
rules, on a census alone. Opens no file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from svf_fast.train.data.census import Census

MINIMUM_CLASS_PIXELS = 2 * 32 * 32  # a class smaller than this in a label, at its original size, does not count


class EmptySplitError(ValueError):
    """No picture of a list serves the classes that were asked for."""


@dataclass(frozen=True)
class Entry:
    """One picture of a split: paths as in the list file, and the split's classes in its label, however small.

    In a split of a whole list (`whole_of`) all classes of the data set in its label.
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


def split_of(
    census: Census,
    class_ids: Iterable[int],
    *,
    root: Path,
    list_file: Path,
    classes: Mapping[int, str],
    drop_images_with: Iterable[int] = (),
) -> Split:
    """The split of a list for `class_ids`, from the list's census; `classes` are all of the data set, id → name.

    A class counts in a picture if it covers at least 2·32·32 pixels of the label; pictures in which no class of
    `class_ids` counts are left out. Pictures that show any class of `drop_images_with`, be it one pixel, are left out
    too: the fold's novel classes for training (the "dataset trick" of BAM; PFENet passes none). Raises ValueError when
    the classes are none of `classes` or leave no picture.
    """
    wanted = _known_classes(class_ids, "class_ids", classes, root)
    dropped = _known_classes(drop_images_with, "drop_images_with", classes, root)
    if not wanted:
        raise ValueError("class_ids is empty; expected at least one class id")
    if both := sorted(set(wanted) & set(dropped)):
        raise ValueError(f"drop_images_with holds classes that class_ids asks for: {both}")
    entries: list[Entry] = []
    files_of_class: dict[int, list[int]] = {class_id: [] for class_id in wanted}
    for row in census.rows:
        counted = [c for c in wanted if row.class_pixels.get(c, 0) >= MINIMUM_CLASS_PIXELS]
        if not counted or any(c in row.class_pixels for c in dropped):
            continue
        for class_id in counted:
            files_of_class[class_id].append(len(entries))
        entries.append(Entry(row.image, row.label, tuple(c for c in wanted if c in row.class_pixels)))
    if not entries:
        raise EmptySplitError(
            f"{list_file} leaves no picture for the classes {list(wanted)}: none of its {len(census.rows)} labels shows "
            f"one of them on at least {MINIMUM_CLASS_PIXELS} pixels"
            + (f" without a class of {list(dropped)}" if dropped else "")
        )
    return Split(
        root=root,
        list_file=list_file,
        class_names={c: classes[c] for c in wanted},
        class_ids=wanted,
        entries=tuple(entries),
        files_of_class={c: tuple(files) for c, files in files_of_class.items()},
    )


def whole_of(
    census: Census,
    class_ids: Iterable[int],
    *,
    root: Path,
    list_file: Path,
    classes: Mapping[int, str],
    drop_images_with: Iterable[int] = (),
) -> Split:
    """Every picture of a list, whatever it shows and however small: no area rule; left out are only the pictures that
    show a class of `drop_images_with`.

    `present_classes` of an entry and `class_names` are here of all classes of the data set; `files_of_class` are kept
    for `class_ids` and hold every picture that shows the class at all. Raises like `split_of`.
    """
    wanted = _known_classes(class_ids, "class_ids", classes, root)
    dropped = _known_classes(drop_images_with, "drop_images_with", classes, root)
    entries = tuple(
        Entry(row.image, row.label, tuple(sorted(row.class_pixels)))
        for row in census.rows
        if not any(c in row.class_pixels for c in dropped)
    )
    if not entries:
        raise EmptySplitError(f"{list_file} leaves no picture without a class of {list(dropped)}")
    return Split(
        root=root,
        list_file=list_file,
        class_names=dict(classes),
        class_ids=wanted,
        entries=entries,
        files_of_class={
            c: tuple(index for index, entry in enumerate(entries) if c in entry.present_classes) for c in wanted
        },
    )


def _known_classes(class_ids: Iterable[int], argument: str, classes: Mapping[int, str], root: Path) -> tuple[int, ...]:
    ids = tuple(sorted(set(class_ids)))
    if unknown := [c for c in ids if c not in classes]:
        raise ValueError(f"{argument} holds {unknown}, which are not classes of {root} ({sorted(classes)})")
    return ids
