"""Which modules of a model a conversion means: name prefixes, a regular expression or a predicate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import nn

Targets = str | Iterable[str] | re.Pattern[str] | Callable[[str, nn.Module], bool] | None


def chosen_modules(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """The modules within the targets, by name (the root's name is the empty string), shared ones once.

    targets: None for all; an iterable of module-name prefixes ("layer2" means layer2 and everything below it); a regular
    expression (str or compiled) searched in the name; or a predicate (name, module) -> bool.
    ValueError when a prefix, or the whole of them, matches nothing.
    """
    names = dict(model.named_modules())
    if isinstance(targets, nn.Module) or not (
        targets is None or callable(targets) or isinstance(targets, (Iterable, re.Pattern))
    ):
        raise TypeError(
            "targets must be None, a list of module-name prefixes, a regular expression or a predicate (name, module) -> bool, "
            f"got {type(targets).__name__}"
        )
    if targets is None:
        return names
    if isinstance(targets, (str, re.Pattern)):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"targets is not a valid regular expression: {targets!r} ({error})") from None
        chosen = {n: m for n, m in names.items() if n and pattern.search(n)}
        given = f"the regular expression {pattern.pattern!r}"
    elif callable(targets):
        chosen = {n: m for n, m in names.items() if targets(n, m)}
        given = "the predicate"
    else:
        prefixes = list(targets)
        for prefix in prefixes:
            if not isinstance(prefix, str):
                raise TypeError(f"targets must hold module-name prefixes, got {prefix!r}")
            if not any(_is_under(n, prefix) for n in names):
                children = ", ".join(name for name, _ in model.named_children())
                raise ValueError(
                    f"targets: no module is named {prefix!r} or lies under it; the model has {children or 'no children'}"
                )
        chosen = {n: m for n, m in names.items() if any(_is_under(n, p) for p in prefixes)}
        given = f"the prefixes {prefixes}"
    if not chosen:
        raise ValueError(f"targets: {given} matches no module of {type(model).__name__}")
    return chosen


def _is_under(name: str, prefix: str) -> bool:
    return prefix == "" or name == prefix or name.startswith(prefix + ".")
