"""Each figure of the paper from finished runs that took no training: written whole with its numbers, or refused in a sentence
before anything is written."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_fakes import TINY, write_voc_folder

import svf_fast
from svf_fast.train.assembly import build_model
from svf_fast.train.checkpoint import Checkpoint, RunState, save_checkpoint
from svf_fast.train.config import load_config
from svf_fast.train.paper_figures import FIGURES, FinishedRun
from svf_fast.train.run_measures import example_rows, trained_method

CURVE = [{"training_miou": 0.3, "miou": 0.2}, {"training_miou": 0.5, "miou": 0.4}]
RunMaker = Callable[..., FinishedRun]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunMaker:
    """A run with a checkpoint whose singular values have moved, and a log of two validations."""
    pictures = write_voc_folder(tmp_path_factory.mktemp("data") / "voc")

    def make(
        label: str, *overrides: str, curve: Sequence[dict[str, Any]] = CURVE, has_checkpoint: bool = True
    ) -> FinishedRun:
        folder = tmp_path_factory.mktemp("run")
        config = load_config("voc_folder", (*TINY, f"data.root={pictures}", "run.device=cpu", *overrides))
        if has_checkpoint:
            method = build_model(config, pretrained=False).method
            generator = torch.Generator().manual_seed(7)
            for s in svf_fast.singular_values(method).values():
                s.data *= 0.5 + torch.rand(s.shape, generator=generator)
            save_checkpoint(Checkpoint(config.to_plain(), RunState(), method.state_dict(), {}), folder / "best.pt")
        lines = [{"kind": "validation", "iteration": 3 * number, **line} for number, line in enumerate(curve, 1)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return FinishedRun(label, config, folder)

    return make


def _draw(key: str, runs: Sequence[FinishedRun], out: Path) -> dict[str, Any]:
    """The numbers beside the figure, which is whole."""
    name = f"figure{key}" if key.isdecimal() else key
    pdf, png, beside = FIGURES[key].draw(runs, out)
    assert [path.name for path in (pdf, png, beside)] == [f"{name}.pdf", f"{name}.png", f"{name}.json"]
    assert sorted(out.iterdir()) == sorted((pdf, png, beside))
    assert pdf.read_bytes().rstrip().endswith(b"%%EOF")
    assert png.read_bytes().startswith(b"\x89PNG")
    facts: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
    assert facts["runs"] == [run.label for run in runs]
    return facts


@pytest.mark.parametrize(("key", "method"), [("2", "pfenet"), ("3", "baseline")])
def test_curves_of_training_and_validation_stand_in_a_panel_a_run(
    finished: RunMaker, tmp_path: Path, key: str, method: str
) -> None:
    runs = [
        finished(strategy, f"method.name={method}", f"tuning.strategy={strategy}", has_checkpoint=False)
        for strategy in ("freeze", "full", "svf")
    ]
    facts = _draw(key, runs, tmp_path)
    assert facts["curves"]["svf"] == {"steps": [3, 6], "training_miou": [0.3, 0.5], "miou": [0.2, 0.4]}
    assert "under the test transform" in facts["caption"]


@pytest.mark.parametrize(("key", "layer"), [("4", "layer3.0.conv2"), ("5", "layer3.0.conv3")])
@pytest.mark.parametrize("parametrization", ["direct", "scale"])
def test_cues_come_with_where_they_respond(
    finished: RunMaker, tmp_path: Path, key: str, layer: str, parametrization: str
) -> None:
    facts = _draw(key, [finished("SVF", f"tuning.parametrization={parametrization}")], tmp_path)
    assert facts["layer"] == layer
    assert facts["pictures"] == 8  # of the validation list, each once
    fallen, risen = facts["fallen"], facts["risen"]
    assert all(cue["after"] < cue["before"] for cue in fallen["cues"])
    assert all(cue["after"] > cue["before"] for cue in risen["cues"])
    means = [group["object_preference"]["mean"] for group in (fallen, risen)]
    assert facts["risen_minus_fallen"]["mean"] == pytest.approx(means[1] - means[0])
    for mean in means:
        assert f"{mean:.2f} ±" in facts["caption"]
    assert "began below 5 %" in facts["caption"]


@pytest.mark.parametrize(
    ("overrides", "kernels"),
    [((), ["1×1", "3×3"]), (("backbone.architecture=vgg16", "backbone.blocks=[3,4,6,3]", *(
        "backbone.stem=deep", "backbone.stride_on=conv2", "backbone.width=2")), ["3×3"])],
    ids=["resnet", "vgg16"],
)  # fmt: skip
def test_singular_values_before_and_after_are_those_in_force(
    finished: RunMaker, tmp_path: Path, overrides: tuple[str, ...], kernels: list[str]
) -> None:
    run = finished("SVF", "tuning.parametrization=scale", *overrides)
    spectra = _draw("6", [run], tmp_path)["spectra"]
    assert [spectrum["kernel"] for spectrum in spectra] == kernels
    method = trained_method(run.config, run.folder / "best.pt")
    for spectrum in spectra:
        layer = method.get_submodule(spectrum["layer"])
        assert isinstance(layer, svf_fast.SVFConv2d)
        assert spectrum["before"] == sorted(spectrum["before"], reverse=True)
        np.testing.assert_allclose(spectrum["after"], (layer.s0 * layer.s).detach()[: len(spectrum["after"])])


def test_predictions_of_all_runs_stand_beside_their_episode(finished: RunMaker, tmp_path: Path) -> None:
    runs = [finished(strategy, f"tuning.strategy={strategy}", "data.shots=2") for strategy in ("freeze", "svf")]
    examples = _draw("predictions", runs, tmp_path)["examples"]
    assert [example["class"] for example in examples] == ["kind 1", "kind 2"]
    assert all(list(example["iou"]) == ["freeze", "svf"] for example in examples)


def test_an_example_shows_every_support_at_its_own_size_with_its_mask(finished: RunMaker) -> None:
    run = finished("svf", "data.shots=2")
    (row,) = example_rows(run.config, {"svf": trained_method(run.config, run.folder / "best.pt")}, rows=1)
    assert len(row.supports) == 2
    for picture, mask in row.supports:
        assert (picture.shape, mask.shape) == ((64, 72, 3), (64, 72))
        assert (mask == 1).sum() == 48 * 48


@pytest.mark.parametrize("key", list(FIGURES))
def test_a_figure_of_no_run_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the runs are \[\], expected one or more, each label once: .*run"):
        FIGURES[key].draw([], tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "settings", "sentence"),
    [
        ("2", [()], "figure2: run 'a' is of baseline; it takes runs of pfenet on one fold"),
        ("3", [("method.name=pfenet",)], "run 'a' is of pfenet"),
        ("3", [(), ("data.fold=1",)], "data.fold is 0 in run 'a' and 1 in run 'b'"),
        ("3", [(), ("validation.episodes=5",)], "validation.episodes is 4 in run 'a' and 5 in run 'b'"),
        ("4", [("tuning.strategy=freeze",)], "figure4: run 'a' has tuning.strategy=freeze; it takes one run of"),
        ("4", [(), ()], "there are 2 runs (a, b)"),
        ("4", [("tuning.subspaces=[U,S]",)], "run 'a' has tuning.subspaces=U,S"),
        ("6", [("tuning.stages=[layer2]",)], "run 'a' has tuning.stages=layer2, without layer 3"),
        ("predictions", [(), ("data.size=41",)], "data.size is 33 in run 'a' and 41 in run 'b'"),
    ],
)  # fmt: skip
def test_runs_that_do_not_fit_are_refused_in_a_sentence(
    finished: RunMaker, tmp_path: Path, key: str, settings: list[tuple[str, ...]], sentence: str
) -> None:
    runs = [finished(label, *overrides, has_checkpoint=False) for label, overrides in zip("ab", settings, strict=False)]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        FIGURES[key].draw(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("curve", "sentence"),
    [
        ([], r"figure3: run 'svf' has no validation in .*log\.jsonl"),
        ([{"miou": 0.1}, *CURVE], r"has no training mIoU in 1 of the 3 validations of .*validation\.training_episodes was 0"),
    ],
)  # fmt: skip
def test_a_run_without_the_curves_is_refused(
    finished: RunMaker, tmp_path: Path, curve: list[dict[str, float]], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        FIGURES["3"].draw([finished("svf", curve=curve, has_checkpoint=False)], tmp_path)


def test_a_vgg_has_no_last_1x1_convolution(finished: RunMaker, tmp_path: Path) -> None:
    vgg = ("backbone.architecture=vgg16", "backbone.blocks=[3,4,6,3]", "backbone.stem=deep", "backbone.stride_on=conv2")
    with pytest.raises(
        ValueError, match=r"a vgg16 without a converted 1×1 convolution in layer 3; it takes .*on a ResNet"
    ):
        FIGURES["5"].draw([finished("svf", *vgg, "backbone.width=2")], tmp_path)


def test_a_missing_checkpoint_is_told_by_name(finished: RunMaker, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*best\.pt"):
        FIGURES["6"].draw([finished("svf", has_checkpoint=False)], tmp_path)


def test_a_label_given_twice_is_refused(finished: RunMaker, tmp_path: Path) -> None:
    runs = [finished("svf", has_checkpoint=False) for _ in range(2)]
    with pytest.raises(ValueError, match=r"the runs are \['svf', 'svf'\], expected one or more, each label once"):
        FIGURES["predictions"].draw(runs, tmp_path)
