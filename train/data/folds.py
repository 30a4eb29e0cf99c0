"""Which classes of a data set are novel and which are base: the field's rules by name, and a user's own folds from a file.

Knows class ids only, no pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from svf_fast.train.data.documents import is_whole_number, read_json

_OWN_FOLDS_IN_WORDS = '{"novel": [[1, 2], [3], …]}, the novel class ids of every fold'


@dataclass(frozen=True)
class Fold:
    """Which classes are novel (met only in validation) and which are base (trained on), as ascending 1-based ids."""

    novel: tuple[int, ...]
    base: tuple[int, ...]


@dataclass(frozen=True)
class FoldRule:
    """Classes 1 … `classes` in `folds` folds of one size: runs of neighbouring ids, or every `folds`-th id."""

    classes: int
    folds: int
    is_interleaved: bool

    @property
    def class_ids(self) -> range:
        return range(1, self.classes + 1)

    def novel(self, index: int) -> tuple[int, ...]:
        """The novel classes of fold `index`, which must exist."""
        if self.is_interleaved:
            return tuple(self.class_ids[index :: self.folds])
        size = self.classes // self.folds
        return tuple(self.class_ids[size * index : size * (index + 1)])


FOLD_RULES: Mapping[str, FoldRule] = MappingProxyType(
    {
        "pascal": FoldRule(classes=20, folds=4, is_interleaved=False),  # Pascal-5i: 5i+1 … 5i+5
        "coco": FoldRule(classes=80, folds=4, is_interleaved=True),  # COCO-20i as it is used: i+1, i+5, …, i+77
        "coco_contiguous": FoldRule(classes=80, folds=4, is_interleaved=False),  # 20i+1 … 20i+20
    }
)


def fold_of(rule: str, index: int) -> Fold:
    """Fold `index` (from 0) of a rule in `FOLD_RULES`. ValueError when the rule has no such fold."""
    if rule not in FOLD_RULES:
        raise ValueError(f"rule is {rule!r}; expected one of {', '.join(FOLD_RULES)}")
    known = FOLD_RULES[rule]
    if index not in range(known.folds):
        raise ValueError(f"fold is {index}; {rule} has the folds 0 to {known.folds - 1}")
    return _fold(known.novel(index), known.class_ids)


def read_folds(path: str | Path, classes: Iterable[int]) -> tuple[Fold, ...]:
    """A user's own folds of `classes` (ids) from a JSON file `{"novel": [[1, 2], [3], …]}`, the novel ids of every fold.

    Classes that are novel in no fold are base in all. Raises FileNotFoundError, or ValueError unless every id is a known
    class, novel in at most one fold, and every fold has a novel and a base class.
    """
    path, known = Path(path), sorted(set(classes))
    document = read_json(path)
    groups = document.get("novel") if isinstance(document, dict) and document.keys() == {"novel"} else None
    if not isinstance(groups, list) or not groups:
        raise ValueError(f"{path} holds no folds; expected {_OWN_FOLDS_IN_WORDS}")
    fold_of_class: dict[int, int] = {}
    for index, ids in enumerate(groups):
        if not isinstance(ids, list) or not ids or not all(map(is_whole_number, ids)):
            raise ValueError(f"{path}: fold {index} is {ids!r}; expected a list of class ids, such as [1, 2]")
        for class_id in ids:
            if class_id not in known:
                raise ValueError(
                    f"{path}: fold {index} has the class {class_id}, which classes.txt does not list ({known})"
                )
            if class_id in fold_of_class:
                raise ValueError(
                    f"{path}: class {class_id} is novel in fold {fold_of_class[class_id]} and again in fold {index}"
                )
            fold_of_class[class_id] = index
        if len(ids) == len(known):
            raise ValueError(f"{path}: fold {index} leaves no base class to train on; all {len(known)} are novel")
    return tuple(_fold(ids, known) for ids in groups)


def _fold(novel: Iterable[int], classes: Iterable[int]) -> Fold:
    ids = tuple(sorted(novel))
    return Fold(ids, tuple(c for c in classes if c not in ids))
