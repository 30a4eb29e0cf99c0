"""Both stages of BAM by one command: where they lie, what they share, and that a run stopped in either goes on to the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from run_fakes import stop_after, write_voc_folder

from svf_fast.train.checkpoint import load_checkpoint
from svf_fast.train.cli import main
from svf_fast.train.config import ConfigError
from svf_fast.train.journal import read_journal
from svf_fast.train.two_stages import load_two_stages

BAM, BASE = "pascal_bam_resnet50", "pascal_base_resnet50"
PLACES = ("data.root=somewhere", "run.dir=out")
SHARED = (
    "data.train_list=lists/fold{fold}_train.txt",
    "data.val_list=lists/fold{fold}_val.txt",
    "data.workers=0",
    "backbone.stem=plain",
    "backbone.blocks=1,1,1,1",
    "backbone.width=4",
    "run.threads=1",
    "run.checkpoint_every=2",
)
SECOND = (
    "data.size=33",
    "data.batch=2",
    "method.head_width=8",
    "schedule.epochs=null",
    "schedule.iterations=4",
    "validation.every_epochs=null",
    "validation.every_iterations=2",
    "validation.episodes=2",
)
FIRST = (
    "base.data.size=33",
    "base.data.batch=4",
    "base.schedule.epochs=null",
    "base.schedule.iterations=2",
    "base.validation.every_epochs=null",
    "base.validation.every_iterations=2",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc_folder(tmp_path_factory.mktemp("data") / "voc")


def command(pictures: Path, folder: Path, *more: str, name: str = BAM) -> list[str]:
    places = (f"data.root={pictures}", f"run.dir={folder}")
    return ["train", name, "--base-learner", BASE, *places, *SHARED, *SECOND, *FIRST, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "bam"
    assert main(command(pictures, folder)) == 0
    return folder


def require_same_run(folder: Path, expected: Path) -> None:
    found, wanted = load_checkpoint(folder / "last.pt"), load_checkpoint(expected / "last.pt")
    assert found.state == wanted.state
    assert found.method.keys() == wanted.method.keys()
    assert all(torch.equal(found.method[key], tensor) for key, tensor in wanted.method.items())


def steps(folder: Path) -> list[int]:
    return [line["iteration"] for line in read_journal(folder / "log.jsonl") if line["kind"] == "step"]


def test_the_first_stage_lies_in_the_seconds_folder_and_is_what_that_starts_from(whole: Path) -> None:
    first = whole / "base_learner"
    assert (steps(first), steps(whole)) == ([1, 2], [1, 2, 3, 4])
    learnt, begun = load_checkpoint(first / "best.pt"), load_checkpoint(whole / "last.pt")
    assert begun.config["method"]["base_learner"] == str(first / "best.pt")
    assert torch.equal(begun.method["learner_base.1.4.weight"], learnt.method["cls.4.weight"])


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_stopped_in_either_stage_goes_on_to_the_same_bits(
    tmp_path: Path,
    pictures: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    stop_after(monkeypatch, step)
    assert main(command(pictures, tmp_path / "bam")) == 1
    monkeypatch.undo()
    assert "--resume goes on from it" in capsys.readouterr().out
    assert (tmp_path / "bam" / "log.jsonl").exists() == (step > 2)
    assert main(command(pictures, tmp_path / "bam", "--resume")) == 0
    for folder in (".", "base_learner"):
        require_same_run(tmp_path / "bam" / folder, whole / folder)
        assert steps(tmp_path / "bam" / folder) == steps(whole / folder)


def test_a_finished_first_stage_is_shared_by_other_runs(tmp_path: Path, pictures: Path, whole: Path) -> None:
    first = whole / "base_learner"
    before = {path: path.read_bytes() for path in first.iterdir()}
    chosen = [f"base.run.dir={first}", "method.backbone_init=base_learner", "tuning.strategy=freeze", "--resume"]
    assert main(command(pictures, tmp_path / "pfenet", *chosen, name="pascal_pfenet_resnet50")) == 0
    assert not (tmp_path / "pfenet" / "base_learner").exists()
    assert {path: path.read_bytes() for path in first.iterdir()} == before
    learnt, begun = load_checkpoint(first / "best.pt"), load_checkpoint(tmp_path / "pfenet" / "last.pt")
    assert torch.equal(begun.method["layer4.0.conv1.weight"], learnt.method["layer4.0.conv1.weight"])


def test_a_second_stage_that_has_begun_needs_the_first_no_more(
    tmp_path: Path, pictures: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bam").mkdir()
    for name in ("last.pt", "best.pt", "log.jsonl"):
        shutil.copy(whole / name, tmp_path / "bam")
    assert main(command(pictures, tmp_path / "bam", "--resume")) == 0
    assert "first stage" not in capsys.readouterr().out
    assert not (tmp_path / "bam" / "base_learner").exists()


def test_what_both_stages_have_in_common_is_told_once() -> None:
    told = (
        "data.fold=2",
        "data.size=97",
        "data.cache_mb=7",
        "backbone.dilation=torchvision",
        "backbone.weights=w.pth",
        "run.seed=9",
        "base.run.seed=10",
        "run.precision=bf16",
        "run.accumulate=2",
        "base.schedule.epochs=3",
        "optimiser.base_lr=1.0",
    )
    base, config = load_two_stages(BAM, BASE, [*PLACES, *told])
    assert (base.data.root, base.data.fold, base.data.cache_mb) == ("somewhere", 2, 7)
    assert (base.backbone.dilation, base.backbone.weights) == ("torchvision", "w.pth")
    assert (base.run.seed, config.run.seed, base.run.precision) == (10, 9, "bf16")
    # what follows is each stage's own
    assert (base.data.size, config.data.size) == (417, 97)
    assert (base.run.accumulate, base.optimiser.base_lr) == (1, 0.00025)
    assert (base.schedule.epochs, config.schedule.epochs) == (3, 200)
    assert config.backbone.weights is None
    assert base.run.dir == str(Path("out") / "base_learner")
    assert config.method.base_learner == str(Path("out") / "base_learner" / "best.pt")


def test_what_a_file_says_of_the_pictures_reaches_the_first_stage_too(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"compose: [{BAM}]\ndata: {{root: here, fold: 3}}\nrun: {{dir: out}}\n")
    base, _ = load_two_stages(str(tmp_path / "mine.yaml"), BASE, [])
    assert (base.data.root, base.data.fold, base.run.dir) == ("here", 3, str(Path("out") / "base_learner"))


@pytest.mark.parametrize(
    ("name", "base", "overrides", "sentence"),
    [
        (BAM, "runs/base0/best.pt", [], "expected a configuration: a trained one is given as method.base_learner=FILE"),
        (
            BAM,
            BASE,
            ["method.base_learner=x.pt"],
            "method.base_learner is set, and --base-learner trains one: leave one",
        ),
        (BAM, BASE, ["run.dir=null"], "run.dir is not set"),
        (BAM, BASE, ["base.data.shots=5"], "in the base learner: unknown key data.shots"),
        (BAM, BASE, ["base.data.fold=1"], "data.fold is 0, but base.data.fold is 1: expected the same"),
        (BAM, BASE, ["base.backbone.stem=plain"], "backbone.stem is 'deep', but base.backbone.stem is 'plain'"),
        (BAM, BAM, [], "is a configuration for svf-fast train: its method.name is 'bam'"),
        (BASE, BASE, [], "is a configuration for svf-fast train-base: its method.name is 'pspnet'"),
        ("pascal_baseline_resnet50", BASE, [], "baseline starts from backbone.weights: add backbone_init=base_learner"),
    ],
)
def test_stages_that_do_not_go_together_get_one_sentence(
    name: str, base: str, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load_two_stages(name, base, [*PLACES, *overrides])
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["data.shots=99"], "99-shot episodes need"),
        (["backbone.architecture=vgg16", "tuning.strategy=full", "tuning.kernel=1x1"], "kernel is '1x1', but"),
        (["data.val_list=nowhere.txt"], "nowhere.txt does not exist"),
        (["run.dir={run}"], "already holds a run: add --resume"),
        (["base.run.dir={run}/base_learner"], "already holds a run: add --resume"),
        (["base.run.dir={run}/base_learner", "--resume", "run.seed=1"], "run.seed was 321 and is now 1"),
    ],
)
def test_a_mistake_in_the_second_stage_is_told_before_the_first_begins(
    tmp_path: Path, pictures: Path, whole: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    if "backbone.architecture=vgg16" in more:
        more = [*more, "backbone.stem=deep", "backbone.blocks=3,4,6,3"]
    capsys.readouterr()
    assert main(command(pictures, tmp_path / "out", *(text.format(run=whole) for text in more))) == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_keys_of_a_base_learner_need_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", BAM, "base.data.size=33"]) == 2
    assert "base.data.size=33 is of a base learner that is trained first: add --base-learner" in capsys.readouterr().err
