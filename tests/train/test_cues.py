"""Cues against the plain convolution in float64, and where they respond, by hand."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from run_fakes import QUIET, TINY, write_voc_folder
from torch import Tensor, nn

import svf_fast
from svf_fast.train.assembly import build_model, validation_sampler
from svf_fast.train.config import load_config
from svf_fast.train.cues import CueStudy, input_of, object_preferences, relative_response, responses, study_cues
from svf_fast.train.evaluation import logits_at_original_size
from svf_fast.train.methods import MetaLearner
from svf_fast.train.spectra import last_convolution, moved_values

IMAGE = torch.randn(1, 3, 33, 33, generator=torch.Generator().manual_seed(3))


def _method(parametrization: str = "direct") -> MetaLearner:
    config = load_config("voc_folder", (*TINY, f"tuning.parametrization={parametrization}"))
    method = build_model(config, pretrained=False).method.eval()
    generator = torch.Generator().manual_seed(7)
    for s in svf_fast.singular_values(method).values():
        s.data *= 0.5 + torch.rand(s.shape, generator=generator)
    return method


def _last(method: MetaLearner, kernel: str) -> tuple[str, svf_fast.SVFConv2d]:
    found = last_convolution(method, "layer3", kernel)
    assert found is not None
    return found


@pytest.mark.parametrize(("kernel", "name"), [("3×3", "layer3.0.conv2"), ("1×1", "layer3.0.conv3")])
@pytest.mark.parametrize("parametrization", ["direct", "scale"])
def test_a_response_is_the_left_factor_times_what_the_plain_convolution_gives(
    kernel: str, name: str, parametrization: str
) -> None:
    method = _method(parametrization).double()
    found, layer = _last(method, kernel)
    assert found == name
    plain, outputs = svf_fast.merge(copy.deepcopy(method)), list[Tensor]()
    convolution = plain.get_submodule(name)
    assert type(convolution) is nn.Conv2d
    convolution.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    features = IMAGE.double()
    for stage in method.stages:
        features = plain.get_submodule(stage)(features)
    expected = torch.einsum("or,bohw->brhw", layer.u, outputs[0]).abs()
    torch.testing.assert_close(responses(layer, input_of(method, name, IMAGE.double())), expected, rtol=1e-6, atol=1e-7)


def test_looking_at_a_layer_leaves_the_method_as_it_was() -> None:
    method = _method()
    _, layer = _last(method, "3×3")
    input_of(method, "layer3.0.conv2", IMAGE)
    assert not layer._forward_pre_hooks


def test_a_picture_does_not_depend_on_the_sign_of_the_factors() -> None:
    method = _method()
    name, layer = _last(method, "3×3")
    x, label = input_of(method, name, IMAGE), torch.zeros(20, 30, dtype=torch.uint8)
    before = relative_response(responses(layer, x)[0, 2], label)
    layer.u.data[:, 2] *= -1
    layer.v.data[2] *= -1
    np.testing.assert_array_equal(relative_response(responses(layer, x)[0, 2], label), before)


def test_a_picture_is_relative_to_its_maximum_where_the_picture_lies() -> None:
    response = torch.zeros(5, 5)
    response[0, 0], response[4, 4] = 2.0, 100.0  # the second lies on the canvas below the picture
    shown = relative_response(response, torch.zeros(20, 40, dtype=torch.uint8))
    assert shown.shape == (20, 40)
    assert shown[0, 0] == shown.max() == 1
    assert not relative_response(torch.zeros(5, 5), torch.zeros(20, 40, dtype=torch.uint8)).any()


HALVES = torch.tensor([[1, 1, 0, 0]] * 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("response", "label", "preference"),
    [
        ([[1, 1, 1, 1]] * 4, HALVES, 1.0),
        ([[1, 1, 0, 0]] * 4, HALVES, 2.0),
        ([[0, 0, 1, 1]] * 4, HALVES, 0.0),
        ([[3, 3, 1, 1]] * 4, HALVES, 1.5),
        # void is counted neither as response nor as area: 6 of 6 + 1 on 2 of 3 columns
        ([[3, 3, 1, 9]] * 4, torch.tensor([[1, 1, 0, 255]] * 4, dtype=torch.uint8), 9 / 7),
        ([[0, 0, 0, 0]] * 4, HALVES, 1.0),
    ],
    ids=["even", "on it", "off it", "three to one", "void", "silent"],
)
def test_preference_is_the_share_on_the_object_over_its_share_of_the_picture(
    response: list[list[int]], label: Tensor, preference: float
) -> None:
    assert object_preferences(torch.tensor([response]).float(), label).tolist() == [pytest.approx(preference)]


def test_preferences_are_those_of_responses_resized_to_the_label() -> None:
    generator = torch.Generator().manual_seed(1)
    response = torch.rand(6, 5, 5, generator=generator)
    label = torch.randint(0, 3, (33, 33), generator=generator).to(torch.uint8)
    label[label == 2] = 255
    shown = logits_at_original_size(response, label).double()
    on_object, in_all = (shown[:, mask].sum(dim=1) for mask in (label == 1, label != 255))
    expected = on_object / in_all * (label != 255).sum() / (label == 1).sum()
    torch.testing.assert_close(object_preferences(response, label), expected, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc_folder(tmp_path_factory.mktemp("data") / "voc")


def _study(pictures: Path, changes: dict[int, float], usual: float = 1.0) -> CueStudy:
    """Of a layer whose singular value of rank r became changes[r] times, and any other `usual` times, what it was."""
    config = load_config("voc_folder", (*TINY, f"data.root={pictures}"))
    method = build_model(config, pretrained=False).method.eval()
    name, layer = _last(method, "3×3")
    layer.s.data *= usual
    for rank, factor in changes.items():
        layer.s.data[rank - 1] *= factor / usual
    layer.s0[-1] = 0.01 * layer.s0[0]  # near zero: any change of it is large
    source, told = validation_sampler(config, seed=1, console=QUIET), []
    study = study_cues(
        method, name, layer, source, "permuted", pictures=6, shown=2, amount=2,
        watch=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(done, 6) for done in range(1, 7)]
    return study


def test_a_study_finds_the_cues_that_moved_most_and_where_all_of_them_respond(pictures: Path) -> None:
    study = _study(pictures, {2: 0.5, 5: 0.9, 3: 0.8, 4: 1.1, 1: 1.3})
    assert [cue.rank for cue in study.fallen] == [2, 3]
    assert [cue.rank for cue in study.risen] == [1, 4]
    assert study.fallen[0].change == pytest.approx(-0.5)
    ranks = [cue.rank for cue in study.cues]
    assert ranks == list(range(1, len(ranks) + 1))
    assert study.preferences.shape == (6, len(ranks))
    assert np.isfinite(study.preferences).all()
    np.testing.assert_allclose(study.of(study.fallen), study.preferences[:, [1, 2]].mean(axis=1))
    assert -1 <= study.rank_correlation <= 1
    assert len({shown.episode.class_id for shown in study.shown}) == 2
    for shown in study.shown:
        assert [response.shape for response in shown.responses] == [tuple(shown.episode.original_label.shape)] * 4


def test_where_none_rose_the_cues_that_fell_least_stand_for_them(pictures: Path) -> None:
    study = _study(pictures, {2: 0.5, 3: 0.6, 4: 0.95}, usual=0.9)
    assert [cue.rank for cue in study.fallen] == [2, 3]
    assert study.risen[0].rank == 4
    assert study.risen[0].change == pytest.approx(-0.05)


def test_only_cues_that_rose_stand_for_those_that_did(pictures: Path) -> None:
    assert [cue.rank for cue in _study(pictures, {4: 1.2}, usual=0.9).risen] == [4]


def test_an_untuned_method_has_no_cues_that_moved(pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"the singular values of layer3\.0\.conv2 have not moved apart"):
        _study(pictures, {})


def test_values_near_zero_are_left_out() -> None:
    name, layer = _last(_method(), "3×3")
    layer.s0[-2:] = layer.s0[0] * torch.tensor([0.06, 0.04])
    assert [value.rank for value in moved_values(name, layer)] == list(range(1, layer.rank))


def test_the_correlation_tells_whether_rising_cues_lie_on_objects(pictures: Path) -> None:
    study = _study(pictures, {2: 0.5, 4: 1.1})
    changes = np.array([cue.change for cue in study.cues])
    rising = CueStudy(study.cues, study.fallen, study.risen, np.stack([changes, changes]), [])
    assert rising.rank_correlation == pytest.approx(1)
    falling = CueStudy(study.cues, study.fallen, study.risen, -rising.preferences, [])
    assert falling.rank_correlation == pytest.approx(-1)
