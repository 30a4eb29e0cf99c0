"""The census of a list: what it holds, when it is believed, and what happens to a damaged one."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from voc_folders import CLASSES, draw, line, write_folder, write_label, write_picture

from svf_fast.train.data import census as census_module
from svf_fast.train.data.census import Census, census_path, read_census, take_census, write_census
from svf_fast.train.data.lists import read_pairs
from svf_fast.train.data.voc import VOCFolder
from svf_fast.train.files import sha256_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three pictures with a census beside their list."""
    root = write_folder(
        tmp_path,
        {
            "a": draw(80, 90, [(1, 0, 0, 50, 50), (255, 70, 0, 10, 90)]),
            "b": draw(70, 60, [(2, 0, 0, 50, 50), (4, 60, 0, 1, 3)]),
            "c": draw(64, 64, [(3, 0, 0, 64, 64)]),
        },
    )
    write_census(census_path(root / "list.txt"), taken(root), sha256_of(root / "list.txt"))
    return root


def taken(root: Path, earlier: Census | None = None) -> Census:
    return take_census(root, read_pairs(root / "list.txt"), CLASSES, earlier=earlier)


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a label was read")

    monkeypatch.setattr(census_module, "_read_row", read)


def test_a_row_holds_sizes_and_the_pixels_of_every_class(root: Path) -> None:
    rows = taken(root).rows
    assert [(row.image, row.label) for row in rows] == read_pairs(root / "list.txt")
    assert [row.size for row in rows] == [(80, 90), (70, 60), (64, 64)]
    assert [dict(row.class_pixels) for row in rows] == [{1: 2500}, {2: 2500, 4: 3}, {3: 4096}]
    assert rows[1].file_bytes == tuple((root / name).stat().st_size for name in line("b").split())


def test_a_census_survives_its_file(root: Path) -> None:
    path = census_path(root / "list.txt")
    assert path.name == "list.census.json"
    pairs = read_pairs(root / "list.txt")
    assert read_census(path, pairs, sha256_of(root / "list.txt")) == taken(root)
    assert read_census(path, pairs, "of another list") is None


def test_a_folder_with_a_census_reads_no_label(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = VOCFolder(root)
    expected = [folder.split("list.txt", (1, 2)), folder.whole("list.txt", (1, 4))]
    forbid_reading(monkeypatch)
    assert [folder.split("list.txt", (1, 2)), folder.whole("list.txt", (1, 4))] == expected


def test_only_what_changed_in_size_is_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_label(root / "SegmentationClass/b.png", np.random.default_rng(0).integers(1, 4, (70, 60), dtype=np.uint8))
    read: list[str] = []
    read_row = census_module._read_row

    def noted(root: str, pair: tuple[str, str], known: frozenset[int]) -> census_module.CensusRow:
        read.append(Path(pair[0]).stem)
        return read_row(root, pair, known)

    monkeypatch.setattr(census_module, "_read_row", noted)
    assert set(VOCFolder(root).whole("list.txt", (1,)).entries[1].present_classes) == {1, 2, 3}
    assert read == ["b"]


def test_another_list_is_read_from_its_labels(root: Path) -> None:
    (root / "list.txt").write_text(line("c") + "\n" + line("a") + "\n")
    assert [e.present_classes for e in VOCFolder(root).whole("list.txt", (1,)).entries] == [(3,), (1,)]


def test_a_census_does_not_hide_what_went_missing_or_unknown(root: Path) -> None:
    (root / "JPEGImages/a.jpg").unlink()
    write_picture(root / "JPEGImages/c.jpg", 80, 64)
    with pytest.raises(ValueError, match=r"^2 of the 3 lines of .*list\.txt cannot be used:") as caught:
        VOCFolder(root).split("list.txt", (1,))
    assert "a.jpg does not exist" in str(caught.value)
    assert "c.jpg is 64x80 pixels" in str(caught.value)
    write_folder(root, {"a": draw(80, 90, [(1, 0, 0, 50, 50)]), "b": draw(70, 60, [(4, 0, 0, 1, 3)])})
    write_census(census_path(root / "list.txt"), taken(root), sha256_of(root / "list.txt"))
    (root / "classes.txt").write_text("1 one\n2 two\n")
    with pytest.raises(ValueError, match=r"b\.png holds the values \[4\], which are no class ids"):
        VOCFolder(root).split("list.txt", (1,))


def test_progress_counts_to_the_end_and_labels_are_read_in_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path, {f"p{i}": draw(9, 8, [(1, 0, 0, 2, 2)]) for i in range(70)})
    readers: set[str] = set()
    read_row = census_module._read_row

    def noted(*arguments: Any) -> census_module.CensusRow:
        readers.add(threading.current_thread().name)
        return read_row(*arguments)

    monkeypatch.setattr(census_module, "_read_row", noted)
    seen: list[tuple[int, int]] = []
    rows = take_census(
        root, read_pairs(root / "list.txt"), CLASSES, on_progress=lambda done, total: seen.append((done, total))
    ).rows
    assert [Path(row.image).stem for row in rows] == [f"p{i}" for i in range(70)]
    assert seen == [(32, 70), (64, 70), (70, 70)]
    assert threading.current_thread().name not in readers
    readers.clear()
    take_census(root, read_pairs(root / "list.txt"), CLASSES, workers=1)
    assert len(readers) == 1


class Interrupted(list[tuple[str, str]]):
    """Pairs whose second half cannot be queued any more."""

    def __getitem__(self, part: Any) -> Any:
        if part.start >= len(self) // 2:
            raise KeyboardInterrupt
        return super().__getitem__(part)


@pytest.mark.parametrize("pairs", [list, Interrupted], ids=["in the progress", "while tasks are queued"])
def test_an_interruption_leaves_the_other_pictures_unread(
    pairs: type[list[tuple[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def slow(root: str, pair: tuple[str, str], known: frozenset[int]) -> census_module.CensusRow:
        read.append(pair[0])
        time.sleep(2e-3)
        return census_module.CensusRow(*pair, (1, 1), (1, 1), {})

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(census_module, "_read_row", slow)
    with pytest.raises(KeyboardInterrupt):
        take_census(tmp_path, pairs(("a.jpg", f"{n}.png") for n in range(1280)), CLASSES, on_progress=interrupted)
    assert len(read) <= 320


@pytest.mark.parametrize("part", [2**24, 100], ids=["as a whole", "in parts"])
def test_pixels_are_counted_exactly(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census_module, "_EXACT_IN_FLOAT32", part)
    label = np.random.default_rng(0).integers(0, 256, (37, 41), dtype=np.uint8)
    label[:, 9:30] = 7
    counts = census_module._pixels_of_values(label)
    assert counts.dtype == np.int64
    assert counts.tolist() == [int((label == value).sum()) for value in range(256)]


def changed_row(position: int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["pictures"][1][position] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.pop("format"), "is no svf_fast census"),
        (lambda d: d.update(version=7), "has version 7 of svf_fast census; this program reads 1"),
        (lambda d: d.pop("pictures"), "does not hold the 3 pictures of its list; remove list.census.json"),
        (lambda d: d["pictures"].pop(), "does not hold the 3 pictures of its list"),
        (lambda d: d["pictures"][1].pop(), "picture 2 is not [image, label, height, width, bytes of the image, "),
        (changed_row(0, "JPEGImages/c.jpg"), "] of JPEGImages/b.jpg; remove list.census.json"),
        (changed_row(2, 70.0), "picture 2 is not"),
        (changed_row(4, -1), "picture 2 is not"),
        (changed_row(6, {"2": True}), "picture 2 is not"),
        (changed_row(6, {"0": 5}), "picture 2 is not"),
        (changed_row(6, {"two": 5}), "picture 2 is not"),
        (changed_row(6, {"9" * 5000: 5}), "picture 2 is not"),
        (changed_row(6, {"2": 4201}), "picture 2 is not"),
        (changed_row(6, None), "picture 2 is not"),
    ],
)
def test_a_damaged_census_is_refused(root: Path, change: Callable[[dict[str, Any]], None], sentence: str) -> None:
    path = root / "list.census.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        VOCFolder(root).split("list.txt", (1,))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_census_cut_short_is_refused(root: Path) -> None:
    path = root / "list.census.json"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match=r"list\.census\.json is no JSON: .* in line 1, column"):
        VOCFolder(root).split("list.txt", (1,))
