"""Whole few-shot checkpoints: every layout fills a method, or its backbone alone; what does not fit is named."""

import re

import pytest
import torch
from method_cases import OPTIONS, narrow, narrow_backbone
from safetensors.torch import save_file
from torch import Tensor

from svf_fast.train.backbones import load_backbone_weights
from svf_fast.train.methods import load_published
from svf_fast.train.methods.pspnet import PSPNet, load_base_learner


def disturbed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        key: t + torch.rand(t.shape, generator=generator) if t.is_floating_point() else t for key, t in state.items()
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(tensor, expected[key]) for key, tensor in actual.items())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backbone", ["resnet", "vgg"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_fills_the_method(name, backbone, prefix, tmp_path):
    method = narrow(name, backbone)
    state = disturbed(method.state_dict())
    torch.save({"epoch": 3, "state_dict": {prefix + key: t for key, t in state.items()}}, tmp_path / "method.pth")
    load_published(method, tmp_path / "method.pth")
    assert_same(method.state_dict(), state)


@pytest.mark.parametrize("name", [*OPTIONS, "base learner"])
def test_a_checkpoint_fills_a_backbone_alone(name, tmp_path):
    source = PSPNet(narrow_backbone(), classes=3) if name == "base learner" else narrow(name)
    state = disturbed(source.state_dict())
    aliases = {f"encoder.{key.removeprefix('layer')}": t for key, t in state.items() if key.startswith("layer")}
    state |= aliases if name == "base learner" else {}
    torch.save({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "method.pth")
    backbone = narrow_backbone()
    load_backbone_weights(backbone, tmp_path / "method.pth")
    assert_same(backbone.state_dict(), state)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("res1.0.weight"), "missing: res1.0.weight"),
        (lambda s: s.pop("layer2.0.bn1.bias"), "missing: layer2.0.bn1.bias"),
        (lambda s: s.update({"gram_merge.weight": torch.ones(1, 2, 1, 1)}), "superfluous: gram_merge.weight"),
        (lambda s: s.update({"cls.3.bias": torch.ones(3)}), "of another shape: cls.3.bias [3], expected [2]"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(change, sentence):
    method = narrow("pfenet")
    before = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    state = disturbed(method.state_dict())
    change(state)
    with pytest.raises(ValueError, match=f"^weights in the state dict do not fit the PFENet; {re.escape(sentence)}"):
        load_published(method, state)
    assert_same(method.state_dict(), before)


def test_an_unknown_part_of_a_checkpoint_is_not_passed_by(tmp_path):
    state = {**narrow("pfenet").state_dict(), "transformer.weight": torch.ones(2)}
    torch.save(state, tmp_path / "method.pth")
    with pytest.raises(ValueError, match=r"superfluous: transformer\.weight$"):
        load_backbone_weights(narrow_backbone(), tmp_path / "method.pth")


def test_what_the_svf_authors_files_hold_besides_is_passed_by():
    method = narrow("bam")
    state = disturbed(method.state_dict())
    copies = {key.replace(".", "p.", 1): t for key, t in state.items() if key.startswith("layer")}
    load_published(method, {"state_dict": {**state, **copies}})
    assert_same(method.state_dict(), state)
    copies["layer2p.0.conv1.weight"] = copies["layer2p.0.conv1.weight"] + 1
    with pytest.raises(ValueError, match=r"holds layer2p\.0\.conv1\.weight beside another layer2\.0\.conv1\.weight"):
        load_published(narrow("bam"), {**state, **copies})
    baseline = narrow("baseline")
    load_published(baseline, {**disturbed(baseline.state_dict()), "kshot_rw.0.bias": torch.ones(2)})
    with pytest.raises(ValueError, match=r"svf_fast\.load_svf_pytorch reads them$"):
        load_published(narrow("bam"), {**state, "layer2.0.conv1.vector_S": torch.ones(1, 4, 1, 1)})


def test_two_copies_of_one_key_are_refused():
    state = narrow("pfenet").state_dict()
    state["module.res1.0.weight"] = state["res1.0.weight"]
    with pytest.raises(ValueError, match=r"^a state dict has keys with and without 'module\.': res1\.0\.weight$"):
        load_published(narrow("pfenet"), state)


def test_integers_are_no_weights():
    state = narrow("pfenet").state_dict()
    state["res1.0.weight"] = state["res1.0.weight"].to(torch.int8)
    with pytest.raises(ValueError, match=r"of another kind: res1\.0\.weight$"):
        load_published(narrow("pfenet"), state)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_values_that_are_not_finite_are_refused_in_either_format(suffix, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    state = {key: t.clone() for key, t in narrow_backbone().state_dict().items()}
    state["layer1.0.conv1.weight"][0] = torch.nan
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    with pytest.raises(ValueError, match=r"holds values that are not finite: layer1\.0\.conv1\.weight$"):
        load_backbone_weights(narrow_backbone(), path)


def test_aliases_of_a_base_learner_that_differ_are_refused():
    state = PSPNet(narrow_backbone(), classes=3).state_dict()
    state["encoder.1.0.conv1.weight"] = state["layer1.0.conv1.weight"] + 1
    with pytest.raises(ValueError, match=r"hold layer1\.0\.conv1\.weight and encoder\.1\.0\.conv1\.weight, two copies"):
        load_base_learner(PSPNet(narrow_backbone(), classes=3), state)


@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x02."])
def test_a_file_of_something_else_gets_a_sentence(content, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"is not a complete PyTorch or safetensors file of tensors|holds no state dict"
    ):
        load_backbone_weights(narrow_backbone(), tmp_path / "weights.pth")
