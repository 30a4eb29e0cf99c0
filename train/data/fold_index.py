"""A fold's split as a file: row numbers of a list, the classes in each picture, the pictures of each class. JSON, checked
on reading; nothing in it is run. Knows of a rule and a fold only the names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from svf_fast.train.data.census import Pair, census_path, changed_files, read_census
from svf_fast.train.data.documents import is_whole_number, read_document, write_document
from svf_fast.train.data.lists import is_written_number, read_pairs
from svf_fast.train.data.split import Entry, Split
from svf_fast.train.files import sha256_of

_FORMAT, _VERSION = "svf_fast fold index", 1


def write_fold_index(
    path: Path, split: Split, *, rule: str | None, fold: int | None, dropped: Iterable[int] = ()
) -> None:
    """Write `split`, as it was made from its list file, whole or not at all; missing folders are made.

    `rule` and `fold` say for a reader where the classes come from (None: unknown); `dropped` are the classes of which no
    picture may show a pixel. A list inside the split's root is written down relative to it.
    """
    row_of = {pair: row for row, pair in enumerate(read_pairs(split.list_file))}
    is_inside = split.list_file.is_relative_to(split.root)
    list_file = split.list_file.relative_to(split.root) if is_inside else split.list_file.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "rule": rule,
        "fold": fold,
        "dropped": sorted(dropped),
        "list": list_file.as_posix(),
        "list_sha256": sha256_of(split.list_file),
        "rows": [row_of[entry.image, entry.label] for entry in split.entries],
        "present_classes": [entry.present_classes for entry in split.entries],
        "files_of_class": {str(c): files for c, files in split.files_of_class.items()},
    }
    write_document(path, _FORMAT, _VERSION, content)


def read_fold_index(
    path: Path,
    root: Path,
    classes: Mapping[int, str],
    *,
    class_ids: Iterable[int] | None = None,
    drop_images_with: Iterable[int] | None = None,
) -> Split:
    """The split in `path`, for the data set `classes` (id → name) in `root`; equal to the one that was written.

    With `class_ids` and `drop_images_with` it must have been made for just these. Raises FileNotFoundError, or
    ValueError for a file that is no whole and consistent index, that belongs to another content of its list, or that
    names pictures or labels which are not there, or not of the size in bytes in the list's census, if it has one (all of
    them).
    """
    document = read_document(path, _FORMAT, _VERSION)
    _require_shape(document, path)
    ids = tuple(int(c) for c in document["files_of_class"])
    if unknown := [c for c in ids if c not in classes]:
        raise ValueError(f"{path} is of the classes {unknown}, which {root} does not have ({sorted(classes)})")
    origin = "no known fold" if document["rule"] is None else f"fold {document['fold']} of {document['rule']}"
    for asked, made, what in (
        (class_ids, ids, "the classes"),
        (drop_images_with, document["dropped"], "pictures left out that show any of"),
    ):
        if asked is not None and sorted(set(asked)) != sorted(made):
            raise ValueError(f"{path} is of {origin}, with {what} {sorted(made)}; expected {what} {sorted(set(asked))}")
    list_file = root / document["list"]
    pairs = read_pairs(list_file)
    if sha256_of(list_file) != document["list_sha256"]:
        raise ValueError(f"{path} belongs to another content of {list_file}: make the index anew")
    rows, present = document["rows"], document["present_classes"]
    if rows[-1] >= len(pairs):
        raise ValueError(f"{path} names line {rows[-1] + 1} of {list_file}, which has {len(pairs)}")
    split = Split(
        root=root,
        list_file=list_file,
        class_names={c: classes[c] for c in ids},
        class_ids=ids,
        entries=tuple(Entry(*pairs[row], tuple(shown)) for row, shown in zip(rows, present, strict=True)),
        files_of_class={int(c): tuple(files) for c, files in document["files_of_class"].items()},
    )
    _require_files(split, path, rows, pairs)
    return split


def _require_shape(document: Mapping[str, Any], path: Path) -> None:
    """ValueError unless everything in the file has the right kind and fits together."""
    rule, fold, dropped = (document.get(key) for key in ("rule", "fold", "dropped"))
    rows, present = document.get("rows"), document.get("present_classes")
    files_of_class: Any = document.get("files_of_class")
    if not all(isinstance(document.get(key), str) for key in ("list", "list_sha256")):
        raise _damaged(path, "list", "the list's path and its hash")
    if not (rule is None or isinstance(rule, str)) or not (fold is None or is_whole_number(fold)):
        raise _damaged(path, "fold", "a rule's name and the number of a fold")
    ids = [int(c) for c in files_of_class if is_written_number(c)] if isinstance(files_of_class, dict) else []
    if not ids or not _is_ascending(ids) or len(ids) != len(files_of_class):
        raise _damaged(path, "files_of_class", "ascending class ids with the pictures of each")
    if not _is_ascending(dropped) or not set(ids).isdisjoint(dropped):
        raise _damaged(path, "dropped", "ascending ids of classes that are not asked for")
    if not _is_ascending(rows) or not rows:
        raise _damaged(path, "rows", "ascending row numbers")
    if not isinstance(present, list) or len(present) != len(rows):
        raise _damaged(path, "present_classes", f"{len(rows)} lists of class ids, one a row")
    if not all(_is_ascending(shown) and shown and set(ids).issuperset(shown) for shown in present):
        raise _damaged(path, "present_classes", "ascending class ids of this index, at least one a row")
    served: set[int] = set()
    for class_id, files in zip(ids, files_of_class.values(), strict=True):
        if not _is_ascending(files) or any(f >= len(rows) or class_id not in present[f] for f in files):
            raise _damaged(path, "files_of_class", f"ascending positions of rows that show class {class_id}")
        served.update(files)
    if len(served) != len(rows):
        raise _damaged(path, "files_of_class", "every row under at least one class")


def _is_ascending(values: object) -> TypeGuard[list[int]]:
    """Whether this is a list of different whole numbers from 0, in order."""
    if not isinstance(values, list) or not all(is_whole_number(value) and value >= 0 for value in values):
        return False
    return all(first < second for first, second in pairwise(values))


def _damaged(path: Path, key: str, expected: str) -> ValueError:
    return ValueError(f"{path}: {key} is damaged; expected {expected}; make the index anew")


def _require_files(split: Split, path: Path, rows: Iterable[int], pairs: Sequence[Pair]) -> None:
    """All files are there, and as large as the list's census says, where that lies beside the list."""
    kept = census_path(split.list_file)
    census = read_census(kept, pairs, sha256_of(split.list_file)) if kept.is_file() else None
    if census is not None:
        problems = changed_files(split.root, (census.rows[row] for row in rows))
    else:
        names = (name for entry in split.entries for name in (entry.image, entry.label))
        paths = (os.path.join(split.root, name) for name in names)
        problems = [f"{found} does not exist" for found in paths if not os.path.isfile(found)]
    if problems:
        raise ValueError("\n  ".join([f"{len(problems)} files of {path} cannot be used:", *problems]))
