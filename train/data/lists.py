"""The text files of a data folder: `classes.txt`, and lists with an `image label` pair a line, relative to the root.

Knows names, not what stands behind them.
"""

from __future__ import annotations

from pathlib import Path

from svf_fast.train.data import BACKGROUND, VOID

_LONGEST_NUMBER = 9  # digits


def read_classes(path: Path) -> dict[int, str]:
    """Class id → name from a file of `id name` lines; id 0 (background) may be listed and is left out."""
    classes: dict[int, str] = {}
    for number, line in _numbered_lines(path):
        identifier, _, name = line.partition(" ")
        if not is_written_number(identifier) or not name.strip():
            raise ValueError(f"{path} line {number} is {line!r}; expected `id name`")
        if int(identifier) in classes:
            raise ValueError(f"{path} line {number} gives class {identifier} a second time")
        classes[int(identifier)] = name.strip()
    classes.pop(BACKGROUND, None)
    if not classes:
        raise ValueError(f"{path} lists no class besides the background")
    for class_id in classes:
        if class_id >= VOID:
            raise ValueError(
                f"{path} holds the class id {class_id}; expected 1 to {VOID - 1} (0 is background, {VOID} void)"
            )
    return classes


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The (image, label) pairs of a list file, in its order. ValueError names the line of one that is malformed or
    repeated."""
    first_line_of: dict[tuple[str, str], int] = {}
    for number, line in _numbered_lines(path):
        parts = line.split()
        if len(parts) != 2:
            raise ValueError(
                f"{path} line {number} is {line!r}; expected `image label`, two paths with a space between"
            )
        pair = (parts[0], parts[1])
        if pair in first_line_of:
            raise ValueError(f"{path} line {number} repeats line {first_line_of[pair]} ({line!r})")
        first_line_of[pair] = number
    if not first_line_of:
        raise ValueError(f"{path} is empty; expected one `image label` pair a line")
    return list(first_line_of)


def is_written_number(text: str) -> bool:
    """Whether a text is a whole number from 0, short enough for `int`, which refuses thousands of digits."""
    return text.isdecimal() and len(text) <= _LONGEST_NUMBER


def _numbered_lines(path: Path) -> list[tuple[int, str]]:
    try:
        # some editors put a mark in front of UTF-8
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path} cannot be read as a text file") from None
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
