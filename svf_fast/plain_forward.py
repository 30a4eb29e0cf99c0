"""Whether a module's forward is plain enough for its traced graph to stand for it: straight calls of child modules and of known
tensor functions, no writes to attributes, no context managers, no randomness, no branches on what a caller may vary."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_BUILTINS = {"range", "len", "enumerate", "zip", "reversed"}
# Functions of torch and torch.nn.functional, and methods or properties of tensors, that a traced graph repeats faithfully.
_FUNCTIONS = {
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "add", "avg_pool2d", "cat", "dropout", "dropout2d", "elu", "flatten", "gelu",
    "hardswish", "interpolate", "leaky_relu", "max_pool2d", "mean", "mul", "pad", "relu", "relu6", "relu_", "sigmoid", "silu",
    "softmax", "stack", "sub", "sum", "tanh",
}  # fmt: skip
_METHODS = {
    "add", "add_", "chunk", "clone", "contiguous", "detach", "flatten", "mean", "mul", "mul_", "permute", "relu", "relu_",
    "reshape", "shape", "sigmoid", "size", "split", "squeeze", "sub", "sum", "tanh", "transpose", "unsqueeze", "view",
}  # fmt: skip
_NODES = (
    ast.arguments, ast.arg, ast.Assign, ast.AugAssign, ast.Return, ast.If, ast.For, ast.Expr, ast.Pass, ast.Name, ast.Constant,
    ast.Attribute, ast.Call, ast.keyword, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Tuple, ast.List,
    ast.Subscript, ast.Slice, ast.Load, ast.Store, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_FIXED = (bool, int, float, str, type(None))


class NotPlain(Exception):
    """The forward does something that a traced graph may not repeat; the message says what."""


def watched_attributes(module: nn.Module) -> dict[str, Any]:
    """The module's own plain values that its forward reads, by name: the graph holds while they do. NotPlain if it cannot."""
    forward = type(module).forward
    if "forward" in module.__dict__ or not inspect.isfunction(forward) or hasattr(forward, "__wrapped__"):
        raise NotPlain("it is not an ordinary method")
    if forward.__closure__:
        raise NotPlain("it is a closure")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        raise NotPlain("it has no source to read") from None
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        raise NotPlain("it is decorated")
    a = tree.args
    if a.defaults or a.kwonlyargs or a.vararg or a.kwarg or len(a.args) + len(a.posonlyargs) < 2:
        raise NotPlain("it takes optional arguments")
    arguments = [arg.arg for arg in (*a.posonlyargs, *a.args)]
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} | set(
        arguments[1:]
    )
    reader = _Reader(module, arguments[0], names, forward.__globals__)
    for statement in tree.body:
        reader.visit(statement)
    return reader.watched


class _Reader(ast.NodeVisitor):
    """Visits the statements of a forward; raises NotPlain at the first thing that is not known to be plain."""

    def __init__(self, module: nn.Module, self_name: str, names: set[str], scope: dict[str, Any]) -> None:
        self.module, self.self_name, self.names, self.scope = module, self_name, names, scope
        self.watched: dict[str, Any] = {}

    def generic_visit(self, node: ast.AST) -> None:
        if not isinstance(node, _NODES):
            raise NotPlain(f"it uses {type(node).__name__.lower()}")
        super().generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._require_local(target)
        self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._require_local(node.target)
        self.visit(node.value)

    def visit_For(self, node: ast.For) -> None:
        self._require_local(node.target)
        # `for module in self`, as a Sequential has it; whoever changes the children is noticed by identity
        if not (isinstance(node.iter, ast.Name) and node.iter.id == self.self_name):
            self.visit(node.iter)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self.names:
            return
        if node.id in _BUILTINS and node.id not in self.scope:
            return
        raise NotPlain(f"it uses {node.id}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = _dotted(node)
        if path is not None and path[0] == self.self_name:
            self._own(path[1:])
        elif path is not None and path[0] not in self.names:
            root = self.scope.get(path[0])
            is_known = root is not None and any(root is module for module in (torch, nn, F))
            if not is_known or path[-1] not in _FUNCTIONS or any(p not in ("nn", "functional") for p in path[1:-1]):
                raise NotPlain(f"it uses {'.'.join(path)}")
        elif node.attr in _METHODS:
            self.visit(node.value)
        else:
            raise NotPlain(f"it uses .{node.attr}")

    def _own(self, path: list[str]) -> None:
        """self.a.b: child modules and parameters are the graph's, plain values are watched."""
        owner, name = self.module, path[-1]
        for part in path[:-1]:
            child = owner._modules.get(part)
            if child is None:
                raise NotPlain(f"it uses self.{'.'.join(path)}")
            owner = child
        if owner._modules.get(name) is not None:
            return
        if len(path) == 1 and (owner._parameters.get(name) is not None or owner._buffers.get(name) is not None):
            return
        value = owner.__dict__.get(name, owner._modules.get(name, owner))
        if len(path) > 1 or not isinstance(value, _FIXED) or hasattr(type(owner), name):
            raise NotPlain(f"it uses self.{'.'.join(path)}")
        self.watched[name] = value

    def _require_local(self, target: ast.expr) -> None:
        parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        if not all(isinstance(part, ast.Name) for part in parts):
            raise NotPlain("it writes to something that outlives the call")


def _dotted(node: ast.expr) -> list[str] | None:
    """["a", "b", "c"] of the expression a.b.c, None of any other."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else None
