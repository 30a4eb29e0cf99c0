"""``svf-fast prepare folder``: a user's own folder in VOC layout, checked whole, with a census beside each of its lists. Its pictures and
labels stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from svf_fast.train.data.census import Census, census_path, take_census, write_census
from svf_fast.train.data.folds import read_folds
from svf_fast.train.data.lists import read_classes, read_pairs
from svf_fast.train.data.split import MINIMUM_CLASS_PIXELS, EmptySplitError, split_of
from svf_fast.train.files import sha256_of
from svf_fast.train.prepare.problems import Problems
from svf_fast.train.progress import WorkProgress

_OWN_FOLDS = "folds.json"


def prepare_folder(root: str | Path, *, workers: int, console: Console) -> str:
    """Read every picture's header and every label of all `lists/*.txt` in `root`, in `workers` threads, and write the censuses; returns
    what was found.

    Raises FileNotFoundError or ValueError with everything that cannot be used, before anything is written.
    """
    root = Path(root).absolute()
    classes = read_classes(root / "classes.txt")
    lists = sorted((root / "lists").glob("*.txt"))
    if not lists:
        raise FileNotFoundError(f"{root / 'lists'} holds no list; expected .txt files with `image label` a line")
    problems = Problems()
    censuses: dict[Path, Census] = {}
    with WorkProgress(console) as shown:
        for path in lists:
            try:
                pairs = read_pairs(path)
                count = shown.counter(f"reading the files of {path.name}", len(pairs))
                censuses[path] = take_census(
                    root,
                    pairs,
                    classes,
                    named=str(path),
                    workers=max(workers, 1),
                    on_progress=lambda done, _, count=count: count(done),
                )
            except (FileNotFoundError, ValueError) as error:
                problems.add(error)
    folds = []
    if (root / _OWN_FOLDS).is_file():
        try:
            folds = list(read_folds(root / _OWN_FOLDS, classes))
        except ValueError as error:
            problems.add(error)
    problems.raise_all(f"Nothing was written, because {root} has what cannot be used")
    for path, census in censuses.items():
        write_census(census_path(path), census, sha256_of(path))
    lines = [f"{path.relative_to(root)}: {len(census.rows):,} pictures" for path, census in censuses.items()]
    for index, fold in enumerate(folds):
        lines.append(f"{_OWN_FOLDS}, fold {index}: novel {list(fold.novel)}")
        for path, census in censuses.items():
            of_list = partial(_pictures, census, root=root, list_file=path, classes=classes)
            lines.append(
                f"  {path.relative_to(root)}: {of_list(fold.base):,} pictures to train on "
                f"({of_list(fold.base, drop_images_with=fold.novel):,} of them without a novel class), "
                f"{of_list(fold.novel):,} to validate on"
            )
    lines.append(f"pictures in which a class counts ({MINIMUM_CLASS_PIXELS:,} pixels or more), list by list:")
    for class_id, name in classes.items():
        counts = [
            sum(row.class_pixels.get(class_id, 0) >= MINIMUM_CLASS_PIXELS for row in census.rows)
            for census in censuses.values()
        ]
        lines.append(f"  {class_id} {name}: {', '.join(f'{count:,}' for count in counts)}")
    return "\n".join(lines)


def _pictures(census: Census, class_ids: Iterable[int], **of_list: Any) -> int:
    """As many as `split_of` takes of a list."""
    try:
        return len(split_of(census, class_ids, **of_list))
    except EmptySplitError:
        return 0
