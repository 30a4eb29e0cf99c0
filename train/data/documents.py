"""JSON files of this project's own formats: written whole or not at all, read with a sentence for what is no such file.

Knows of a format its name and version only; what is inside is for the readers to check.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from svf_fast.train.files import write_atomically


def write_document(path: Path, format_name: str, version: int, content: dict[str, Any]) -> None:
    """`content` as compact JSON, headed by its format and version."""
    document = {"format": format_name, "version": version, **content}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_document(path: Path, format_name: str, version: int) -> dict[str, Any]:
    """What `write_document` wrote, head included. ValueError for a file of another format or version."""
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != format_name:
        raise ValueError(f"{path} is no {format_name}")
    if document.get("version") != version:
        raise ValueError(
            f"{path} has version {document.get('version')!r} of {format_name}; this program reads {version}"
        )
    return document


def read_json(path: Path) -> object:
    """Plain data. FileNotFoundError for a missing file, ValueError (with the place) for one that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except (OSError, ValueError, RecursionError):  # no UTF-8, or a number of more digits than Python reads
        raise ValueError(f"{path} cannot be read as a JSON file") from None


def is_whole_number(value: object) -> bool:
    """Whether a value of a JSON file is an integer; true and false are none."""
    return type(value) is int
