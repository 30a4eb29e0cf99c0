"""The last part of every preparation, from label images and lists in the part folder to the whole folder: census, fold indexes, base
labels, the summary and its comparison with the field's counts. Knows no data set by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

import cv2

from svf_fast.train.data.base_labels import base_label_values
from svf_fast.train.data.census import (
    Census,
    CensusRow,
    Pair,
    census_path,
    changed_files,
    read_census,
    take_census,
    write_census,
)
from svf_fast.train.data.fold_index import write_fold_index
from svf_fast.train.data.folds import FOLD_RULES, Fold, fold_of
from svf_fast.train.data.lists import read_pairs
from svf_fast.train.data.reading import Bytes, read_label
from svf_fast.train.data.split import EmptySplitError, split_of
from svf_fast.train.files import sha256_of
from svf_fast.train.prepare.expected import Counted, Expected, FoldCounts
from svf_fast.train.prepare.problems import Problems
from svf_fast.train.prepare.report import mismatches, render
from svf_fast.train.prepare.work import run_jobs
from svf_fast.train.prepare.workspace import Workspace
from svf_fast.train.progress import WorkProgress

_PACKAGES = ("svf-fast", "numpy", "pillow", "opencv-python-headless", "scipy", "pycocotools")
_LISTS = ("train", "val")
_LABELS_A_JOB = 16
_PICTURES_A_JOB = 128


@dataclass(frozen=True)
class DataSet:
    """What a preparation has put into the part folder, and what it is to be compared with.

    `lists` are the (image, label) pairs of "train" and "val" relative to the folder, in the field's order; `rules` names of `FOLD_RULES`;
    `sources` what the user gave, for the summary; `notes` sentences that belong into it.
    """

    classes: Mapping[int, str]
    lists: Mapping[str, Sequence[Pair]]
    rules: Sequence[str]
    expected: Expected
    sources: Mapping[str, str]
    notes: Sequence[str] = ()


def finish(workspace: Workspace, data_set: DataSet, *, base_labels: bool, workers: int, shown: WorkProgress) -> str:
    """Complete the part folder and give it its name; returns the tables and sentences to show.

    Raises ValueError when a label in the part folder cannot be used, naming every one; OSError when the disk does not take it.
    """
    workspace.place("classes.txt", "".join(f"{c} {name}\n" for c, name in data_set.classes.items()).encode())
    censuses = {part: _census(workspace, data_set, part, workers, shown) for part in data_set.lists}
    counts: dict[str, tuple[FoldCounts, ...]] = {}
    notes = list(data_set.notes)
    for rule in data_set.rules:
        folds = [fold_of(rule, index) for index in range(FOLD_RULES[rule].folds)]
        counts[rule] = tuple(
            _write_fold(workspace, data_set, censuses, rule, index, fold, notes) for index, fold in enumerate(folds)
        )
        if base_labels:
            _place_base_labels(workspace, data_set, rule, folds, workers, shown)
    found = Expected({part: len(pairs) for part, pairs in data_set.lists.items()}, counts)
    differences = mismatches(found, data_set.expected, data_set.classes)
    workspace.place("summary.json", _summary(workspace, data_set, found, notes, differences))
    workspace.finish()
    return render(workspace.out, found, data_set.classes, notes, differences)


def already_prepared(out: Path) -> str:
    """What to say of a folder that is there, whole, from sources of the same names and sizes. ValueError names every picture and label
    that is no longer as it was written."""
    problems = Problems()
    for part in _LISTS:
        list_file = out / "lists" / f"{part}.txt"
        path = census_path(list_file)
        try:
            census = read_census(path, read_pairs(list_file), sha256_of(list_file))
        except (FileNotFoundError, ValueError) as error:
            problems.add(error)
            continue
        if census is None:
            problems.add(f"{list_file} is not the list that {path.name} was made for")
        else:
            problems.extend(changed_files(out, census.rows))
    problems.raise_all(f"{out} was prepared but has been changed since; remove it to have it made again")
    return f"{out} is already prepared, from files of the same names and sizes"


def _census(workspace: Workspace, data_set: DataSet, part: str, workers: int, shown: WorkProgress) -> Census:
    """The list as a file and its census. A stopped call's is not taken up: labels may have been replaced since."""
    pairs = data_set.lists[part]
    text = "".join(f"{image} {label}\n" for image, label in pairs).encode()
    name = f"lists/{part}.txt"
    workspace.place(name, text)
    path = census_path(workspace.part / name)
    jobs = [pairs[start : start + _PICTURES_A_JOB] for start in range(0, len(pairs), _PICTURES_A_JOB)]
    count = shown.counter(f"census of {part}", len(pairs))
    problems = Problems()
    rows = run_jobs(
        partial(_rows, workspace.part, tuple(data_set.classes)),
        jobs,
        workers=workers,
        problems=problems,
        progress=lambda done: count(min(done * _PICTURES_A_JOB, len(pairs))),
    )
    problems.raise_all(f"{name} cannot be used; remove {workspace.part} to have its files made again")
    census = Census(tuple(row for some in rows for row in some or ()))
    with workspace.writing(path.relative_to(workspace.part).as_posix()):
        write_census(path, census, sha256_of(workspace.part / name))
    return census


def _rows(root: Path, class_ids: Sequence[int], pairs: Sequence[Pair]) -> tuple[CensusRow, ...]:
    return take_census(root, pairs, class_ids, workers=1).rows


def _write_fold(
    workspace: Workspace,
    data_set: DataSet,
    censuses: Mapping[str, Census],
    rule: str,
    index: int,
    fold: Fold,
    notes: list[str],
) -> FoldCounts:
    """The three indexes of a fold and their counts. A split without a picture gets no index, but a note."""
    counted: dict[str, Counted] = {}
    for kind, part, class_ids, dropped in (
        ("train_trick", "train", fold.base, fold.novel),
        ("train", "train", fold.base, ()),
        ("val", "val", fold.novel, ()),
    ):
        list_file = workspace.part / "lists" / f"{part}.txt"
        name = f"folds/{rule}/fold{index}_{kind}.json"
        try:
            split = split_of(
                censuses[part],
                class_ids,
                root=workspace.part,
                list_file=list_file,
                classes=data_set.classes,
                drop_images_with=dropped,
            )
        except EmptySplitError:
            notes.append(f"{name} was not written: no picture of lists/{part}.txt counts for it")
            counted[kind] = Counted(0, dict.fromkeys(class_ids, 0))
            continue
        with workspace.writing(name) as path:
            write_fold_index(path, split, rule=rule, fold=index, dropped=dropped)
        counted[kind] = Counted(len(split), {c: len(files) for c, files in split.files_of_class.items()})
    return counted


def _place_base_labels(
    workspace: Workspace, data_set: DataSet, rule: str, folds: Sequence[Fold], workers: int, shown: WorkProgress
) -> None:
    """A grey PNG a picture and fold, values 0 … number of base classes and void, as BAM's code reads them."""
    tables = [base_label_values(fold.base) for fold in folds]
    targets = [
        (label, [f"base_labels/{rule}/{part}/{index}/{PurePosixPath(label).name}" for index in range(len(folds))])
        for part, pairs in data_set.lists.items()
        for _, label in pairs
    ]
    missing = [(label, names) for label, names in targets if not all(map(workspace.has, names))]
    jobs = [missing[start : start + _LABELS_A_JOB] for start in range(0, len(missing), _LABELS_A_JOB)]
    problems = Problems()
    run_jobs(
        partial(_place_some_base_labels, workspace, tables),
        jobs,
        workers=workers,
        problems=problems,
        progress=shown.counter(f"base labels of {rule}, a step for {_LABELS_A_JOB} pictures", len(jobs)),
    )
    problems.raise_all("Label images changed while base labels were made")


def _place_some_base_labels(workspace: Workspace, tables: Sequence[Bytes], job: list[tuple[str, list[str]]]) -> None:
    for label, names in job:
        values = read_label(workspace.part / label)
        for table, name in zip(tables, names, strict=True):
            # OpenCV's encoder takes a third of the time of Pillow's, and these files need no palette
            workspace.place(name, cv2.imencode(".png", cv2.LUT(values, table))[1].tobytes())


def _summary(
    workspace: Workspace, data_set: DataSet, found: Expected, notes: Sequence[str], differences: Sequence[str]
) -> bytes:
    """No dates in it: a stopped call ends with the same file."""
    lists = {
        part: {"pictures": length, "sha256": sha256_of(workspace.part / "lists" / f"{part}.txt")}
        for part, length in found.list_lengths.items()
    }
    content = {
        "lists": lists,
        "folds": {
            rule: [{kind: asdict(c) for kind, c in fold.items()} for fold in folds]
            for rule, folds in found.folds.items()
        },
        "agrees_with_the_field": not differences,
        "mismatches": list(differences),
        "notes": list(notes),
        "sources": {name: str(Path(path).absolute()) for name, path in data_set.sources.items()},
        "versions": {package: found for package in _PACKAGES if (found := _version(package)) is not None},
    }
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
