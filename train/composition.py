"""Configurations as compositions: the shipped parts and whole configurations by name, files of one's own, and how they are laid
over each other. Stands below train/config.py; knows the key ``compose`` and no other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import yaml

from svf_fast.train.schema import ConfigError, PlainData, nearest

SHIPPED_FOLDER = Path(__file__).resolve().parent / "configs"
CONFIGURATIONS = "configurations"  # the shipped file whose entries are whole
PART_FILES = ("data", "backbones", "methods", "recipes")
COMPOSE = "compose"
LISTED = "svf-fast config lists them"


@dataclass(frozen=True)
class Entry:
    """What a name stands for: an entry of a shipped file, or a file of one's own. ``origin`` says where it is written,
    ``about`` is the first line of the comment above it; file names in it are relative to ``folder``."""

    name: str
    origin: str
    about: str
    content: object
    folder: Path


@dataclass(frozen=True)
class Layer:
    """Sections as they stand in one place, without what they are composed of."""

    origin: str
    sections: PlainData


@cache
def shipped() -> Mapping[str, Mapping[str, Entry]]:
    """All entries by name, by the shipped file that they stand in: the whole configurations first, then the parts."""
    files = [SHIPPED_FOLDER / f"{name}.yaml" for name in (CONFIGURATIONS, *(f"parts/{name}" for name in PART_FILES))]
    return {file.stem: {entry.name: entry for entry in _entries(file)} for file in files}


def shipped_configs() -> list[str]:
    """Names of whole configurations."""
    return sorted(shipped()[CONFIGURATIONS])


def shipped_parts() -> list[str]:
    """Names that configurations can be composed of."""
    return sorted(_parts())


def layers_of(name: str | Path) -> list[Layer]:
    """What ``name`` is made of, in order: later layers win. It is a YAML file, the name of a shipped configuration, or
    several names of parts, configurations or files joined with ``+``.

    Raises FileNotFoundError when there is nothing of that name (the nearest one is told), ConfigError when a file is
    not readable, is no mapping, or composes itself.
    """
    text = str(name)
    if Path(text).is_file():
        return list(_layers(_own_file(Path(text))))
    if "+" in text:
        pieces = (_named(piece, Path(), "there is no configuration part {!r}") for piece in text.split("+"))
        return [layer for piece in pieces for layer in _layers(piece)]
    entry = shipped()[CONFIGURATIONS].get(text) or _parts().get(text)
    if entry is None:
        raise FileNotFoundError(
            f"no configuration file {text}, and no shipped one of that name: {_hint(text, shipped_configs())}"
        )
    return list(_layers(entry))


def names_within(names: Sequence[str]) -> set[str]:
    """Shipped parts and configurations by name, and all that they are composed of."""
    found: set[str] = set()
    for name in names:
        entry = _parts().get(name) or shipped()[CONFIGURATIONS].get(name)
        if entry is not None and isinstance(entry.content, dict):
            found |= names_within(entry.content.get(COMPOSE, []))
        found.add(name)
    return found


def merged(layers: Sequence[Layer]) -> PlainData:
    """The layers laid over each other, key by key within a section."""
    data: PlainData = {}
    for layer in layers:
        for name, section in layer.sections.items():
            below = data.get(name)
            if isinstance(section, dict):
                data[name] = {**(below if isinstance(below, dict) else {}), **section}
            elif section is not None or name not in data:  # a section with nothing under it changes nothing
                data[name] = section
    return data


def _layers(entry: Entry, above: tuple[str, ...] = ()) -> Iterator[Layer]:
    origin, content = entry.origin, entry.content
    if origin in above:
        raise ConfigError(f"a configuration composes itself: {' composes '.join([*above, origin])}")
    if not isinstance(content, dict):
        raise ConfigError(f"{origin} holds no sections, but {content!r}" if content else f"{origin} holds no sections")
    names = content.get(COMPOSE, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{origin}: {COMPOSE} is {names!r}, expected a list of names of parts and files")
    for name in names:
        part = _named(name, entry.folder, f"{origin} composes {{!r}}, which is no part and no file")
        yield from _layers(part, (*above, origin))
    yield Layer(origin, {key: value for key, value in content.items() if key != COMPOSE})


def _named(name: str, folder: Path, mistake: str) -> Entry:
    """A name among others: parts go before configurations, and both before files."""
    entry = _parts().get(name) or shipped()[CONFIGURATIONS].get(name)
    if entry is not None:
        return entry
    if (folder / name).is_file():
        return _own_file(folder / name)
    raise FileNotFoundError(f"{mistake.format(name)}: {_hint(name, [*shipped_parts(), *shipped_configs()])}")


def _hint(name: str, known: Sequence[str]) -> str:
    near = nearest(name, known)
    return f"did you mean {near}?" if near else LISTED


def _own_file(path: Path) -> Entry:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from error
    # "a/../a/run.yaml" is "a/run.yaml": who composes itself is found by its name
    shown = str(path) if ".." not in path.parts else str(path.resolve())
    return Entry(path.stem, shown, "", content, path.parent)


@cache
def _parts() -> dict[str, Entry]:
    return {name: entry for file in PART_FILES for name, entry in shipped()[file].items()}


def _entries(file: Path) -> Iterator[Entry]:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    loader = yaml.SafeLoader(text)
    for key, value in cast(yaml.MappingNode, loader.get_single_node()).value:
        content = loader.construct_object(value, deep=True)
        first = key.start_mark.line
        while lines[first - 1].startswith("#"):
            first -= 1
        about = lines[first].lstrip("# ")
        yield Entry(
            key.value, f"{key.value} (in {file.relative_to(SHIPPED_FOLDER.parent)})", about, content, file.parent
        )
