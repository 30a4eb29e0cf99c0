"""Plain data (what YAML and the command line give) into frozen dataclasses and back, checked at the border. The
dataclasses are the schema: their annotations say what a key takes. Knows no key by name."""

import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Section = TypeVar("Section")
PlainData = dict[str, Any]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one sentence that names the key."""


def from_plain(schema: type[Section], data: object, key: str = "") -> Section:
    """``data`` (nested mappings) as an instance of the dataclass ``schema``; ``key`` is where it stands, for messages.

    Raises ConfigError on a key that the schema does not have (the nearest one is named), a missing one, a value of
    another type, or one that the dataclass itself refuses.
    """
    known = _hints(schema)
    data = _known_keys(data, known, key)
    values: PlainData = {}
    for field in fields(schema):  # type: ignore[arg-type]
        where = _join(key, field.name)
        if field.name in data:
            values[field.name] = _convert(known[field.name], data[field.name], where)
        elif is_dataclass(known[field.name]):
            values[field.name] = from_plain(known[field.name], {}, where)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{where} is not set: give it in the file or as {where}=...")
    try:
        return schema(**values)
    except ConfigError:
        raise
    except ValueError as error:  # the dataclass's own checks start their sentence with the field's name
        raise ConfigError(_join(key, str(error))) from error


def require_fit(schema: type, data: object, key: str = "") -> None:
    """ConfigError, as of :func:`from_plain`, unless each key of ``data`` is one of ``schema`` with a value of its type.
    Keys may be missing: this is for what other data are laid over or under."""
    known = _hints(schema)
    for name, value in _known_keys(data, known, key).items():
        where = _join(key, name)
        if not is_dataclass(known[name]):
            _convert(known[name], value, where)
        elif value is not None:
            require_fit(known[name], value, where)


def to_plain(section: object) -> Any:
    """The inverse of :func:`from_plain`: nested dictionaries, lists and plain values that YAML can hold."""
    if is_dataclass(section) and not isinstance(section, type):
        return {field.name: to_plain(getattr(section, field.name)) for field in fields(section)}
    if isinstance(section, tuple):
        return [to_plain(item) for item in section]
    return section


def flatten(data: Mapping[str, Any], key: str = "") -> PlainData:
    """Nested mappings as one mapping with dotted keys."""
    flat: PlainData = {}
    for name, value in data.items():
        flat.update(flatten(value, _join(key, name)) if isinstance(value, Mapping) else {_join(key, name): value})
    return flat


def override(schema: type, data: PlainData, assignment: str) -> None:
    """Set one dotted key of ``data`` in place from ``key=value``; the schema's type of the key says how the text reads.

    Raises ConfigError on text without ``=``, an unknown key (the nearest one is named) or text that does not read as
    the key's type.
    """
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"{assignment!r} is not key=value")
    hints = dict(leaf_hints(schema))
    below = [name for name in hints if name.startswith(f"{key}.")]
    if below:
        raise ConfigError(f"{key} is a section, not a key: it has {', '.join(below)}")
    if key not in hints:
        raise ConfigError(_unknown(key, list(hints)))
    *sections, name = key.split(".")
    for section in sections:
        # an empty section in a file is None
        if not isinstance(data.get(section), dict):
            data[section] = {}
        data = data[section]
    data[name] = _read_text(hints[key], text)


def leaf_hints(schema: type, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key below ``schema`` with its type."""
    for name, hint in _hints(schema).items():
        if is_dataclass(hint):
            yield from leaf_hints(hint, _join(key, name))  # type: ignore[arg-type]
        else:
            yield _join(key, name), hint


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that ``name`` most likely meant, compared whole and by its last part; None if nothing is near."""
    whole = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    if whole:
        return whole[0]
    by_last_part = {other.rpartition(".")[2]: other for other in known}
    part = difflib.get_close_matches(name.rpartition(".")[2], list(by_last_part), n=1, cutoff=0.6)
    return by_last_part[part[0]] if part else None


def require(section: object, name: str, is_valid: object, expected: str) -> None:
    """For a section's own checks: ValueError that names the field, its value and what was ``expected``."""
    if not is_valid:
        raise ValueError(f"{name} is {getattr(section, name)!r}, expected {expected}")


def require_rate(section: object, name: str) -> None:
    """ValueError unless the field is a finite number, 0 or more."""
    value = getattr(section, name)
    require(section, name, math.isfinite(value) and value >= 0, "a number, 0 or more")


def require_one_of(section: object, first: str, second: str) -> None:
    """ValueError unless exactly one of two fields is set, to more than 0."""
    values = getattr(section, first), getattr(section, second)
    if all(value is None for value in values):
        raise ValueError(f"{first} is not set: give it, or {second}")
    if all(value is not None for value in values):
        raise ValueError(f"{first} is set, and so is {second}: leave one out, on the command line with =null")
    for name in (first, second):
        value = getattr(section, name)
        require(section, name, value is None or value > 0, "more than 0")


def _hints(schema: type) -> dict[str, Any]:
    hints = get_type_hints(schema)
    return {field.name: hints[field.name] for field in fields(schema)}


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _known_keys(data: object, known: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{key or 'the configuration'} is {_shown(data)}, expected keys with values")
    for name in data:
        if name not in known:
            raise ConfigError(_unknown(_join(key, str(name)), [_join(key, other) for other in known]))
    return data


def _unknown(key: str, known: list[str]) -> str:
    suggestion = nearest(key, known)
    hint = f"did you mean {suggestion}?" if suggestion else f"expected one of {', '.join(known)}"
    return f"unknown key {key}: {hint}"


def _shown(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _convert(hint: Any, value: object, key: str) -> Any:
    origin = get_origin(hint)
    if is_dataclass(hint):
        # a section written with nothing under it holds its defaults
        return from_plain(hint, {} if value is None else value, key)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = (option for option in get_args(hint) if option is not type(None))
        return _convert(inner, value, key)
    if origin is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise ConfigError(f"{key} is {value!r}, expected one of {', '.join(map(repr, choices))}")
        return value
    if origin is tuple:
        return _convert_tuple(get_args(hint), value, key)
    if hint is float and isinstance(value, str):
        value = _number(value)  # YAML 1.1 reads 1e-4 as text
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{key} is {_shown(value)}, expected {_named(hint)}")
    return value


def _convert_tuple(hints: tuple[Any, ...], value: object, key: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{key} is {_shown(value)}, expected a list")
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(value) != len(hints):
        raise ConfigError(f"{key} has {len(value)} values, expected {len(hints)}")
    return tuple(_convert(hint, item, key) for hint, item in zip(hints, value, strict=True))


def _read_text(hint: Any, text: str) -> object:
    """Text from the command line as plain data; what does not read as the type stays so for ``_convert`` to refuse."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if text in ("", "null", "none"):
            return None
        (hint,) = (option for option in get_args(hint) if option is not type(None))
        return _read_text(hint, text)
    if hint is str:
        return text
    if origin is Literal:
        # not through YAML, which would turn a choice named "on" into True
        return next((choice for choice in get_args(hint) if str(choice) == text), text)
    if hint is float:
        return _number(text)
    if hint is int:
        # not through YAML, which reads 010 as 8 and 1:30 as 90
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else text
    if origin is tuple and not text.startswith("["):
        text = f"[{text}]"
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def _named(hint: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, hint.__name__)
