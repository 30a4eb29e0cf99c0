"""Finding conv → BatchNorm → (+ residual) → ReLU in a module's forward with torch.fx, and running each as one op. A
pattern is fused only where the result is provably the same function; everything else keeps running as written."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from svf_fast.block import run_chain
from svf_fast.frozen_norm import FrozenAffine
from svf_fast.modules import SVFConv2d
from svf_fast.plain_forward import watched_attributes
from svf_fast.swap import Swapped, restore, swap

_ADDS = (operator.add, operator.iadd, torch.add)
_RELUS = (F.relu, torch.relu, torch.relu_, F.relu_)
# Modules that write to nothing but themselves (an `inplace` attribute set to True aside).
_PURE = (
    SVFConv2d, FrozenAffine, nn.Conv2d, nn.Linear, nn.Identity, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.MaxPool2d,
    nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.Dropout, nn.Dropout2d, nn.Flatten,
    nn.Sequential,
)  # fmt: skip
# A longer run of convolutions is cut: all that lies between two kept z is rebuilt at once in backward.
_LONGEST_CHAIN = 4


class FusedForward(Swapped):
    """Mixin: runs the rewritten forward of the module while everything that it was derived from still holds, else the written
    one, which is the same function layer by layer. The rewriting is redone, not stored, when a copy is made."""

    _fused: tuple[_Rewritten, ...] = ()

    def __getstate__(self) -> Any:
        state = super().__getstate__()
        if isinstance(state, dict):
            state.pop("_fused", None)
        return state

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        restore(self)  # type: ignore[arg-type]
        fuse_module(self)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for rewritten in self._fused:
            if rewritten.holds(self, args) and not kwargs:
                return rewritten.forward(self, *args)
        return self._svf_base.forward(self, *args, **kwargs)


class _Rewritten(NamedTuple):
    """A rewritten forward, and what it was derived from: plain attribute values, and who was whose child."""

    forward: Callable[..., Any]
    watched: dict[str, Any]
    # modules on traced paths and their children then; None stands for the module itself (no reference cycle)
    families: tuple[tuple[nn.Module | None, tuple[nn.Module | None, ...]], ...]
    # modules that the fusion takes the place of: a hook on one of them has to run
    silenced: tuple[nn.Module, ...]

    def holds(self, module: Any, args: tuple[Any, ...]) -> bool:
        own = module.__dict__
        if any(own.get(name, module) != value for name, value in self.watched.items()):
            return False
        if torch.compiler.is_compiling():
            # the compiler guards modules and hooks itself
            return True
        if not all(isinstance(arg, torch.Tensor) for arg in args):
            return False
        for parent, children in self.families:
            now = (module if parent is None else parent)._modules
            if len(now) != len(children) or any(a is not b for a, b in zip(now.values(), children, strict=True)):
                return False
        return not any(_has_hooks(m) for m in self.silenced)


class _InPlaceProxy(fx.Proxy):
    """A traced value whose augmented assignments stay in place; fx's own proxies turn `a += b` into `a = a + b`."""


def _augmented(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_InPlaceProxy, f"__{_name}__", _augmented(getattr(operator, _name)))


class _ModuleTracer(fx.Tracer):
    """Traces one module's own forward; every module below it is a leaf, and buffers stay what they are at each call."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlaceProxy(node, self)


def fuse_module(module: nn.Module) -> None:
    """Fuses, in place, what can be fused in `module`'s own forward, and notes on every SVFConv2d that the forward calls
    what became of it. A forward that is not plain (see plain_forward) or cannot be traced stays as it is."""
    if isinstance(module, FusedForward):
        unfuse_module(module)
    try:
        watched = watched_attributes(module)
        rewritten = [_rewrite(module, watched)]
        if "training" in watched:
            module.training = not module.training
            try:
                rewritten.append(_rewrite(module, {**watched, "training": module.training}))
            finally:
                module.training = not module.training
    except Exception as error:
        # tracing raises whatever a forward raises on symbolic values; layer by layer is always right
        reason = " ".join(str(error).split())[:120]
        for child in module.children():
            if isinstance(child, SVFConv2d):
                child.fusion_note = f"alone: {type(module).__name__}.forward cannot be traced faithfully ({reason})"
        return
    found = tuple(r for r in rewritten if r is not None)
    if found:
        module.__dict__["_fused"] = found
        swap(module, FusedForward)


def unfuse_module(module: nn.Module) -> None:
    """Undoes `fuse_module`."""
    module.__dict__.pop("_fused", None)
    restore(module)


def _rewrite(module: nn.Module, watched: dict[str, Any]) -> _Rewritten | None:
    """The fused forward under the watched values, or None where nothing fuses."""
    graph = _ModuleTracer().trace(module)
    paths = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    leaves = [m for p in paths if isinstance(m := _at(module, p), nn.Module)]
    parents = {"", *(p.rpartition(".")[0] for p in paths)}
    parents |= {".".join(p.split(".")[:i]) for p in parents for i in range(len(p.split(".")))}
    families = tuple(
        (None if parent is module else parent, tuple(parent._modules.values()))
        for parent in map(module.get_submodule, sorted(parents))
    )
    if not _fuse_graph(module, graph):
        return None
    remaining = {id(_at(module, str(n.target))) for n in graph.nodes if n.op == "call_module"}
    silenced = tuple(m for m in leaves if id(m) not in remaining or isinstance(m, SVFConv2d))
    # only the generated function is taken: it reads its modules from the instance that it is called on
    generated = fx.GraphModule(module, graph)
    generated._modules.clear()
    return _Rewritten(type(generated).forward, watched, families, silenced)


def _at(root: nn.Module, path: str) -> Any:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _module(root: nn.Module, node: Any) -> nn.Module | None:
    if isinstance(node, fx.Node) and node.op == "call_module":
        return root.get_submodule(str(node.target))
    return None


def _fuse_graph(root: nn.Module, graph: fx.Graph) -> bool:
    """Rewrites the graph; True when anything was fused."""
    nodes = [node for node in graph.nodes if isinstance(_module(root, node), SVFConv2d)]
    calls: dict[int, int] = {}
    for node in nodes:
        calls[id(_module(root, node))] = calls.get(id(_module(root, node)), 0) + 1
    fused: list[fx.Node] = []
    for node in nodes:
        conv = _module(root, node)
        assert isinstance(conv, SVFConv2d)
        if calls[id(conv)] > 1:
            conv.fusion_note = f"alone: called {calls[id(conv)]} times in {type(root).__name__}.forward"
        elif len(node.args) != 1 or node.kwargs:
            conv.fusion_note = "alone: not called with exactly one tensor"
        elif _has_hooks(conv):
            conv.fusion_note = "alone: it has hooks"
        else:
            new = _fuse_at(root, graph, node, conv)
            if new is not None:
                fused.append(new)
    _chain(root, graph, fused)
    return bool(fused)


def _fuse_at(root: nn.Module, graph: fx.Graph, node: fx.Node, conv: SVFConv2d) -> fx.Node | None:
    """Fuses what follows the convolution at `node` as far as it can be proven; the new node, or None."""
    taken, parts = [node], ["conv"]
    norm, residual, activation, stopped = None, None, None, ""
    follower = _only_user(taken[-1])
    if isinstance(_module(root, follower), FrozenAffine) and not _has_hooks(_module(root, follower)):
        assert follower is not None
        norm = follower
        taken.append(follower)
        parts.append("norm")
    follower = _only_user(taken[-1])
    if follower is not None and (other := _added_to(follower, taken[-1])) is not None:
        residual = other
        taken.append(follower)
        parts.append("residual")
    follower = _only_user(taken[-1])
    if follower is not None and _is_relu(root, follower, taken[-1]):
        activation = "relu"
        taken.append(follower)
        parts.append("relu")
    while len(taken) > 1 and (offender := _mutation_between(root, graph, taken)) is not None:
        # the fused op runs where the last of them ran: nothing in between may change what it reads
        taken.pop()
        dropped = parts.pop()
        residual = None if dropped == "residual" else residual
        activation = None if dropped == "relu" else activation
        norm = None if dropped == "norm" else norm
        stopped = f" (not {dropped}: {offender} may write in place)"
    if len(taken) == 1:
        conv.fusion_note = f"alone: followed by {_describe(root, node)}{stopped}"
        return None
    conv.fusion_note = "fused: " + " → ".join(parts) + stopped
    with graph.inserting_after(taken[-1]):
        new = graph.call_module(str(node.target), args=node.args)
    if norm is not None:
        with graph.inserting_before(new):
            new.update_kwarg("norm", graph.get_attr(str(norm.target)))
    if residual is not None:
        new.update_kwarg("residual", residual)
    if activation is not None:
        new.update_kwarg("activation", activation)
    taken[-1].replace_all_uses_with(new)
    for old in reversed(taken):
        graph.erase_node(old)
    return new


def _chain(root: nn.Module, graph: fx.Graph, fused: list[fx.Node]) -> None:
    """Joins fused convolutions with save="recompute" that follow one another into chains."""
    waiting = [n for n in fused if _recomputes(root, n)]
    while waiting:
        links = [waiting.pop(0)]
        while len(links) < _LONGEST_CHAIN and (following := _next_link(links[-1], waiting)) is not None:
            if _mutation_between(root, graph, [*links, following]) is not None:
                break
            waiting.remove(following)
            links.append(following)
        convs = [_attribute(graph, links[-1], str(link.target)) for link in links]
        norms = [link.kwargs.get("norm") for link in links]
        rest = {k: v for k, v in links[-1].kwargs.items() if k in ("residual", "activation")}
        with graph.inserting_before(links[-1]):
            new = graph.call_function(run_chain, (tuple(convs), tuple(norms), links[0].args[0]), rest)
        links[-1].replace_all_uses_with(new)
        for link in reversed(links):
            graph.erase_node(link)
        for link in links:
            conv = root.get_submodule(str(link.target))
            assert isinstance(conv, SVFConv2d)
            conv.fusion_note += f", block of {len(links)} rebuilt in backward"


def _attribute(graph: fx.Graph, before: fx.Node, target: str) -> fx.Node:
    """A node that reads the attribute `target`, placed before `before`."""
    with graph.inserting_before(before):
        return graph.get_attr(target)


def _recomputes(root: nn.Module, node: fx.Node) -> bool:
    conv = _module(root, node)
    return isinstance(conv, SVFConv2d) and conv.save == "recompute"


def _next_link(node: fx.Node, candidates: list[fx.Node]) -> fx.Node | None:
    """The fused node that alone reads `node`, when a chain may run on into it."""
    user = _only_user(node)
    ends_here = node.kwargs.get("activation") != "relu" or node.kwargs.get("residual") is not None
    if user is None or user not in candidates or ends_here:
        return None
    reads_it_as_input = user.args == (node,) and user.kwargs.get("residual") is not node
    return user if reads_it_as_input else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _added_to(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """The other operand when `node` is a plain addition of `value` and another traced value."""
    is_add = (node.op == "call_function" and node.target in _ADDS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    if not is_add or len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    left, right = node.args
    if left is right or value not in (left, right):
        return None
    if right is value and (node.target is operator.iadd or node.target == "add_"):
        # the other operand is written to, and may be read later
        return None
    other = right if left is value else left
    assert isinstance(other, fx.Node)
    return other


def _is_relu(root: nn.Module, node: fx.Node, value: fx.Node) -> bool:
    if not node.args or node.args[0] is not value:
        return False
    module = _module(root, node)
    if module is not None:
        return type(module) is nn.ReLU and not _has_hooks(module)
    return (node.op == "call_function" and node.target in _RELUS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )


def _mutation_between(root: nn.Module, graph: fx.Graph, taken: list[fx.Node]) -> str | None:
    """Name of a node between the first and the last of `taken`, not one of them, that may write in place; or None."""
    is_inside = False
    for node in graph.nodes:
        if node is taken[-1]:
            return None
        if node is taken[0]:
            is_inside = True
        elif is_inside and node not in taken and _may_write_in_place(root, node):
            return str(node.name)
    return None


def _may_write_in_place(root: nn.Module, node: fx.Node) -> bool:
    module = _module(root, node)
    if module is not None:
        # a module of a class unknown here may do anything
        return not all(_is_pure(m) for m in module.modules())
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    is_augmented = getattr(operator, name, None) is node.target and name.startswith("i") and hasattr(operator, name[1:])
    return node.op == "call_function" and (
        is_augmented or bool(node.kwargs.get("inplace")) or "out" in node.kwargs or name.endswith("_")
    )


def _is_pure(module: nn.Module) -> bool:
    own = module._svf_base if isinstance(module, Swapped) else type(module)
    return own in _PURE and not getattr(module, "inplace", False) and not _has_hooks(module)


def _has_hooks(module: nn.Module | None) -> bool:
    return module is not None and any(
        getattr(module, name, None)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def _describe(root: nn.Module, node: fx.Node) -> str:
    """What reads the node, for people."""
    names = []
    for user in node.users:
        module = _module(root, user)
        names.append(
            type(module).__name__ if module is not None else str(getattr(user.target, "__name__", user.target))
        )
    return " and ".join(names) or "nothing"
