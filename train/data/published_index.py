"""The text caches in which PFENet, BAM and the SVF authors keep a fold: the pictures as a list, and a dictionary
`{class id: [(image, label), …]}` as Python text. Read as literals, never run. Knows nothing of folds."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from svf_fast.train.data.census import Census, Pair
from svf_fast.train.data.documents import is_whole_number
from svf_fast.train.data.lists import read_pairs
from svf_fast.train.data.split import Entry, Split

_SUB_CLASSES_IN_WORDS = "{class id: [(image, label), …]} as Python writes it"


@dataclass(frozen=True)
class PublishedIndex:
    """What the two files say, with paths relative to a root: the pictures in the list's order, and for every class the
    positions of those that serve for it."""

    pairs: tuple[Pair, ...]
    rows_of_class: Mapping[int, tuple[int, ...]]


def read_published_index(data_list: Path, sub_class_file_list: Path, root: Path) -> PublishedIndex:
    """Read `data_list_<fold>.txt` and `sub_class_file_list_<fold>.txt` for the data set in `root`.

    The authors' paths start at another folder: leading parts are cut off until a file of the rest is in `root`. Raises
    FileNotFoundError or ValueError for files that are of no use, naming every picture that is not in `root` or is in one
    file and not in the other.
    """
    listed, files_of_class = read_pairs(data_list), _read_sub_classes(sub_class_file_list)
    row_of = {pair: row for row, pair in enumerate(listed)}
    served = dict.fromkeys(pair for files in files_of_class.values() for pair in files)
    if strange := [" ".join(pair) for pair in served if pair not in row_of]:
        raise ValueError(_all_of(strange, f"pictures of {sub_class_file_list} are not in {data_list}"))
    if idle := [" ".join(pair) for pair in listed if pair not in served]:
        raise ValueError(_all_of(idle, f"pictures of {data_list} are under no class of {sub_class_file_list}"))
    return PublishedIndex(
        pairs=_in_root(listed, root, data_list),
        rows_of_class={c: tuple(sorted(row_of[pair] for pair in files)) for c, files in sorted(files_of_class.items())},
    )


def split_of_published(
    index: PublishedIndex, census: Census, *, root: Path, list_file: Path, classes: Mapping[int, str]
) -> Split:
    """The split that a published index describes, `census` being of its pairs and `classes` all of the data set.

    Which classes a picture shows is not in the caches and comes from its label; whether they are large enough is left to
    the caches. Raises ValueError naming every label that does not show what it is to serve for.
    """
    class_ids = tuple(index.rows_of_class)
    if unknown := [c for c in class_ids if c not in classes]:
        raise ValueError(f"the index has the classes {unknown}, which {root} does not have ({sorted(classes)})")
    entries = tuple(
        Entry(row.image, row.label, tuple(c for c in class_ids if c in row.class_pixels)) for row in census.rows
    )
    if without := [
        f"{entries[row].label}, class {c}"
        for c, rows in index.rows_of_class.items()
        for row in rows
        if c not in entries[row].present_classes
    ]:
        raise ValueError(_all_of(without, "labels do not show the class that they are listed for"))
    return Split(
        root=root,
        list_file=list_file,
        class_names={c: classes[c] for c in class_ids},
        class_ids=class_ids,
        entries=entries,
        files_of_class=index.rows_of_class,
    )


def _read_sub_classes(path: Path) -> dict[int, list[Pair]]:
    try:
        content = ast.literal_eval(path.read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (OSError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"{path} is not {_SUB_CLASSES_IN_WORDS}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} is not {_SUB_CLASSES_IN_WORDS}")
    files_of_class: dict[int, list[Pair]] = {}
    for class_id, files in content.items():
        if not is_whole_number(class_id) or not isinstance(files, list) or not all(map(_is_pair, files)):
            raise ValueError(f"{path}: what it has for {class_id!r} is not a class id with a list of (image, label)")
        files_of_class[class_id] = [(image, label) for image, label in files]
        if len(set(files_of_class[class_id])) < len(files):
            raise ValueError(f"{path} has a picture twice for class {class_id}")
    return files_of_class


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _in_root(pairs: Sequence[Pair], root: Path, data_list: Path) -> tuple[Pair, ...]:
    """The pairs with paths relative to `root`."""
    found: list[Pair] = []
    missing: list[str] = []
    for pair in pairs:
        image, label = (next((rest for rest in _rests(name) if (root / rest).is_file()), None) for name in pair)
        missing += [name for name, rest in zip(pair, (image, label), strict=True) if rest is None]
        if image is not None and label is not None:
            found.append((image, label))
    if missing:
        raise ValueError(_all_of(missing, f"files of {data_list} are not in {root}, whatever is cut off in front"))
    return tuple(found)


def _rests(name: str) -> Iterator[str]:
    """The path without its first 0, 1, 2, … parts; what would lead out of a root is left out."""
    parts = PurePosixPath(name).parts
    for start in range(len(parts)):
        rest = PurePosixPath(*parts[start:])
        if not rest.is_absolute() and ".." not in rest.parts:
            yield str(rest)


def _all_of(names: Sequence[str], what: str) -> str:
    return "\n  ".join([f"{len(names)} {what}:", *names])
