"""From the text caches of PFENet, BAM and the SVF authors to a fold index: for users who have their lists and want the very same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from svf_fast.train.data.census import Census, census_path, take_census, write_census
from svf_fast.train.data.fold_index import read_fold_index, write_fold_index
from svf_fast.train.data.folds import FOLD_RULES, fold_of
from svf_fast.train.data.lists import read_classes
from svf_fast.train.data.published_index import read_published_index, split_of_published
from svf_fast.train.files import sha256_of, write_atomically
from svf_fast.train.progress import WorkProgress


def convert_published(
    data_list: str | Path, sub_class_file_list: str | Path, *, root: str | Path, out: str | Path, console: Console
) -> str:
    """Write the fold index `out` (.json), its list (.txt) and the list's census (.census.json) beside it, from
    `data_list_<fold>.txt` and `sub_class_file_list_<fold>.txt`, for the prepared folder `root`; returns what was written.

    Raises FileNotFoundError or ValueError when the caches and the folder do not fit, naming every picture; FileExistsError
    when another index or another list lies where they go.
    """
    root, out = Path(root).resolve(), Path(out).resolve()  # so that a list inside the root is known as such
    if out.suffix != ".json":
        raise ValueError(f"--out is {out}; expected a name that ends in .json")
    classes = read_classes(root / "classes.txt")
    index = read_published_index(Path(data_list), Path(sub_class_file_list), root)
    list_file = out.with_suffix(".txt")
    text = "".join(f"{image} {label}\n" for image, label in index.pairs).encode()
    if list_file.exists() and list_file.read_bytes() != text:
        raise FileExistsError(f"{list_file} is another list; remove it, or give another --out")
    with WorkProgress(console) as shown:
        count = shown.counter("reading labels", len(index.pairs))
        census = take_census(root, index.pairs, classes, named=str(data_list), on_progress=lambda done, _: count(done))
    split = split_of_published(index, census, root=root, list_file=list_file, classes=classes)
    if out.exists() and read_fold_index(out, root, classes) != split:
        raise FileExistsError(f"{out} is another index; remove it, or give another --out")
    rule, fold, dropped = _origin(split.class_ids, census)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(list_file, lambda file: file.write(text))
    write_census(census_path(list_file), census, sha256_of(list_file))
    write_fold_index(out, split, rule=rule, fold=fold, dropped=dropped)
    of = "classes of no known fold" if rule is None else f"fold {fold} of {rule}"
    without = f", without a picture of the classes {list(dropped)}" if dropped else ""
    return f"{out}: {len(split)} pictures for the classes {list(split.class_ids)} ({of}){without}"


def _origin(class_ids: Iterable[int], census: Census) -> tuple[str | None, int | None, tuple[int, ...]]:
    """Rule and fold of which these are the novel or the base classes; for base classes also the novel ones, if no picture
    shows one: then the list was made with the dataset trick."""
    asked = tuple(class_ids)
    for rule, known in FOLD_RULES.items():
        for index in range(known.folds):
            fold = fold_of(rule, index)
            if asked == fold.novel:
                return rule, index, ()
            if asked == fold.base:
                shows_novel = any(not row.class_pixels.keys().isdisjoint(fold.novel) for row in census.rows)
                return rule, index, () if shows_novel else fold.novel
    return None, None, ()
