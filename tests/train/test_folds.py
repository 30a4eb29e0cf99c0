"""Fold rules by name, and a user's own folds from a file with the sentence that every wrong one gets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from svf_fast.train.data.folds import FOLD_RULES, Fold, fold_of, read_folds


@pytest.mark.parametrize(
    ("rule", "index", "novel"),
    [
        ("pascal", 0, range(1, 6)),
        ("pascal", 1, range(6, 11)),
        ("pascal", 3, range(16, 21)),
        ("coco", 0, range(1, 81, 4)),
        ("coco", 3, range(4, 81, 4)),
        ("coco_contiguous", 0, range(1, 21)),
        ("coco_contiguous", 3, range(61, 81)),
    ],
)
def test_a_rule_says_which_classes_are_novel(rule: str, index: int, novel: range) -> None:
    fold = fold_of(rule, index)
    assert fold.novel == tuple(novel)
    assert fold.base == tuple(sorted(set(FOLD_RULES[rule].class_ids) - set(novel)))


@pytest.mark.parametrize("rule", FOLD_RULES)
def test_every_class_is_novel_in_one_fold(rule: str) -> None:
    folds = [fold_of(rule, index) for index in range(FOLD_RULES[rule].folds)]
    assert sorted(c for fold in folds for c in fold.novel) == list(FOLD_RULES[rule].class_ids)


@pytest.mark.parametrize(("rule", "index"), [("pascal", -1), ("coco", 4)])
def test_a_fold_outside_the_rule_is_refused(rule: str, index: int) -> None:
    with pytest.raises(ValueError, match=f"^fold is {index}; {rule} has the folds 0 to 3$"):
        fold_of(rule, index)
    with pytest.raises(ValueError, match=r"^rule is 'voc'; expected one of pascal, coco, coco_contiguous$"):
        fold_of("voc", 0)


def test_own_folds_may_have_any_sizes_and_leave_classes_always_base(tmp_path: Path) -> None:
    path = tmp_path / "folds.json"
    path.write_text('{"novel": [[7, 1], [3]]}')
    assert read_folds(path, (1, 3, 5, 7)) == (Fold((1, 7), (3, 5)), Fold((3,), (1, 5, 7)))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "folds.json is no JSON: Expecting property name enclosed in double quotes in line 1, column 2"),
        ("[[1], [2]]", "folds.json holds no folds; expected {"),
        ({}, "folds.json holds no folds; expected {"),
        ({"novel": []}, "folds.json holds no folds; expected {"),
        ({"novel": [[1]], "base": [[2]]}, "folds.json holds no folds; expected {"),
        ({"novel": [[1], 2]}, "folds.json: fold 1 is 2; expected a list of class ids, such as [1, 2]"),
        ({"novel": [[1], []]}, "folds.json: fold 1 is []; expected a list of class ids"),
        ({"novel": [[True]]}, "folds.json: fold 0 is [True]; expected a list of class ids"),
        ({"novel": [["one"]]}, "folds.json: fold 0 is ['one']; expected a list of class ids"),
        ({"novel": [[1], [9]]}, "folds.json: fold 1 has the class 9, which classes.txt does not list ([1, 2, 3])"),
        ({"novel": [[1], [2, 1]]}, "folds.json: class 1 is novel in fold 0 and again in fold 1"),
        ({"novel": [[1, 1]]}, "folds.json: class 1 is novel in fold 0 and again in fold 0"),
        ({"novel": [[1, 3, 2]]}, "folds.json: fold 0 leaves no base class to train on; all 3 are novel"),
    ],
)
def test_wrong_folds_get_one_sentence(tmp_path: Path, content: object, sentence: str) -> None:
    path = tmp_path / "folds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path}/{sentence}")) as caught:
        read_folds(path, (1, 2, 3))
    assert "\n" not in str(caught.value)


def test_folds_that_are_not_there_or_no_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folds\.json does not exist$"):
        read_folds(tmp_path / "folds.json", (1, 2))
    (tmp_path / "folds.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"folds\.json cannot be read as a JSON file$"):
        read_folds(tmp_path / "folds.json", (1, 2))
    (tmp_path / "folds.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"folds\.json cannot be read as a JSON file$"):
        read_folds(tmp_path / "folds.json", (1, 2))
