"""Which pictures Pascal-5i trains and validates on: the field's list rule, on names alone.

Training is what SBD labels and VOC counts as training (`ImageSets/Main/train.txt`), ascending, then what VOC 2012 itself segments for
training and is not yet there: 5,623 + 330 = 5,953 names. Validation is VOC's own list of 1,449 in its order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class PascalLists:
    """Names of pictures without folder and suffix; `notes` are sentences about what was not as expected."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    notes: tuple[str, ...]


def pascal_lists(
    *,
    sbd: Sequence[str],
    voc_train: Sequence[str],
    voc_val: Sequence[str],
    voc_main_train: Sequence[str] | None,
    sbd_train_noval: Sequence[str] | None,
) -> PascalLists:
    """The two lists, from the names in SBD's `train.txt` and `val.txt` together, in VOC's `ImageSets/Segmentation/train.txt` and `val.txt`,
    and in VOC's `ImageSets/Main/train.txt`.

    `sbd_train_noval`, the separately published list of SBD's part, is followed where there is one, in its order. ValueError when neither it
    nor `voc_main_train` is given.
    """
    notes: list[str] = []
    if voc_main_train is not None:
        by_rule = sorted(set(sbd) & set(voc_main_train))
    elif sbd_train_noval is not None:
        by_rule = list(sbd_train_noval)
    else:
        raise ValueError(
            "VOC's ImageSets/Main/train.txt is missing, and SBD's folder has no train_noval.txt in its place: without "
            "one of them it is not known which of SBD's pictures are for training"
        )
    first = by_rule
    if sbd_train_noval is not None:
        first = list(sbd_train_noval)
        if first != by_rule:
            notes.append(_disagreement(first, by_rule))
    train = list(dict.fromkeys([*first, *voc_train]))
    held_out = set(voc_val)
    if both := [name for name in train if name in held_out]:
        notes.append(f"{len(both)} pictures of validation were left out of training, the first is {both[0]}")
    return PascalLists(
        tuple(name for name in train if name not in held_out), tuple(dict.fromkeys(voc_val)), tuple(notes)
    )


def read_names(content: bytes, where: str) -> list[str]:
    """The names in a list of VOC or SBD, one a line. ValueError for anything else, or for none."""
    try:
        lines = content.decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{where} is no text file; names of pictures are expected, one a line") from None
    names = [line.strip() for line in lines if line.strip()]
    for number, name in enumerate(names, start=1):
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{where}: name {number} is {name!r}; letters, digits, - and _ are expected, one name a line"
            )
    if not names:
        raise ValueError(f"{where} is empty; names of pictures are expected, one a line")
    return names


def _disagreement(followed: Sequence[str], by_rule: Sequence[str]) -> str:
    only_followed, only_rule = set(followed) - set(by_rule), set(by_rule) - set(followed)
    if not only_followed and not only_rule:
        return "SBD's train_noval.txt has the rule's names in another order; its order was followed"
    return (
        f"SBD's train_noval.txt was followed and disagrees with the rule: {len(only_followed)} names are only in the file, "
        f"{len(only_rule)} only in what SBD labels of VOC's ImageSets/Main/train.txt"
    )
