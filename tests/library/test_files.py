"""Singular values as files, and the released layout: what fits is loaded exactly, what does not is refused with names."""

from __future__ import annotations

import copy
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from error_ratio import error_ratio
from networks import CHANNELS, NETWORKS, conv, picture, settle
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svf_fast
from svf_fast.reference import convert_naive


def trained(seed: int = 0, name: str = "bottlenecks", **keywords: Any) -> nn.Module:
    """A converted network in float32 whose singular values have moved."""
    model = svf_fast.convert(settle(NETWORKS[name](), seed=seed).float(), **keywords)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in svf_fast.singular_values(model).values():
            value.mul_(1 + 0.3 * torch.rand(len(value), generator=generator))
    return model


def fresh(seed: int = 0, name: str = "bottlenecks", **keywords: Any) -> nn.Module:
    return svf_fast.convert(settle(NETWORKS[name](), seed=seed).float(), **keywords)


@pytest.mark.parametrize("target", ["direct", "scale"])
@pytest.mark.parametrize("source", ["direct", "scale"])
def test_round_trip_between_parametrizations(source: str, target: str, tmp_path: Path) -> None:
    model, other = trained(parametrization=source), fresh(parametrization=target)
    svf_fast.save_singular_values(model, tmp_path / "s.safetensors")
    svf_fast.load_singular_values(other, tmp_path / "s.safetensors")
    x = picture(2, CHANNELS, 9, 8, dtype=torch.float32)
    assert error_ratio(other(x), model(x)) < 1e-6


def test_loading_keeps_the_parameters_so_that_an_optimiser_still_trains_them(tmp_path: Path) -> None:
    svf_fast.save_singular_values(trained(), tmp_path / "s")
    model = fresh()
    before = {k: id(v) for k, v in svf_fast.singular_values(model).items()}
    svf_fast.load_singular_values(model, tmp_path / "s")
    values = svf_fast.singular_values(model)
    assert {k: id(v) for k, v in values.items()} == before
    assert all(v.requires_grad for v in values.values())


def test_the_file_is_small_and_documented(tmp_path: Path) -> None:
    model = trained()
    path = tmp_path / "s.safetensors"
    svf_fast.save_singular_values(model, str(path))
    values = svf_fast.singular_values(model)
    assert path.stat().st_size < sum(2 * 4 * len(v) + 32 for v in values.values()) + 300 * len(values)
    tensors = load_file(path)
    assert set(tensors) == {f"{n}.{part}" for n in values for part in ("s", "s0", "base_fingerprint")}
    for name, value in values.items():
        assert torch.equal(tensors[f"{name}.s"], value)
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_the_file_is_readable_by_whom_the_umask_lets(tmp_path: Path) -> None:
    """Written through a temporary file, but with the permissions that an ordinary new file gets."""
    (tmp_path / "ordinary").touch()
    svf_fast.save_singular_values(trained(), tmp_path / "s")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "s")]
    assert modes[0] == modes[1]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s"
    model = trained()
    svf_fast.save_singular_values(model, path)
    before = path.read_bytes()
    with torch.no_grad():
        svf_fast.singular_values(model)["1.conv2"][0] = float("nan")
    with pytest.raises(ValueError, match=r"^1\.conv2: .*not finite"):
        svf_fast.save_singular_values(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["s"]


def test_saving_into_a_folder_that_is_not_there_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing") as caught:
        svf_fast.save_singular_values(trained(), tmp_path / "missing" / "s.safetensors")
    assert ".part" not in str(caught.value)


def test_a_file_of_a_bare_layer(tmp_path: Path) -> None:
    layer = svf_fast.convert(conv())
    svf_fast.save_singular_values(layer, tmp_path / "s")
    svf_fast.load_singular_values(layer, tmp_path / "s")


@pytest.mark.parametrize("save", ["exact", "int8", "recompute"])
def test_a_file_does_not_depend_on_what_is_kept(save: str, tmp_path: Path) -> None:
    svf_fast.save_singular_values(trained(), tmp_path / "s")
    model = fresh(save=save, fuse=save != "int8")
    svf_fast.load_singular_values(model, tmp_path / "s")
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(svf_fast.singular_values(m).values() for m in (model, trained())), strict=True)
    )


def test_a_file_survives_another_svd_routine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal singular values and flipped signs on the machine that reads the file."""
    linear = nn.Linear(8, 8, bias=False, dtype=torch.float64)
    with torch.no_grad():
        basis = torch.linalg.qr(linear.weight)[0]
        linear.weight.copy_(
            basis @ torch.diag(torch.tensor([3.0, 3, 3, 2, 2, 1, 1, 0.5]).double()) @ basis.roll(3, 1).mT
        )
    model = svf_fast.convert(copy.deepcopy(linear))
    with torch.no_grad():
        svf_fast.singular_values(model)[""].mul_(torch.linspace(0.5, 2, 8).double())
    svf_fast.save_singular_values(model, tmp_path / "s")
    svd = torch.linalg.svd

    def other_svd(a: Tensor, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vt = svd(a.mT.contiguous(), full_matrices=False)
        return -vt.mT.contiguous(), s, -u.mT.contiguous()

    monkeypatch.setattr(torch.linalg, "svd", other_svd)
    other = svf_fast.convert(copy.deepcopy(linear))
    svf_fast.load_singular_values(other, tmp_path / "s")
    x = picture(3, 8)
    assert error_ratio(other(x), model(x)) < 1e-9


def refused(model: nn.Module, path: Path, *parts: str) -> None:
    """Loading raises a ValueError that names every one of `parts`, and changes nothing."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=parts[0]) as caught:
        svf_fast.load_singular_values(model, path)
    for part in parts:
        assert part in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_other_base_weights_are_refused_by_name(tmp_path: Path) -> None:
    svf_fast.save_singular_values(trained(), tmp_path / "s")
    original = settle(NETWORKS["bottlenecks"]()).float()
    with torch.no_grad():
        original.get_parameter("1.conv2.weight")[0, 0, 0, 0] += 1e-6
    model = svf_fast.convert(original)
    refused(model, tmp_path / "s", "1.conv2: made for other base weights")


def test_other_ranks_and_names_are_refused_together(tmp_path: Path) -> None:
    svf_fast.save_singular_values(
        svf_fast.convert(settle(NETWORKS["bottlenecks"]()).float(), ["0", "1"]), tmp_path / "s"
    )
    model = svf_fast.convert(settle(NETWORKS["bottlenecks"]()).float(), ["1", "2"], rank=2)
    refused(
        model,
        tmp_path / "s",
        "0.conv1: in the file, not converted",
        "1.conv1: rank 4 in the file, 2 in the model",
        "2.conv3: not in the file",
    )


def test_not_such_a_file(tmp_path: Path) -> None:
    model = fresh()
    with pytest.raises(FileNotFoundError, match="no file of singular values at"):
        svf_fast.load_singular_values(model, tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no file of singular values at"):
        svf_fast.load_singular_values(model, tmp_path)
    (tmp_path / "text").write_text("hello")
    refused(model, tmp_path / "text", "is not a complete safetensors file")
    (tmp_path / "empty").touch()
    refused(model, tmp_path / "empty", "is not a complete safetensors file")
    save_file({"a": torch.ones(2)}, tmp_path / "weights")
    refused(model, tmp_path / "weights", "holds no singular values")
    svf_fast.save_singular_values(trained(), tmp_path / "s")
    (tmp_path / "cut").write_bytes((tmp_path / "s").read_bytes()[:-10])
    refused(model, tmp_path / "cut", "is not a complete safetensors file")
    torch.save(model.state_dict(), tmp_path / "pickle")
    refused(model, tmp_path / "pickle", "is not a complete safetensors file")


def rewritten(path: Path, **changes: Tensor | None) -> Path:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    other = path.with_suffix(".rewritten")
    save_file(tensors, other, metadata=metadata)
    return other


def test_damaged_contents(tmp_path: Path) -> None:
    path = tmp_path / "s"
    svf_fast.save_singular_values(trained(), path)
    refused(
        fresh(), rewritten(path, **{"1.conv2.s": torch.full((4,), float("nan"))}), "1.conv2: values that are not finite"
    )
    refused(fresh(), rewritten(path, **{"1.conv2.s0": None}), "1.conv2: the file lacks s0")
    refused(fresh(), rewritten(path, **{"1.conv2.base_fingerprint": None}), "1.conv2: the file lacks base_fingerprint")
    refused(fresh(), rewritten(path, **{"1.conv2.s": torch.ones(4, 1)}), "1.conv2")
    refused(fresh(), rewritten(path, **{"1.conv2.s": torch.ones(())}), "1.conv2")
    refused(fresh(), rewritten(path, **{"1.conv2.base_fingerprint": torch.zeros(3)}), "1.conv2")


@pytest.mark.parametrize("function", [svf_fast.save_singular_values, svf_fast.load_singular_values])
def test_a_model_that_is_not_converted(function: Any, tmp_path: Path) -> None:
    svf_fast.save_singular_values(trained(), tmp_path / "s")
    with pytest.raises(ValueError, match="holds no converted layer; convert it first"):
        function(nn.Sequential(conv()), tmp_path / "s")


def test_a_base_weight_in_half_precision_has_another_fingerprint(tmp_path: Path) -> None:
    svf_fast.save_singular_values(trained(), tmp_path / "s")
    model = svf_fast.convert(settle(NETWORKS["bottlenecks"]()).to(torch.bfloat16))
    refused(model, tmp_path / "s", "made for other base weights")


def released(name: str = "basic blocks", *, rank_multiple: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
    """The three-module form of a network with moved S, and its state dict; ranks rounded down when `rank_multiple` says so."""
    model = convert_naive(settle(NETWORKS[name]()).float(), ["0", "1"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("vector_S"):
                parameter.mul_(torch.linspace(0.7, 1.4, parameter.numel()).view(parameter.shape))
    state = model.state_dict()
    for key in [k for k in state if k.endswith("vector_S")]:
        base = key.removesuffix("vector_S")
        rank = state[key].shape[1] // rank_multiple * rank_multiple
        state[key] = state[key][:, :rank]
        state[f"{base}conv_U.weight"] = state[f"{base}conv_U.weight"][:, :rank]
        state[f"{base}conv_V.weight"] = state[f"{base}conv_V.weight"][:rank]
    return model, state


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("parametrization", ["direct", "scale"])
def test_a_released_state_dict_into_a_converted_model(parametrization: str, prefix: str) -> None:
    naive, state = released()
    model = fresh(name="basic blocks", parametrization=parametrization)
    svf_fast.load_svf_pytorch(model, {prefix + k: v for k, v in state.items()})
    x = picture(dtype=torch.float32)
    assert error_ratio(model(x), naive(x)) < 1e-5
    with torch.no_grad():
        for _ in range(2):
            assert error_ratio(model(x), naive(x)) < 1e-5
    with svf_fast.disabled(model):
        assert error_ratio(model(x), settle(NETWORKS["basic blocks"]()).float()(x)) < 1e-4


def test_a_released_state_dict_into_an_ordinary_model() -> None:
    naive, state = released()
    model = settle(NETWORKS["basic blocks"](), seed=5).float()
    svf_fast.load_svf_pytorch(model, state)
    x = picture(dtype=torch.float32)
    assert error_ratio(model(x), naive(x)) < 1e-5


def test_rounded_ranks_are_taken_as_they_are() -> None:
    _, state = released(rank_multiple=4)
    model = fresh(name="basic blocks")
    svf_fast.load_svf_pytorch(model, state)
    values = svf_fast.singular_values(model)
    assert len(values["0.conv1"]) == 4
    plain = settle(NETWORKS["basic blocks"](), seed=5).float()
    svf_fast.load_svf_pytorch(plain, state)
    x = picture(dtype=torch.float32)
    assert error_ratio(model(x), plain(x)) < 1e-5
    model(x).sum().backward()
    assert all(v.grad is not None for v in values.values())


def test_a_released_layer_alone() -> None:
    original = conv(bias=True).float()
    naive = svf_fast.reference.NaiveSVFConv2d(original)
    layer = svf_fast.convert(copy.deepcopy(original))
    svf_fast.load_svf_pytorch(layer, naive.state_dict())
    x = picture(dtype=torch.float32)
    assert error_ratio(layer(x), naive(x)) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.clear(), "holds no vector_S entry"),
        (
            lambda s: s.pop("0.conv1.conv_U.weight"),
            "0.conv1: conv_U.weight, conv_V.weight and vector_S must come together",
        ),
        (lambda s: s.pop("0.bn1.weight"), "0.bn1.weight: missing"),
        (lambda s: s.__setitem__("9.weight", torch.ones(1)), "9.weight: not in the model"),
        (lambda s: s.__setitem__("0.bn1.weight", torch.ones(3)), "0.bn1.weight: shape [3], the model has [6]"),
        (lambda s: s.__setitem__("0.conv1.vector_S", torch.ones(1, 5, 1, 1)), "0.conv1"),
        (lambda s: s.__setitem__("0.conv1.conv_U.bias", torch.ones(6)), "0.conv1: conv_U.bias is superfluous"),
        (lambda s: s.update({k.replace("0.conv1", "0.conv9"): s[k] for k in list(s)}), "0.conv9"),
    ],
)
def test_released_state_dicts_that_do_not_fit(change: Any, message: str) -> None:
    _, state = released()
    change(state)
    model = fresh(name="basic blocks")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"state_dict") as caught:
        svf_fast.load_svf_pytorch(model, state)
    assert message in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_values_that_are_not_finite_are_refused_in_the_released_layout_too() -> None:
    _, state = released()
    state["0.conv1.vector_S"] = state["0.conv1.vector_S"] * float("nan")
    with pytest.raises(ValueError, match=r"0\.conv1"):
        svf_fast.load_svf_pytorch(fresh(name="basic blocks"), state)
