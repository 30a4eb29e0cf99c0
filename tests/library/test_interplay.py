"""Checkpoint, functional calls, DDP and moves between dtypes."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
from error_ratio import assert_close, error_ratio
from networks import CHANNELS, NETWORKS, picture, run, settle
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import svf_fast
from svf_fast.frozen_norm import freeze_norm

SAVES = ("exact", "int8", "recompute")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("save", SAVES)
def test_checkpoint(save: str, use_reentrant: bool) -> None:
    model: Any = svf_fast.convert(settle(NETWORKS["bottlenecks"]()), save=save)
    x = picture(2, CHANNELS, 9, 8)
    expected = run(model, x)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = model

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant)
            return x

    # a reentrant checkpoint runs forward without a graph, that is with merged weights: equal up to rounding
    out = {k.replace("blocks.", ""): v for k, v in run(Checkpointed(), x).items()}
    noisy = {k: 1e-1 for k in out if k.startswith("ds")} if save == "int8" and use_reentrant else None
    assert_close(out, expected, torch.float64, tolerance=noisy)


@pytest.mark.parametrize("save", SAVES)
def test_functional_call_with_other_singular_values(save: str) -> None:
    model = svf_fast.convert(settle(NETWORKS["basic blocks"]()), save=save)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for value in svf_fast.singular_values(other).values():
            value.mul_(1.5)
    replaced = {f"{n}.s": v.detach().clone().requires_grad_() for n, v in svf_fast.singular_values(other).items()}
    x = picture()
    y = torch.func.functional_call(model, replaced, x)
    y.sum().backward()
    other(x).sum().backward()
    assert error_ratio(y, other(x)) < 1e-12
    for name, value in svf_fast.singular_values(other).items():
        gradient = replaced[f"{name}.s"].grad
        assert gradient is not None
        assert value.grad is not None
        assert error_ratio(gradient, value.grad) < 1e-12
    with torch.no_grad():
        assert error_ratio(torch.func.functional_call(model, replaced, x), y) < 1e-12


def test_backward_twice_through_one_graph() -> None:
    model = svf_fast.convert(settle(NETWORKS["bottlenecks"]()), save="recompute")
    y = model(picture(2, CHANNELS, 9, 8)).sum()
    y.backward(retain_graph=True)
    first = {n: v.grad.clone() for n, v in svf_fast.singular_values(model).items() if v.grad is not None}
    y.backward()
    for name, value in svf_fast.singular_values(model).items():
        assert value.grad is not None
        assert torch.equal(value.grad, 2 * first[name])


def test_an_optimiser_step_between_forward_and_backward_is_noticed() -> None:
    """s is needed in backward: PyTorch's own check for values changed in place must hold for it."""
    model = svf_fast.convert(settle(NETWORKS["basic blocks"]()))
    loss = model(picture().requires_grad_()).sum()
    with torch.no_grad():
        for value in svf_fast.singular_values(model).values():
            value.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ddp_worker(rank: int, port: int, save: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        # the second process starts from other singular values: DDP must broadcast them
        model = svf_fast.convert(settle(NETWORKS["bottlenecks"]()), save=save)
        if rank == 1:
            with torch.no_grad():
                for value in svf_fast.singular_values(model).values():
                    value.zero_()
        parallel = nn.parallel.DistributedDataParallel(model.train())
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(2):
            optimiser.zero_grad()
            x = picture(4, CHANNELS, 9, 8, seed=step)[2 * rank : 2 * rank + 2]
            parallel(x).square().mean().backward()
            optimiser.step()
        torch.save({n: v.detach() for n, v in svf_fast.singular_values(model).items()}, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("save", ["exact", "recompute"])
def test_two_processes_train_like_one(save: str, tmp_path: Any) -> None:
    torch.multiprocessing.spawn(ddp_worker, (free_port(), save, str(tmp_path)), nprocs=2)
    model = svf_fast.convert(settle(NETWORKS["bottlenecks"]()), save=save).train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(2):
        optimiser.zero_grad()
        model(picture(4, CHANNELS, 9, 8, seed=step)).square().mean().backward()
        optimiser.step()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in svf_fast.singular_values(model).items():
            assert error_ratio(found[name], value) < 1e-10, (rank, name)


MAKERS: tuple[Callable[[], nn.Module], ...] = (NETWORKS["bottlenecks"], NETWORKS["vgg"])


@pytest.mark.parametrize("make", MAKERS, ids=("bottlenecks", "vgg"))
@pytest.mark.parametrize("save", SAVES)
def test_a_model_may_be_moved_to_another_dtype(make: Callable[[], nn.Module], save: str) -> None:
    model = svf_fast.convert(settle(make()), save=save)
    x = picture(2, CHANNELS, 9, 8)
    expected = model(x)
    with torch.no_grad():
        model(x)
    model.float()
    assert error_ratio(model(x.float()), expected) < 1e-5
    with torch.no_grad():
        assert error_ratio(model(x.float()), expected) < 1e-5
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert error_ratio(model(x.float()), expected) < 1e-5
    model.bfloat16()
    assert error_ratio(model(x.bfloat16()), expected) < 3e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_frozen_norm_alone_is_in_half_precision_no_worse_than_twice_torchs(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    norm = nn.BatchNorm2d(64).eval()
    # means far from zero, as after a ReLU
    for tensor, mean in ((norm.running_mean, 16.0), (norm.weight, 1.0)):
        assert tensor is not None
        nn.init.normal_(tensor, mean)
    x = (16 + torch.randn(2, 64, 9, 7)).to(dtype).contiguous(memory_format=layout)
    stock, exact = norm(x), copy.deepcopy(norm).double()(x.double())
    freeze_norm(norm)
    y = norm(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    assert (y.double() - exact).norm() <= 2 * (stock.double() - exact).norm()
