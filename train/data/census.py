"""What every picture of a list shows: its size and the pixels of every class, found by reading all labels once.

From a census alone follow the splits of all folds; kept beside its list as JSON, it spares every later start the scan.
Knows nothing of folds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from svf_fast.train.data import BACKGROUND, VOID
from svf_fast.train.data.documents import is_whole_number, read_document, write_document
from svf_fast.train.data.lists import is_written_number
from svf_fast.train.data.reading import Bytes, image_size, read_label, require_same_size

_FORMAT, _VERSION = "svf_fast census", 1
_ROW_IN_WORDS = "[image, label, height, width, bytes of the image, bytes of the label, {class id: pixels}]"
_PAIRS_A_TASK = 32
_EXACT_IN_FLOAT32 = 2**24

Pair = tuple[str, str]
OnProgress = Callable[[int, int], None]  # how many of how many pairs are done


@dataclass(frozen=True)
class CensusRow:
    """One picture and its label; paths as in the list file."""

    image: str
    label: str
    size: tuple[int, int]  # height, width
    file_bytes: tuple[int, int]  # of the picture's file and the label's
    class_pixels: Mapping[int, int]  # class id → pixels of the label; background and void are left out


@dataclass(frozen=True)
class Census:
    """The rows of a list's pairs, in the list's order."""

    rows: tuple[CensusRow, ...]


def take_census(
    root: Path,
    pairs: Sequence[Pair],
    known_class_ids: Iterable[int],
    *,
    earlier: Census | None = None,
    named: str | None = None,
    workers: int = 2,
    on_progress: OnProgress | None = None,
) -> Census:
    """Read the labels and the pictures' headers of `pairs` (relative to `root`), in `workers` threads.

    A row of `earlier` is taken over when both files still have the sizes in bytes that it recorded and its classes are
    known. `on_progress(done, all)` is called now and then. Raises one ValueError that lists every pair that cannot be
    used, `named` after where the pairs come from: a file that is missing, truncated, of another size than its partner,
    or labelled with an unknown class.
    """
    known = frozenset(known_class_ids)
    recorded = {(row.image, row.label): row for row in earlier.rows} if earlier is not None else {}

    def rows_of(some: Sequence[Pair]) -> list[CensusRow | str]:
        return [_row_or_problem(str(root), pair, known, recorded.get(pair)) for pair in some]

    found: list[CensusRow | str] = []
    # Two threads are the most that pay: headers are read under Python's lock. 924 photographs on two cores, from the disk
    # and from memory: one thread 0.90 s and 0.54 s, two 0.66 and 0.49, four 0.66 and 0.57, six 0.73 and 0.64.
    pool = ThreadPoolExecutor(workers, thread_name_prefix="census")
    try:
        tasks = (pairs[start : start + _PAIRS_A_TASK] for start in range(0, len(pairs), _PAIRS_A_TASK))
        for rows in pool.map(rows_of, tasks):
            found += rows
            if on_progress is not None:
                on_progress(len(found), len(pairs))
    finally:
        # `with` would still run what an interruption finds queued
        pool.shutdown(cancel_futures=True)
    problems = [problem for problem in found if isinstance(problem, str)]
    if problems:
        head = f"{len(problems)} of the {len(pairs)} lines of {named or root} cannot be used:"
        raise ValueError("\n  ".join([head, *problems]))
    return Census(tuple(row for row in found if isinstance(row, CensusRow)))


def census_path(list_file: Path) -> Path:
    """Where the census of a list lies: `lists/train.census.json` beside `lists/train.txt`."""
    return list_file.with_suffix(".census.json")


def changed_files(root: Path, rows: Iterable[CensusRow]) -> list[str]:
    """A sentence for every picture or label that is missing or has another size in bytes than its row says."""
    sentences: list[str] = []
    for row in rows:
        for name, expected in zip((row.image, row.label), row.file_bytes, strict=True):
            # plain strings: joining Path objects takes longer than the system call
            path = os.path.join(root, name)
            try:
                found = os.stat(path).st_size
            except OSError:
                sentences.append(f"{path} does not exist")
                continue
            if found != expected:
                sentences.append(f"{path} has {found:,} bytes; it had {expected:,} when the census was taken")
    return sentences


def write_census(path: Path, census: Census, list_sha256: str) -> None:
    """Write a census of the list whose bytes have that hash, whole or not at all."""
    pictures = [
        [row.image, row.label, *row.size, *row.file_bytes, {str(c): n for c, n in row.class_pixels.items()}]
        for row in census.rows
    ]
    write_document(path, _FORMAT, _VERSION, {"list_sha256": list_sha256, "pictures": pictures})


def read_census(path: Path, pairs: Sequence[Pair], list_sha256: str) -> Census | None:
    """The census in `path` of the list with these pairs and this hash; None when it belongs to another list.

    Raises FileNotFoundError, or ValueError for a file that is no whole and consistent census.
    """
    try:
        document = read_document(path, _FORMAT, _VERSION)
    except ValueError as error:
        raise ValueError(f"{error}; {_remedy(path)}") from None
    if document.get("list_sha256") != list_sha256:
        return None
    pictures = document.get("pictures")
    if not isinstance(pictures, list) or len(pictures) != len(pairs):
        raise ValueError(f"{path} does not hold the {len(pairs)} pictures of its list; {_remedy(path)}")
    rows: list[CensusRow] = []
    for number, (values, pair) in enumerate(zip(pictures, pairs, strict=True), start=1):
        row = _row_from(values)
        if row is None or (row.image, row.label) != pair:
            raise ValueError(f"{path}: picture {number} is not {_ROW_IN_WORDS} of {pair[0]}; {_remedy(path)}")
        rows.append(row)
    return Census(tuple(rows))


def _remedy(path: Path) -> str:
    return f"remove {path.name} to have the pictures read again"


def _row_or_problem(root: str, pair: Pair, known: frozenset[int], recorded: CensusRow | None) -> CensusRow | str:
    try:
        if recorded is not None and _is_unchanged(root, recorded) and recorded.class_pixels.keys() <= known:
            return recorded
        return _read_row(root, pair, known)
    except (OSError, ValueError) as error:
        return str(error)


def _is_unchanged(root: str, row: CensusRow) -> bool:
    try:
        return _file_bytes(root, (row.image, row.label)) == row.file_bytes
    except OSError:
        return False  # reading will say what is wrong


def _file_bytes(root: str, pair: Pair) -> tuple[int, int]:
    # plain strings: joining Path objects takes longer than the system call
    image, label = (os.stat(os.path.join(root, name)).st_size for name in pair)
    return image, label


def _read_row(root: str, pair: Pair, known: frozenset[int]) -> CensusRow:
    image_path, label_path = Path(root, pair[0]), Path(root, pair[1])
    height, width = image_size(image_path)
    label = read_label(label_path)
    require_same_size(image_path, (height, width), label_path, label.shape)
    counts = _pixels_of_values(label)
    pixels = {int(c): int(counts[c]) for c in np.flatnonzero(counts) if c not in (BACKGROUND, VOID)}
    if unknown := sorted(pixels.keys() - known):
        raise ValueError(
            f"{label_path} holds the values {unknown}, which are no class ids of {root}; expected 0, 255 and class ids"
        )
    return CensusRow(*pair, (height, width), _file_bytes(root, pair), pixels)


def _pixels_of_values(label: Bytes) -> NDArray[np.int64]:
    """Pixels of the values 0 … 255, int64 [256]."""
    # OpenCV's histogram takes 0.7 times as long as NumPy's bincount, which first makes eight bytes of every pixel, but
    # gives float32: exact in parts of a label that cannot have too many pixels of a value
    flat, counts = label.ravel(), np.zeros(VOID + 1, np.int64)
    for start in range(0, flat.size, _EXACT_IN_FLOAT32):
        part = flat[start : start + _EXACT_IN_FLOAT32]
        counts += cv2.calcHist([part], [0], None, [VOID + 1], [0, VOID + 1]).ravel().astype(np.int64)
    return counts


def _row_from(values: object) -> CensusRow | None:
    """A row of the file, or None for what is none."""
    if not isinstance(values, list) or len(values) != 7:
        return None
    image, label, *numbers, counts = values
    if not isinstance(image, str) or not isinstance(label, str) or not isinstance(counts, dict):
        return None
    if not all(is_whole_number(number) and number > 0 for number in (*numbers, *counts.values())):
        return None
    pixels = {int(c): n for c, n in counts.items() if is_written_number(c) and BACKGROUND < int(c) < VOID}
    height, width, image_bytes, label_bytes = numbers
    if len(pixels) != len(counts) or sum(pixels.values()) > height * width:
        return None
    return CensusRow(image, label, (height, width), (image_bytes, label_bytes), pixels)
