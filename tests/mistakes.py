"""Typical mistakes and the one sentence that each gets. `python tests/mistakes.py` prints them; test_mistakes.py checks them."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import svf_fast
from svf_fast import functional
from svf_fast.train.cli import main as command_line


def _layer() -> dict[str, torch.Tensor]:
    return {"v": torch.randn(8, 4, 3, 3), "s": torch.rand(8), "u": torch.randn(6, 8)}


def _net(*, out: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, out, 3), nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, 4, 1))


def _not_finite() -> nn.Module:
    net = _net()
    with torch.no_grad():
        net[3].weight[0, 0] = float("nan")  # type: ignore[index, union-attr]
    return net


def _other_base_weights() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tuned.safetensors")
        svf_fast.save_singular_values(svf_fast.convert(_net()), path)
        other = _net()
        with torch.no_grad():
            other[0].weight.mul_(1.01)  # type: ignore[operator, union-attr]
        svf_fast.load_singular_values(svf_fast.convert(other), path)


def _truncated_file() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tuned.safetensors")
        model = svf_fast.convert(_net())
        svf_fast.save_singular_values(model, path)
        path.write_bytes(path.read_bytes()[:100])
        svf_fast.load_singular_values(model, path)


def _double_backward() -> None:
    layer, x = svf_fast.SVFConv2d.from_conv(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    gradient.sum().backward()


LIBRARY: dict[str, Callable[[], Any]] = {
    "wrong number of channels": lambda: functional.svf_conv2d(torch.randn(1, 5, 9, 9), **_layer()),
    "mixed dtypes": lambda: functional.svf_conv2d(torch.randn(1, 4, 9, 9).bfloat16(), **_layer()),
    "residual of the wrong size": lambda: functional.svf_conv2d(
        torch.randn(1, 4, 9, 9), **_layer(), residual=torch.randn(1, 6, 9, 9)
    ),
    "misspelt save mode": lambda: svf_fast.convert(_net(), save="fp8"),
    "targets that match nothing": lambda: svf_fast.convert(_net(), ["layer4"]),
    "rank too large": lambda: svf_fast.convert(_net(), rank=28),
    "weights that are not finite": lambda: svf_fast.convert(_not_finite()),
    "a shared weight": lambda: svf_fast.convert(_tied()),
    "converting twice": lambda: svf_fast.convert(svf_fast.convert(_net())),
    "values of other base weights": _other_base_weights,
    "a truncated file of singular values": _truncated_file,
    "double backward": _double_backward,
    "a backend that is not there": lambda: svf_fast.backend("tpu"),
}


def _tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    return net


COMMANDS: dict[str, list[str]] = {
    "a configuration that does not exist": ["train", "voc_foldr"],
    "a mistyped key": ["train", "voc_folder", "optimiser.base_rl=0.1"],
    "a value of the wrong type": ["train", "voc_folder", "data.size=large"],
    "a data folder that does not exist": ["train", "voc_folder", "data.root=/nowhere", "backbone.weights=/nowhere"],
    "bam without a base learner": ["train", "pascal_bam_resnet50", "data.root=/nowhere", "run.dir=/nowhere/run"],
    "an option of another method": ["train", "pascal_bam_resnet50", "method.bins=60,30"],
    "the other stage's configuration": ["train", "pascal_base_resnet50"],
    "a checkpoint that does not exist": ["eval", "runs/nowhere/best.pt"],
}


def sentence_of(mistake: Callable[[], Any]) -> str:
    """The error's kind and sentence, as Python would print it."""
    try:
        mistake()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def command_outcome(arguments: list[str]) -> tuple[int, str]:
    """Exit status and what `svf-fast ...` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        try:
            status = command_line(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, printed.getvalue().strip()


if __name__ == "__main__":
    for name, mistake in LIBRARY.items():
        print(f"{name}\n    {sentence_of(mistake)}")
    for name, arguments in COMMANDS.items():
        exit_status, text = command_outcome(arguments)
        print(f"{name}: svf-fast {' '.join(arguments)}\n    [{exit_status}] {text}")
