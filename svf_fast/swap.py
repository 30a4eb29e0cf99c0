"""Changing the behaviour of a module in place by changing its class, as torch.nn.utils.parametrize does: the object, its
children, its state-dict keys and `isinstance` stay, deepcopy and pickle work, and the change can be undone."""

from __future__ import annotations

from typing import Any

from torch import nn


class Swapped:
    """Mixin of a swapped class; `_svf_base` is the module's own class."""

    _svf_base: type[nn.Module]
    _svf_mixin: type[Swapped]

    def __getstate__(self) -> Any:
        own = getattr(super(), "__getstate__", None)  # every object has one from Python 3.11 on
        state = self.__dict__ if own is None else own()
        return dict(state) if isinstance(state, dict) else state

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the class is made at run time: pickle its two halves instead
        return _new_instance, (self._svf_mixin, self._svf_base), self.__getstate__()


_classes: dict[tuple[type, type], Any] = {}


def _swapped_class(mixin: type[Swapped], base: type[nn.Module]) -> Any:
    """The class that puts `mixin` before `base`; one object a pair, so that `type(a) is type(b)` stays true."""
    if (mixin, base) not in _classes:
        namespace = {"_svf_mixin": mixin, "_svf_base": base, "__module__": base.__module__, "__doc__": base.__doc__}
        _classes[mixin, base] = type(base.__name__, (mixin, base), namespace)
    return _classes[mixin, base]


def _new_instance(mixin: type[Swapped], base: type[nn.Module]) -> nn.Module:
    cls = _swapped_class(mixin, base)
    return cls.__new__(cls)


def swap(module: nn.Module, mixin: type[Swapped]) -> None:
    """Puts `mixin` before the module's class."""
    module.__class__ = _swapped_class(mixin, type(module))


def restore(module: nn.Module) -> None:
    """Gives a swapped module its own class back."""
    assert isinstance(module, Swapped)
    module.__class__ = module._svf_base  # type: ignore[assignment]
